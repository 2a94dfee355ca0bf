"""Mixtures of experts: every family is what its record says.

What a cut model computes is compared with the dense one whose units are masked from outside: an expert by a
logit of minus infinity in its router, a channel by zeros in `down_proj`.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_experts
import torch
from safetensors.torch import load_file, save_file
from tiny import PROBING, close, kept, logits, masked, snapshot
from torch import nn
from transformers import AutoModelForCausalLM

from probeprune import UsageError, attach, compose, find_blocks, prune, save
from probeprune.algebra.routed_moments import RoutedMoments
from probeprune.calibration.routed import routed_moments
from probeprune.calibration.statistics import Statistics
from probeprune.cli import app, run
from probeprune.data.windows import Text
from probeprune.errors import Notice
from probeprune.jobs.forecast import comparing_work
from probeprune.jobs.prune import Texts
from probeprune.model.cost import blocks_flops, counting_flops
from probeprune.model.described import empty_like
from probeprune.model.experts import Stack, find_parts, find_stacks
from probeprune.model.families import find_family
from probeprune.model.passes import find_decoder
from probeprune.model.placing import opening_of, place
from probeprune.model.stack_cut import StackCut
from probeprune.plan import Kept, expert_scores
from probeprune.runtime.attaching import attach_again
from probeprune.strategies.probe import probe_flops
from probeprune.surgery import cut

WINDOWS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(3))
IDS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0
IDS = IDS * MASK
TOLD = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 3, "min_new_tokens": 3}
EVEN = compose("wanda-sp", name="even", skip_layers=0, allocation="even")
WHOLE = compose(EVEN, name="whole", experts="expert")
MIXED = compose("magnitude", name="mixed", skip_layers=1, experts="expert", expert_importance="magnitude")
PROBE = compose(PROBING, name="probe", skip_layers=0)
RATIO = {"even": 0.3, "whole": 0.3, "mixed": 0.2}

pytestmark = [
    pytest.mark.filterwarnings("ignore:experts stay whole"),
    pytest.mark.filterwarnings("ignore:no head of this model can go"),
    pytest.mark.filterwarnings("ignore:no token of the calibration text"),
]


@dataclass
class Row:
    """A tiny model, its logits, and what cuts of it gave."""

    name: str
    model: Any
    dense: torch.Tensor

    @property
    def choosable(self) -> bool:
        """Whether a batch can choose units of anything."""
        return any(b.whole is None for b in find_blocks(self.model))

    def fresh(self) -> Any:
        """The same model once more."""
        return copy.deepcopy(self.model)

    def pruned(self, method: Any) -> tuple[Any, Any]:
        """The model pruned, and the record of that; made once."""
        return pruned(self.name, method)


@cache
def pruned(name: str, method: Any) -> tuple[Any, Any]:
    """A tiny model pruned, and the record of that."""
    model = tiny_experts.build(name)()
    return model, prune(model, method, RATIO[method.name], calibration=WINDOWS)


@pytest.fixture(scope="module", params=tiny_experts.CONFIGS)
def row(request):
    model = tiny_experts.build(request.param)()
    return Row(request.param, model, logits(model, IDS, MASK))


@contextmanager
def without(model: nn.Module, keeps: list[Kept]) -> Iterator[nn.Module]:
    """A copy of the dense model in which everything outside `keeps` is masked."""
    model = copy.deepcopy(model)
    stacks = {s.name: s for s in find_stacks(model)}
    blocks = {b.name: b for b in find_blocks(model)}
    gone: dict[int, list[int]] = {}
    with torch.no_grad():
        for k in keeps:
            if k.kind != "experts":
                continue
            stack = stacks[k.name]
            for i, own in enumerate(k.by_expert):
                lost = [c for c in range(stack.width) if c not in own]
                down = stack.module.down_proj[i]
                (down.T if stack.record.transposed else down)[:, lost] = 0
            if not k.by_expert:
                lost = [e for e in range(stack.experts) if e not in k.units]
                router = stack.root.get_parameter(stack.record.router[0])
                gone[router.data_ptr()] = lost
                for path in stack.record.router:
                    if path.endswith(("e_score_correction_bias", "expert_bias")):
                        owner, _, name = path.rpartition(".")
                        getattr(stack.root.get_submodule(owner), name)[..., lost] = float("-inf")
    linear = nn.functional.linear

    def masking(x, weight, bias=None):
        made = linear(x, weight, bias)
        lost = gone.get(weight.data_ptr(), [])
        return made.index_fill(-1, torch.tensor(lost), float("-inf")) if lost else made

    nn.functional.linear = masking
    try:
        with masked([(blocks[k.name], k.units) for k in keeps if k.kind != "experts"]):
            yield model
    finally:
        nn.functional.linear = linear


def formula(stack: Stack, expert: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An expert's coupled activation and output, written out."""
    weights = {k: p[expert].double() for k, p in stack.module.named_parameters(recurse=False)}
    first, down = weights.get("gate_up_proj", weights.get("up_proj")), weights["down_proj"]
    if not stack.record.transposed:
        first, down = first.T, down.T
    made = x @ first + weights.get("gate_up_proj_bias", 0)
    if "up_proj" in weights:  # Nemotron 3
        z = made.clamp(min=0).square()
    elif stack.record.interleaved:  # gpt-oss
        gate, up = made[0::2].clamp(max=7), made[1::2].clamp(-7, 7)
        z = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        gate, up = made.chunk(2)
        gelu = stack.record.per_token_field == "top_k_experts"  # Gemma 4
        made = nn.functional.gelu(gate, approximate="tanh") if gelu else gate * torch.sigmoid(gate)
        z = made * up
    return z, z @ down + weights.get("down_proj_bias", 0)


