"""Bench: what it counts is what runs, profiles know every part, and the shapes are the real models'."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, PROBING, padded, token_ids

from probeprune import METHODS, attach, find_blocks
from probeprune.bench import measure
from probeprune.bench.measure import GridPoint, measure_point
from probeprune.bench.plot import plot
from probeprune.bench.profiling import PARTS, profiled
from probeprune.bench.tables import profile_table, tables
from probeprune.bench.targets import SHAPES, Target, of_shape
from probeprune.cli import app, run
from probeprune.errors import UsageError
from probeprune.model.cost import blocks_flops
from probeprune.runtime import compiled
from probeprune.stages import STAGES
from probeprune.strategies.probe import probe_flops

CPU = torch.device("cpu")


def target(family: str) -> Target:
    def windows(count: int, length: int) -> torch.Tensor:
        return token_ids(count, length, seed=7)

    return Target(family, FAMILIES[family](), windows, torch.float32, CPU)


@pytest.fixture(scope="module")
def figures():
    """All lines of a tiny model at two points."""
    tiny = target("llama-gqa")
    calibration = token_ids(6, 16, seed=9)
    found = []
    for point in (GridPoint(1, 8), GridPoint(4, 12)):
        found += measure_point(
            tiny,
            [METHODS["ppsp"], PROBING],
            0.3,
            point,
            calibration=calibration,
            new_tokens=3,
            rounds=2,
            progress=lambda what, done, total: None,
        )
    return found


def test_there_is_a_line_for_every_method_phase_and_point(figures):
    lines = [(f["batch_size"], f["length"], f["phase"], f["method"]) for f in figures]
    assert len(lines) == len(set(lines)) == 2 * 2 * 3
    for f in json.loads(json.dumps(figures)):
        assert f["efficiency"] == pytest.approx(f["speedup"] * f["work_share"])
        assert f["tokens_per_second"] > 0 and f["peak_memory"] > 0
        if f["method"] == "dense":
            assert f["speedup"] == f["work_share"] == f["cache_over_dense"] == 1


def test_compiled_methods_are_timed_in_turn_and_the_model_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(compiled, "missing_compiler", lambda device: None)
    attached, entered = [], measure.attach

    def noted(model, method, *args, compile=False, **kwargs):
        attached.append((method.name, compile))
        return entered(model, method, *args, compile=compile, **kwargs)

    monkeypatch.setattr(measure, "attach", noted)
    tiny, before = target("opt"), target("opt").model.state_dict()
    tiny.model.model.decoder.layers = tiny.model.model.decoder.layers[:1]
    tiny.model.config.num_hidden_layers = 1
    found = measure_point(
        tiny,
        [replace(METHODS["ppsp"], skip_layers=0)],
        0.3,
        GridPoint(2, 8),
        calibration=token_ids(6, 16, seed=9),
        new_tokens=2,
        rounds=2,
        progress=lambda *_: None,
        compile=True,
    )
    assert attached == [("dense", False), ("ppsp", False), ("dense", True), ("ppsp", True)]
    assert all(f["compiled"] and f["seconds"] > 0 and f["work_share"] > 0 for f in found) and len(found) == 4
    assert "compiled" in str(tables(found)[0].title)
    assert all(p.equal(before[n]) for n, p in tiny.model.state_dict().items())


def test_work_is_what_the_formulas_say(figures):
    model = FAMILIES["llama-gqa"]()
    calibration = token_ids(6, 16, seed=9)
    with attach(model, PROBING, 0.3, calibration=calibration) as handle:
        blocks, kept, removed = handle.blocks, handle.widths, handle.removed_share
    full = [b.units for b in blocks]
    heads = [k / b.units for b, k in zip(blocks, kept, strict=True) if b.kind == "attention"]
    weights = 4 * sum(b.parameters for b in blocks)
    for f in (f for f in figures if f["method"] != "dense"):
        shape = f["batch_size"], f["length"]
        assert f["cache_over_dense"] == pytest.approx(sum(heads) / len(heads))
        if f["phase"] == "prefill":
            own = blocks_flops(blocks, kept, *shape)
            own += probe_flops(blocks, kept, PROBING.when.probe, *shape) if f["method"] == "probe" else 0
            assert f["work_share"] == pytest.approx(own / blocks_flops(blocks, full, *shape), abs=1e-3)
        else:
            cache = f["cache_bytes"] / f["cache_over_dense"]
            own = weights * (1 - removed) + f["cache_bytes"]
            assert f["work_share"] == pytest.approx(own / (weights + cache), rel=1e-6)


def test_the_model_is_left_as_it_was():
    tiny = target("opt")
    before = {n: p.clone() for n, p in tiny.model.named_parameters()}
    calibration = token_ids(6, 16, seed=9)
    options = {"calibration": calibration, "new_tokens": 0, "rounds": 1, "progress": lambda *_: None}
    found = measure_point(tiny, [PROBING], 0.3, GridPoint(2, 8), **options)
    assert {f["phase"] for f in found} == {"prefill"}
    assert all(p.equal(before[n]) for n, p in tiny.model.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tiny.model.modules())


@pytest.mark.parametrize("method", ["dense", "ppsp", PROBING], ids=["dense", "once", "probe"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_profile_knows_every_part_and_only_what_ran(family, method):
    model = FAMILIES[family]()
    calibration = token_ids(6, 16, seed=9)
    with attach(model, method, 0.3, calibration=calibration) as handle, torch.no_grad():
        found, _ = profiled(handle.blocks, CPU, lambda: model(*padded("none")))
    assert tuple(found) == PARTS
    stages = tuple(s.name for s in STAGES if s.name != "refit") if method is PROBING else ()
    runs = ("attention", "mlp", "rest", *stages)
    for part, ms in found.items():
        assert ms > 0 if part in runs else ms == 0, part
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_refit_at_every_batch_has_a_place_in_the_profile():
    model, calibration = FAMILIES["llama"](), token_ids(12, 24, seed=9)
    method = replace(METHODS["best-dynamic"], skip_layers=1)
    with attach(model, method, 0.3, calibration=calibration) as handle, torch.no_grad():
        found, _ = profiled(handle.blocks, CPU, lambda: model(token_ids(2, 12)))
    runs = ("attention", "mlp", "rest", "run_ahead", "choose", "refit")
    assert all(ms > 0 if part in runs else ms == 0 for part, ms in found.items()), found


def test_shapes_are_the_real_models():
    # Parameters of all decoder layers without norms, from the published models.
    for shape, blocks in {"llama-2-7b": 6_476_005_376, "llama-3.2-1b": 973_078_528}.items():
        model = of_shape(shape, None, torch.bfloat16, torch.device("meta")).model
        assert sum(b.parameters for b in find_blocks(model)) == blocks
        assert model.dtype == torch.bfloat16
    two = of_shape("llama-3-8b", 2, torch.float32, torch.device("meta"))
    assert len(two.model.model.layers) == 2 and "2 layers" in two.name
    with pytest.raises(UsageError, match="did you mean 'llama-2-7b'"):
        of_shape("llama2-7b", 1, torch.float32, CPU)
    with pytest.raises(UsageError, match="layers must be a whole number of layers from 1 to 10000, not 0"):
        of_shape("llama-2-7b", 0, torch.float32, CPU)


def test_a_random_model_is_the_same_every_time_and_its_channels_differ(monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(SHAPES, "small", {**sizes, "num_key_value_heads": 2, "head_dim": 16})
    state = torch.get_rng_state()
    one, two = (of_shape("small", None, torch.float32, CPU) for _ in range(2))
    assert torch.get_rng_state().equal(state)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert a.equal(b)
    assert one.windows(3, 5).shape == (3, 5)
    norms = one.model.model.layers[0].mlp.up_proj.weight.norm(dim=1)
    assert norms.max() > 1.5 * norms.min()


def test_tables_and_plot_are_made_of_the_lines_alone(figures, tmp_path):
    lines = json.loads(json.dumps(figures))
    prefill, decode = tables(lines)
    assert prefill.row_count == decode.row_count == 6
    assert "dtype" not in [c.header for c in prefill.columns], "what does not vary stands in the title"
    assert profile_table(lines).row_count == 12
    other = [{**f, "dtype": "bfloat16"} for f in lines]
    assert "dtype" in [c.header for c in tables(lines + other)[0].columns]
    assert [p.suffix for p in plot(lines, tmp_path / "bench")] == [".png", ".svg"]
    assert plot([f for f in lines if f["method"] == "dense"], tmp_path / "none") == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "prob"], "did you mean 'probe'"),
        (["--methods", "llm-pruner"], "runs as fast as ppsp"),
        (
            ["--batch-sizes", "1,x"],
            "--batch-sizes must be a whole number of sequences from 1 to 1000000, not 'x'",
        ),
        (["--lengths", "0"], "--lengths must be a whole number of tokens from 1 to 16777216, not 0"),
        (["--ratio", "1"], "--ratio must be a number in [0, 1), not 1.0"),
        (["--rounds", "0"], "--rounds must be a whole number of rounds from 1 to 10000, not 0"),
        (["--layers", "2"], "--layers goes with --shape"),
        (["--shape", "llama-9"], "unknown shape 'llama-9'"),
        (["--dtypes", "int3"], "int3"),
        (["--shape", "llama-2-7b", "--dtypes", "int3"], "int3"),
    ],
)
def test_bad_input_is_one_sentence(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    out = tmp_path / "out"
    assert run(lambda: app(["bench", *arguments, "--out", str(out)])) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not out.exists()


def test_the_command_writes_lines_and_a_plot(tmp_path, capsys, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(SHAPES, "small", {**sizes, "num_key_value_heads": 2, "head_dim": 16})
    small = [
        "--shape",
        "small",
        "--batch-sizes",
        "1,2",
        "--lengths",
        "16",
        "--new-tokens",
        "2",
        "--rounds",
        "1",
    ]
    arguments = [
        "bench",
        *small,
        "--dtypes",
        "float32",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
        "--profile",
        "--methods",
        "best-static,best-dynamic",
    ]
    assert run(lambda: app(arguments)) == 0
    shown = capsys.readouterr().out
    assert "prefill" in shown and "decode" in shown and "run_ahead" in shown
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 3 and {f["threads"] for f in lines} == {1}
    assert (tmp_path / "bench.png").exists()
