"""The worked examples of CONTRIBUTING.md, run as they stand there, keep what all methods promise.

Every example adds something from outside the package; nothing in it is changed but its tables.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from all_methods import BY_HAND, RATIO, WINDOWS, CutBlock, check_cut, check_passes, untrained
from tiny import FAMILIES, logits, moments_of, token_ids
from torch.nn.functional import linear

from probeprune import (
    METHODS,
    Method,
    Probe,
    UsageError,
    attach,
    compose,
    prepare,
    records,
    with_equal_widths,
)
from probeprune.calibration.gradients import saliences
from probeprune.methods import SCHEDULES, TABLES
from probeprune.model import families
from probeprune.model.blocks import find_blocks
from probeprune.prepare import load_prepared
from probeprune.strategies.allocation import ALLOCATIONS
from probeprune.strategies.compensation import COMPENSATIONS
from probeprune.strategies.criteria import CRITERIA
from probeprune.strategies.importance import IMPORTANCES

GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"
CHANGED = (METHODS, IMPORTANCES, CRITERIA, ALLOCATIONS, COMPENSATIONS, SCHEDULES, FAMILIES)
"""Tables that examples add rows to."""
EXAMPLES = (
    "a method",
    "an importance",
    "a gradient criterion",
    "an allocation",
    "a compensation",
    "a model family",
    "a dynamic method with a state of its own",
)
"""Those that a test below runs."""


def examples() -> dict[str, str]:
    """The Python code of every section "Add ..." of the guide, by the rest of its title."""
    sections = re.split(r"^#+ ", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    code = {}
    for section in sections:
        title, _, text = section.partition("\n")
        blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        if blocks:
            code[title.removeprefix("Add ")] = "\n".join(blocks)
    return code


@pytest.fixture
def example(monkeypatch):
    """Run an example of the guide; gives its names. Afterwards all tables are as before."""
    before = [dict(table) for table in CHANGED]
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES)  # put back at the end

    def run(title: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "example"}
        exec(compile(examples()[title], f"{GUIDE}: {title}", "exec"), names)
        return names

    yield run
    for table, rows in zip(CHANGED, before, strict=True):
        table.clear()
        table.update(rows)


def check(name: str, folder: Path, build: Callable = FAMILIES["llama-gqa"]) -> None:
    """A row of `METHODS` is in the list of all methods, and keeps the promises of attach, prune and save."""
    method = untrained()[name]
    assert records.from_json(Method, json.loads(json.dumps(method.record())), TABLES) == method
    model = build()
    calibration = prepare(model, method, RATIO, WINDOWS)
    calibration.save(folder / "prepared.safetensors")
    check_passes(model, method, load_prepared(folder / "prepared.safetensors"))
    if not method.when.every_batch:
        check_cut(build, method, calibration, folder)


def kept_by(name: str) -> dict[str, tuple[int, ...]]:
    """The units that blocks keep under a static method, by block name."""
    with attach(FAMILIES["llama-gqa"](), untrained()[name], RATIO, calibration=WINDOWS) as handle:
        pruned = {p.block.name for p in handle.pruned}
        return {k.name: k.units for k in handle.kept_units() if k.name in pruned}


def test_every_example_of_the_guide_is_run_here():
    assert tuple(examples()) == EXAMPLES


def test_a_method(example, tmp_path):
    example("a method")
    check("wanda-global", tmp_path)


def test_an_importance(example, tmp_path):
    example("an importance")
    check("deviation", tmp_path)
    model = FAMILIES["llama-gqa"]()
    moments, kept = moments_of(model, WINDOWS), kept_by("deviation")
    for block in (b for b in find_blocks(model) if b.name in kept):
        deviation = moments[block.name].variance.double().sqrt()
        channels = (deviation[None] * block.consumer.weight.double().abs()).sum(0)
        scores = channels.view(block.units, -1).sum(1)
        best = scores.argsort(descending=True)[: len(kept[block.name])].sort().values
        assert list(kept[block.name]) == best.tolist()


def test_a_gradient_criterion(example, tmp_path):
    example("a gradient criterion")
    check("gradient-norm", tmp_path)
    model = FAMILIES["llama-gqa"]()
    got = saliences(model, WINDOWS[:4], "gradient-norm")
    members = [m for b in find_blocks(model) for m in b.members]
    for window in WINDOWS[:4]:
        (model(window[None], labels=window[None]).loss / 4).backward()
    for m in members:
        want = m.linear.weight.grad.double().square().sum(1 - m.axis).sqrt()
        torch.testing.assert_close(got[m.name].double(), want, rtol=1e-4, atol=1e-8)


def test_an_allocation(example, tmp_path):
    example("an allocation")
    check("growing", tmp_path)
    with attach(FAMILIES["llama-gqa"](), METHODS["growing"], RATIO, calibration=WINDOWS) as handle:
        pairs = zip(handle.blocks, handle.widths, strict=True)
        widths = [width for block, width in pairs if block.kind == "mlp"]
    assert 100 > widths[0] > widths[1] > widths[2] > widths[3] > widths[4]


def test_a_compensation(example, tmp_path, monkeypatch):
    def rescaled(cut: CutBlock, z: torch.Tensor) -> torch.Tensor:
        assert cut.moments is not None
        consumer = cut.block.consumer
        strength = cut.moments.sample_energy * consumer.weight.square().sum(0)
        factor = (strength.sum() / strength[cut.channels].sum()).sqrt()
        return linear(z[:, cut.channels], factor * consumer.weight[:, cut.channels], consumer.bias)

    example("a compensation")
    monkeypatch.setitem(BY_HAND, "rescale", rescaled)
    check("rescaled", tmp_path)
    METHODS["rescaled probe"] = compose("probe", name="rescaled probe", compensation="rescale")
    check("rescaled probe", tmp_path)  # made up for anew at every batch


def test_a_model_family(example, tmp_path):
    with pytest.raises(KeyError):
        FAMILIES["jais2"]
    example("a model family")
    build = tiny.FAMILIES["jais2"]
    for name in ("wanda-sp", "probe", "best-dynamic"):
        (tmp_path / name).mkdir()
        check(name, tmp_path / name, build)
    even = with_equal_widths("wanda-sp")
    (tmp_path / "even").mkdir()
    loaded = check_cut(build, even, prepare(build(), even, RATIO, WINDOWS), tmp_path / "even")
    assert loaded.config.model_type == "jais2", "one width for all layers fits a plain config"


def test_a_dynamic_method_with_a_state_of_its_own(example, tmp_path):
    names = example("a dynamic method with a state of its own")
    check("probe-mean", tmp_path)
    with pytest.raises(UsageError, match="cannot be scored from a probe"):
        compose("probe-mean", importance="flap")
    with pytest.raises(UsageError, match="a refit is made for fixed units"):
        compose("probe-mean", compensation="least-squares")
    # With the whole batch as its probe, the first pruned block sees the dense model's input.
    when = names["MeanOfProbes"](Probe(tokens=1.0, samples=1.0), every=3)
    model = FAMILIES["llama-gqa"]()
    block = next(b for b in find_blocks(model) if b.layer == 3)
    batches = [token_ids(2, 12, seed=50 + seed) for seed in range(7)]
    seen: list[torch.Tensor] = []
    hook = block.consumer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    for ids in batches:
        logits(model, ids, torch.ones_like(ids))
    hook.remove()
    energies = torch.stack([z.view(2, 12, -1).square().mean(0).sum(0) for z in seen])
    quartic = block.consumer.weight.double().square().square().sum(0).sqrt()
    chosen, choices = [], []
    with attach(model, compose("probe-mean", when=when), RATIO, calibration=WINDOWS) as handle:
        for ids in batches:
            logits(model, ids, torch.ones_like(ids))
            chosen.append(next(k.units for k in handle.kept_units() if k.name == block.name))
            choices.append(handle.kept_units())
    for batch, units in enumerate(chosen):
        last = batch - batch % 3
        score = (energies[: last + 1].mean(0) * quartic).view(block.units, -1).norm(dim=1)
        assert list(units) == score.argsort(descending=True)[: len(units)].sort().values.tolist()
    assert choices[0] == choices[1] == choices[2] != choices[3] == choices[4] == choices[5] != choices[6]