def test_parts_hold_all_weights_of_the_layers(row):
    parts = find_parts(row.model)
    layers = find_family(row.model).layers
    weights = {n: p for n, p in row.model.named_parameters() if n.startswith(layers)}
    mixers = [b for b in parts if b.kind == "mixer"]
    outputs = tuple(f".{mixer.output}.weight" for mixer in find_family(row.model).mixers)
    assert bool(mixers) == any(n.endswith(outputs) for n in weights) and all(b.whole for b in mixers)
    maps = {id(p) for b in mixers for m in (*b.producers, b.consumer) for p in m.parameters()}
    others = sum(
        p.numel()
        for n, p in weights.items()
        if "norm" in n
        or n.endswith(("sinks", ".scale"))
        or (any(n.startswith(f"{b.name}.") for b in mixers) and id(p) not in maps)
    )
    assert sum(b.parameters for b in parts) == sum(p.numel() for p in weights.values()) - others
    stacks = [b for b in parts if isinstance(b, Stack)]
    assert stacks and all(s.layer > 0 or row.name not in ("glm4_moe", "ernie4_5_moe") for s in stacks)
    for unit in ("channel", "expert"):
        model = row.fresh()
        for stack in find_stacks(model, unit):
            before = sum(p.numel() for p in model.parameters())
            cut(model, {stack.name: units_of(stack, stack.units - 1)}, experts=unit)
            lost = before - sum(p.numel() for p in model.parameters())
            assert lost == stack.unit_parameters
            break


def units_of(stack: Stack, count: int) -> torch.Tensor:
    """The last units of a stack; of channels, others for every expert."""
    if stack.unit == "expert":
        return torch.arange(stack.units)[stack.units - count :]
    rows = [torch.arange(stack.units).roll(e)[:count].sort().values for e in range(stack.experts)]
    return torch.stack(rows)


def test_all_units_are_the_dense_model_and_restoring_puts_the_same_tensors_back(row):
    before = snapshot(row.model)
    for unit in ("channel", "expert"):
        for count in (lambda s: s.units, lambda s: s.units - 8 if s.unit == "channel" else s.least):
            cuts = [StackCut(s) for s in find_stacks(row.model, unit)]
            for made in cuts:
                made.keep(units_of(made.stack, count(made.stack)))
            got = logits(row.model, IDS, MASK)
            whole = all(count(made.stack) == made.stack.units for made in cuts)
            assert torch.allclose(got, row.dense, atol=1e-5 * float(row.dense.abs().max())) == whole
            for made in cuts:
                made.restore()
            before.assert_untouched()


@pytest.mark.parametrize("method", [EVEN, WHOLE, MIXED], ids=lambda m: m.name)
def test_a_cut_model_is_the_dense_one_masked(row, method):
    smaller, pruning = row.pruned(method)
    lost = {k.kind for k in pruning.kept if len(k.units) < k.of}
    assert "experts" in lost
    assert pruning.removed_share == pytest.approx(RATIO[method.name], abs=0.12)  # tiny models have few widths
    with without(row.model, pruning.kept) as other:
        close(logits(smaller, IDS, MASK), logits(other, IDS, MASK))
    tokens = [smaller.generate(IDS, attention_mask=MASK, use_cache=c, **TOLD) for c in (True, False)]
    assert tokens[0].equal(tokens[1])


def test_an_attached_static_method_is_the_cut(row):
    before = snapshot(row.model)
    for method in (EVEN, WHOLE):
        smaller, pruning = row.pruned(method)
        with attach(row.model, method, RATIO[method.name], calibration=WINDOWS) as handle:
            assert logits(row.model, IDS, MASK).equal(logits(smaller, IDS, MASK))
            assert handle.kept_units() == list(pruning.kept)
            assert handle.removed_share == pytest.approx(pruning.removed_share)
            with pytest.raises(UsageError, match="cuts experts cannot be saved with its model; prune"):
                save(handle, Path("never"))
            same = handle.kept
        with attach_again(row.model, same) as handle:
            assert logits(row.model, IDS, MASK).equal(logits(smaller, IDS, MASK))
        before.assert_untouched()


def test_flops_counted_are_those_of_the_formulas(row):
    def counted(model):
        with counting_flops() as count, torch.no_grad():
            find_decoder(model)(input_ids=WINDOWS, use_cache=False)
        return count.flops

    def formulas(model):
        parts = find_parts(model)
        return blocks_flops(parts, [b.units for b in parts], *WINDOWS.shape)

    rest = counted(row.model) - formulas(row.model)
    assert rest >= 0  # rotary angles; in a mixer, convolutions and states
    assert rest <= 2 * 12 * 16 * 3 or find_family(row.model).mixers
    for method in (EVEN, WHOLE):
        smaller, _ = row.pruned(method)
        assert counted(smaller) - formulas(smaller) == rest
        assert formulas(smaller) < formulas(row.model)
    if not row.choosable:
        return
    with attach(row.model, PROBE, 0.05, calibration=WINDOWS) as handle:
        own = blocks_flops(handle.blocks, handle.widths, *WINDOWS.shape)
        probe = probe_flops(*handle.probed, handle.method.when.probe, *WINDOWS.shape)
        assert counted(row.model) - rest == own + probe


def test_routed_moments_are_those_of_a_loop_over_tokens(row):
    row.model.requires_grad_(False)
    found = routed_moments(row.model, WINDOWS, batch_size=4)
    seen: dict[str, list] = {s.name: [] for s in find_stacks(row.model)}
    hooks = [
        s.module.register_forward_pre_hook(lambda _, args, s=s: seen[s.name].append((s, args)))
        for s in find_stacks(row.model)
    ]
    with torch.no_grad():
        row.model(WINDOWS)
    for hook in hooks:
        hook.remove()
    for name, [(stack, args)] in seen.items():
        z: dict[int, list] = {e: [] for e in range(stack.experts)}
        added = torch.zeros(stack.experts, dtype=torch.float64)
        if stack.record.scales_input:
            pairs = [
                (e, x.double(), 1.0)
                for e, rows in enumerate(args[0].view(stack.experts, -1, 32))
                for x in rows
            ]
            pairs = [p for p in pairs if p[1].any()]
        else:
            x, index, weights = args
            pairs = [
                (int(e), x[t].double(), float(w))
                for t in range(len(x))
                for e, w in zip(index[t], weights[t], strict=True)
            ]
        for e, own, weight in pairs:
            coupled, out = formula(stack, e, own)
            z[e].append(coupled)
            added[e] += weight * out.norm()
        moments = found[name]
        assert moments.count.tolist() == [len(z[e]) for e in range(stack.experts)]
        assert float(moments.tokens) == WINDOWS.numel() and float(moments.samples) == len(WINDOWS)
        assert len(pairs) == stack.per_token * WINDOWS.numel()
        for e, rows in z.items():
            if not rows:
                continue
            all_ = torch.stack(rows)
            close(moments.mean[e].double(), all_.mean(0))
            close(moments.variance[e].double(), all_.var(0, correction=0))
            close(moments.sample_energy[e].double(), all_.square().sum(0) / len(WINDOWS))
            assert float(moments.mean_contribution[e]) == pytest.approx(float(added[e] / len(rows)), rel=1e-5)
        reap = expert_scores(
            WHOLE, find_stacks(row.model, "expert")[list(found).index(name)], Statistics(routed=found)
        )
        assert reap is not None and reap.equal(moments.mean_contribution)


def test_a_probed_batch_is_the_dense_model_masked_and_detaching_restores_all_bits(row):
    if not row.choosable:
        with pytest.raises(UsageError, match="experts stay whole, because no batch chooses units of experts"):
            attach(row.model, PROBE, 0.1, calibration=WINDOWS)
        return
    before = snapshot(row.model)
    with (
        pytest.warns(
            Notice, match="experts stay whole, because no batch chooses units of experts, and count"
        ),
        attach(row.model, PROBE, 0.08, calibration=WINDOWS) as handle,
    ):
        got, choice = logits(row.model, IDS, MASK), handle.kept_units()
        assert any(len(k.units) < k.of for k in choice)
        assert all(len(k.units) == k.of for k in choice if k.kind == "experts")
        cached = row.model.generate(IDS, attention_mask=MASK, **TOLD)
        prompted = kept(handle)
    before.assert_untouched()
    with without(row.model, choice) as other:
        close(got, logits(other, IDS, MASK))
    with masked([(b, units) for b, units in prompted if b.kind != "experts"]):
        assert cached.equal(row.model.generate(IDS, attention_mask=MASK, use_cache=False, **TOLD))
    assert logits(row.model, IDS, MASK).equal(row.dense)


def test_a_batch_chooses_heads_alone(row):
    if find_family(row.model).attention.whole is not None:
        return
    heads = sum(b.parameters for b in find_blocks(row.model) if b.kind == "attention")
    ratio = 0.4 * heads / sum(b.parameters for b in find_parts(row.model))
    with attach(row.model, compose(PROBE, blocks=("attention",)), ratio, calibration=WINDOWS) as handle:
        got, choice = logits(row.model, IDS, MASK), kept(handle)
    assert any(len(units) < b.units for b, units in choice if b.kind == "attention")
    with masked([(b, units) for b, units in choice if b.kind != "experts"]):
        close(got, logits(row.model, IDS, MASK))


# -- checkpoints -----------------------------------------------------------------------------------

OPEN = """
import json, sys
sys.modules["probeprune"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
given = load_file(f"{folder}/ids.safetensors")
made = {}
for name, layer_by_layer in json.loads(sys.argv[2]):
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/{name}", dtype=torch.float32, trust_remote_code=layer_by_layer, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        made[name] = model(input_ids=given["ids"], attention_mask=given["mask"]).logits
save_file(made, f"{folder}/logits.safetensors")
"""


@pytest.fixture(scope="module")
def reopened(tmp_path_factory):
    """The logits of every checkpoint in a fresh process without this package, and those of the cut model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_file({"ids": IDS, "mask": MASK}, folder / "ids.safetensors")
    wanted, given = {}, []
    for name in tiny_experts.CONFIGS:
        for method, layout in ((EVEN, "uniform"), (WHOLE, "uniform"), (MIXED, "per-layer")):
            if layout == "uniform" and not find_family(tiny_experts.build(name)()).attention.plain_heads:
                method = compose(method, name=method.name, blocks=("mlp", "experts"))
            model, _ = pruned(name, method)
            where = f"{name}-{method.name}"
            save(model, folder / where, layout=layout)
            assert (folder / where / "modeling_pruned.py").exists() == (layout == "per-layer")
            with torch.no_grad():
                wanted[where] = model(input_ids=IDS, attention_mask=MASK).logits
            given.append((where, layout == "per-layer"))
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder), json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, wanted, load_file(folder / "logits.safetensors")


@pytest.mark.parametrize("name", tiny_experts.CONFIGS)
def test_checkpoints_open_without_this_package(name, reopened):
    folder, wanted, got = reopened
    for method in ("even", "whole", "mixed"):
        close(got[f"{name}-{method}"], wanted[f"{name}-{method}"])  # kernels round by the alignment of files
    config = json.loads((folder / f"{name}-whole" / "config.json").read_text())
    own = name == "gemma4_text"  # every config of the family has fields of single layers
    assert ("per_layer_config" in config) == own and "auto_map" not in config


def test_a_plain_config_holds_fewer_heads_where_the_record_says_so(row, tmp_path):
    record = find_family(row.model).attention
    if record.whole is not None:
        return
    smaller = row.fresh()
    heads = [b for b in find_blocks(smaller) if b.kind == "attention"]
    cut(smaller, {b.name: torch.arange(b.units - 1) for b in heads})
    try:
        save(smaller, tmp_path / "out", layout="uniform")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
        holds = logits(loaded, IDS, MASK).equal(logits(smaller, IDS, MASK))
    except UsageError:
        holds = False
    assert holds == record.plain_heads


@pytest.mark.parametrize("kind", ["channel", "expert"])
def test_the_command_writes_a_plain_checkpoint(kind, tmp_path, number_tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))
    model = tiny_experts.build("qwen2_moe")()
    save(model, tmp_path / "model", tokenizer=number_tokenizer)
    lines = [" ".join(map(str, row)) for row in torch.randint(3, 60, (20, 60)).tolist()]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))

    def call(command: str, ratio: float, *more: object) -> int:
        words = [command, tmp_path / "model", "--ratio", ratio, "--calibration", tmp_path / "text.jsonl"]
        sizes = ["--calibration-windows", 8, "--length", 16, "--windows", 4, "--round-to", 1]
        texts = ["--corpus", tmp_path / "text.jsonl", "--method", "wanda-sp", "--experts", kind, "--json"]
        return run(lambda: app([str(w) for w in (*words, *sizes, *texts, *more)]))

    assert call("plan", 0.3) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["refused"] is None and planned["by_layer"]["bytes"] < planned["in_memory"]["bytes"]
    assert call("prune", 0.3, "--out", tmp_path / "out") == 0
    record = json.loads(capsys.readouterr().out)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert record["parameters"] == [m.num_parameters() for m in (model, loaded)]
    assert planned["after"]["parameters"] == record["parameters"][1]
    assert planned["after"]["flops_per_token"] < planned["before"]["flops_per_token"]
    assert record["calibration"]["routed"] == {"windows": 8, "length": 16}
    kept = {k: len(v["units"]) for k, v in record["kept"].items() if k.endswith("experts")}
    own = {s.name: s.units for s in find_stacks(loaded, kind)}
    assert kept == own and all(k < (16 if kind == "channel" else 8) for k in kept.values())
    noun = "channels of each expert" if kind == "channel" else "experts"
    card = (tmp_path / "out" / "README.md").read_text()
    assert noun in card and f"{'channels of ' * (kind == 'channel')}experts are removed" in card
    assert call("plan", 0.95) == 2
    capsys.readouterr()


def test_memory_counts_what_stays_of_experts_beside_them():
    model = empty_like(tiny_experts.build("mixtral")())
    cpu, texts = torch.device("cpu"), Texts(Text("c4", 4, 16), Text("wikitext2", 4, 16), 0, 4)
    work = comparing_work([(WHOLE, 0.3)], texts)
    assert place("mixtral", model, torch.float32, cpu, 2**40, work) is None
    with pytest.raises(UsageError, match=r"takes .* GiB even a layer at a time .*; give memory of"):
        place("mixtral", model, torch.float32, cpu, 2**20, work)
    stacks = find_stacks(model, "expert")
    phases = work(model, torch.float32, cpu)
    least = 4 * stacks[0].per_token * stacks[0].unit_parameters
    assert min(p.copies for p in phases if "dense" in p.name) >= len(stacks) * least
    opening = opening_of(model, torch.float32, cpu, [(torch.float32, 4)])
    plain = [replace(p, copies=0) for p in phases]
    for how, layers in ((opening.in_memory, len(stacks)), (opening.by_layer, 1)):
        more = [own - other for (_, own), (_, other) in zip(how(phases), how(plain), strict=True)]
        assert min(more) == 0 and max(more) >= layers * least


def test_the_loss_that_balances_experts_counts_those_that_are_left():
    model = tiny_experts.build("mixtral")()
    prune(model, WHOLE, 0.3, calibration=WINDOWS)
    assert model.num_experts == find_stacks(model)[0].experts < 6
    with torch.no_grad():
        made = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert torch.isfinite(made.aux_loss) and made.router_logits[0].shape[-1] == model.num_experts


# -- refusals --------------------------------------------------------------------------------------


def test_a_router_keeps_as_many_experts_as_it_takes():
    model = tiny_experts.build("mixtral")()
    with pytest.raises(
        UsageError, match="with 1 of 6 experts, and its router takes 2 for a token, so at least 2"
    ):
        prune(model, WHOLE, 0.75, calibration=WINDOWS)
    with pytest.raises(UsageError, match="at least 2 must stay"):
        stack = find_stacks(model, "expert")[0]
        cut(model, {stack.name: torch.arange(1)}, experts="expert")
    model = tiny_experts.build("glm4_moe")()
    with pytest.raises(UsageError, match="takes 2 for a token from 1 of 2 groups, so at least 4 must stay"):
        prune(model, WHOLE, 0.55, calibration=WINDOWS)


def test_groups_keep_as_many_experts_each():
    model = tiny_experts.build("glm4_moe")()
    done = prune(model, WHOLE, 0.25, calibration=WINDOWS)
    for k in done.kept:
        if k.kind == "experts":
            assert sum(e < 4 for e in k.units) == len(k.units) / 2 < 4


def test_experts_without_tokens_score_lowest_and_are_named():
    model = tiny_experts.build("qwen3_moe")()
    with pytest.warns(
        Notice, match=r"routed to experts [\d, ]+ of model.layers.0.mlp.experts, which score lowest"
    ):
        prune(model, WHOLE, 0.2, calibration=WINDOWS[:1, :3])
    stack = find_stacks(tiny_experts.build("qwen3_moe")(), "expert")[0]
    moments = RoutedMoments(8, 16)
    moments.update(3, torch.ones(2, 16), torch.ones(2))
    with pytest.warns(Notice, match="experts 0, 1, 2, 4, 5, 6, 7 of"):
        scores = expert_scores(WHOLE, stack, Statistics(routed={stack.name: moments}))
    assert scores.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"base": "best-static", "experts": "expert"}, "a refit makes up for channels of experts, not for"),
        ({"allocation": "damage"}, "the damage of cutting experts is not measured"),
    ],
)
def test_what_is_not_defined_for_experts_leaves_them_and_says_so(changes, why):
    changes = dict(changes)
    method = compose(changes.pop("base", "magnitude"), skip_layers=0, **changes)
    assert why in method.experts_stay
    model = tiny_experts.build("qwen2_moe")()
    with pytest.raises(UsageError, match=f"experts stay whole, because {why}"):
        prune(model, compose(method, blocks=("experts",)), 0.2, calibration=WINDOWS)
    whole = [s.units for s in find_stacks(model)]
    with pytest.warns(Notice, match=f"experts stay whole, because {why}"):
        prune(model, method, 0.1, calibration=WINDOWS)
    assert [s.units for s in find_stacks(model)] == whole


def test_settings_that_cannot_be():
    with pytest.raises(UsageError, match="unknown experts 'head'"):
        compose("wanda-sp", experts="head")
    with pytest.raises(UsageError, match="unknown expert importance 'raep'; did you mean 'reap'"):
        compose("wanda-sp", expert_importance="raep")
    model = tiny_experts.build("mixtral")()
    with pytest.raises(UsageError, match="this model has no mlp to prune"):
        prune(model, compose("magnitude", skip_layers=0, blocks=("mlp",)), 0.2)
    with pytest.raises(UsageError, match="a budget of flops is not counted for mixtures of experts"):
        prune(
            model,
            compose("best-static", allocation="damage", budget="flops", skip_layers=0),
            0.05,
            calibration=WINDOWS,
        )
    with pytest.raises(UsageError, match="needs calibration="):
        prune(model, compose("magnitude", skip_layers=0, experts="expert"), 0.2)


def test_pooled_moments_are_those_of_all_tokens():
    """Two holders, whose sums are added up in step: each calls `add_up` twice."""
    z = torch.randn(9, 5) + 3
    one = RoutedMoments(2, 5)
    one.update(1, z, z.norm(dim=1))
    parts = [RoutedMoments(2, 5) for _ in range(2)]
    for part, own in zip(parts, (z[:4], z[4:]), strict=True):
        part.update(1, own, own.norm(dim=1))

    def meet(step: int) -> list[list[torch.Tensor]]:
        """What each holder gives to its call of that number, the calls before answered."""
        given: list[list[torch.Tensor]] = []
        for part in parts:
            copied = RoutedMoments.from_state({k: v.clone() for k, v in part.state().items()})
            calls: list[list[torch.Tensor]] = []

            def add_up(*tensors: torch.Tensor, calls: Any = calls) -> None:
                calls.append([t.clone() for t in tensors])
                if len(calls) <= step:
                    for own, total in zip(tensors, sums[len(calls) - 1], strict=True):
                        own.copy_(total)

            copied.pool(add_up)
            given.append(calls[step])
            pooled.append(copied)
        return given

    sums: list[list[torch.Tensor]] = []
    pooled: list[RoutedMoments] = []
    for step in range(2):
        sums.append([torch.stack(t).sum(0) for t in zip(*meet(step), strict=True)])
    meet_all = sums[1][0]
    close(meet_all, one.m2)
    close(pooled[-1].mean, one.mean)
