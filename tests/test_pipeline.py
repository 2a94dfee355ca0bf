"""`probeprune prune` as a user runs it, on a tiny model with real files."""

import json

import pytest
from tiny import FAMILIES, opened, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from probeprune import find_blocks
from probeprune.cli import app, run


def call(*arguments: object) -> int:
    return run(lambda: app([str(a) for a in arguments]))


@pytest.fixture(scope="module")
def files(tmp_path_factory, number_tokenizer):
    """A model directory and texts it can read."""
    folder = tmp_path_factory.mktemp("files")
    for family in ("llama", "opt"):
        FAMILIES[family]().save_pretrained(folder / family)
        number_tokenizer.save_pretrained(folder / family)
    lines = [" ".join(str(i) for i in row) for row in token_ids(40, 60).tolist()]
    (folder / "calibration.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    (folder / "test.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def prune(files, tmp_path, monkeypatch):
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "cache"))

    def command(*arguments, model="llama", out="out"):
        text = ["--calibration", files / "calibration.jsonl", "--corpus", files / "test.txt"]
        sizes = ["--calibration-windows", 12, "--length", 32, "--windows", 4, "--batch-size", 4]
        return call("prune", files / model, "--out", tmp_path / out, *text, *sizes, *arguments)

    return command


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_a_checkpoint_with_all_that_belongs_to_it(prune, files, tmp_path, capsys, layout):
    assert prune("--method", "wanda-sp", "--ratio", 0.2, "--layout", layout, "--round-to", 4, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    out = tmp_path / "out"
    record = json.loads((out / "pruning.json").read_text())
    assert record == printed
    assert {file.stat().st_mode for file in out.iterdir()} == {(files / "test.txt").stat().st_mode}
    model = opened(out)
    units = {b.name: b.units for b in find_blocks(model)}
    assert units == {name: len(k["units"]) for name, k in record["kept"].items()}
    assert all(n % 4 == 0 for name, n in units.items() if name.endswith("mlp"))
    assert record["removed_share"] == pytest.approx(0.2, abs=0.03)
    assert record["parameters"][1] == sum(p.numel() for p in model.parameters())
    assert record["calibration"]["moments"] == {"windows": 12, "length": 32}
    card = (out / "README.md").read_text()
    figures = record["evaluation"]["perplexity"]
    for said in (
        "wanda-sp",
        "asked for | 20.0%",
        f"{record['removed_share']:.1%}",
        f"**{figures['pruned']:.2f}**",
    ):
        assert said in card
    assert ("trust_remote_code" in card) == (layout == "per-layer")
    # As the card says: transformers reads the config to find the tokenizer's class.
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=layout == "per-layer")
    assert tokenizer("7 8 9")["input_ids"][-3:] == [7, 8, 9]
    assert (out / "generation_config.json").exists()


@pytest.mark.parametrize("blocks", ["attention", "attention,mlp"])
def test_a_share_that_misses_the_ratio_is_said(prune, tmp_path, capsys, blocks):
    more = ["--blocks", blocks, "--round-to", 1]
    assert prune("--method", "random", "--ratio", 0.19, *more) == 0
    said = capsys.readouterr().err
    removed = json.loads((tmp_path / "out" / "pruning.json").read_text())["removed_share"]
    assert ("asked for 19.0% of the blocks' parameters, removed" in said) == (abs(removed - 0.19) > 0.01)
    assert (f"removed {removed:.1%}: widths come" in said) == (blocks == "attention")


def test_gradients_take_windows_of_their_own_size(prune, tmp_path, capsys):
    # LLM-Pruner wants 10 windows of 64 tokens; no line here is that long.
    assert prune("--method", "llm-pruner", "--ratio", 0.2) == 2
    assert "no document has more than 64 tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_steps_and_blocks_and_no_measurement(prune, tmp_path, capsys):
    options = ["--blocks", "mlp", "--compensation", "bias", "--windows", 0, "--steps", 2, "--round-to", 1]
    assert prune("--method", "wanda-sp", "--ratio", 0.2, *options, model="opt") == 0
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    assert record["steps"] == 2 and record["evaluation"] is None
    assert {len(k["units"]) == k["of"] for n, k in record["kept"].items() if "attn" in n} == {True}
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "OPTForCausalLM"
    assert "not measured" in (tmp_path / "out/README.md").read_text()


def test_a_refit_is_recorded_and_stays_a_plain_checkpoint(prune, tmp_path):
    options = ["--compensation", "least-squares", "--windows", 0, "--round-to", 1, "--blocks", "mlp"]
    assert prune("--method", "magnitude", "--ratio", 0.2, *options) == 0
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    assert record["calibration"]["consumers"] == {"windows": 12, "length": 32}
    compensation = record["method"]["compensation"]
    assert compensation["kind"] == "least-squares" and compensation["held_out"] == 0.125
    lost = {name for name, k in record["kept"].items() if len(k["units"]) < k["of"]}
    assert record["refits"].keys() == lost and all(r["error_before"] > 0 for r in record["refits"].values())
    card = (tmp_path / "out/README.md").read_text()
    assert "refit on 12 windows" in card and "magnitude, even, least-squares" in card
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "LlamaForCausalLM"


BY_DAMAGE = ["--layout", "per-layer", "--allocation", "damage"]


def test_widths_by_damage_meet_a_budget_of_flops(prune, tmp_path):
    options = [*BY_DAMAGE, "--budget", "flops", "--round-to", 1, "--windows", 0]
    assert prune("--method", "magnitude", "--ratio", 0.3, *options) == 0
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    assert record["method"]["budget"] == "flops" and record["calibration"]["damages"]["windows"] == 12
    assert record["removed_share"] == pytest.approx(0.3, abs=0.06)
    assert "| 30.0% of the blocks' FLOPs |" in (tmp_path / "out/README.md").read_text()
    assert len({len(k["units"]) for n, k in record["kept"].items() if "mlp" in n}) > 1


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        ("llama", ["--method", "probe", "--steps", "2"], "at every batch"),
        ("llama", ["--method", "random", "--budget", "flops"], "--layout per-layer"),
        (
            "llama",
            ["--method", "random", "--layout", "per-layer", "--budget", "flops"],
            "allocation 'damage'",
        ),
        (
            "llama",
            ["--method", "random", *BY_DAMAGE, "--budget", "time", "--steps", "2"],
            "in one step",
        ),
        ("llama", ["--method", "flapp"], "did you mean 'flap'"),
        ("llama", ["--method", "random", "--layout", "even"], "unknown layout"),
        ("llama", ["--method", "random", "--layout", "uniform", "--skip-layers", "2"], "--layout per-layer"),
        ("llama", ["--method", "random", "--allocation", "global"], "--layout per-layer"),
        ("llama", ["--method", "random", "--blocks", "mlps"], "some of attention, mlp"),
        (
            "llama",
            ["--method", "random", "--units", "query", "--layout", "per-layer", "--steps", "0"],
            "steps",
        ),
        ("llama", ["--method", "flap"], "without compensation"),
        ("opt", ["--method", "random"], "no plain config describes this model"),
        ("llama", ["--method", "random", "--ratio", "1e-7"], "too small to remove a single unit"),
        ("llama", ["--method", "random", "--ratio", "1.5"], "--ratio must be a number in [0, 1), not 1.5"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(prune, tmp_path, capsys, model, arguments, says):
    ratio = [] if "--ratio" in arguments else ["--ratio", "0.2"]
    assert prune(*arguments, *ratio, model=model) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache/statistics").exists()


def test_a_directory_in_use_is_refused_before_anything_else(prune, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    assert prune("--method", "random", "--ratio", 0.2, model="no-such-model") == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_unwritable_cache_is_refused_before_the_work(prune, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROBEPRUNE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("probeprune.jobs.measure.perplexity", lambda *_, **__: pytest.fail("the work began"))
    assert prune("--method", "wanda-sp", "--ratio", 0.2, "--round-to", 4, "--dtype", "float32") == 2
    error = capsys.readouterr().err
    assert f"the cache '{tmp_path / 'file'}' cannot be written; set PROBEPRUNE_CACHE" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_quantised_model_is_refused(prune, files, capsys):
    config = json.loads((files / "llama/config.json").read_text())
    (files / "quantised").mkdir(exist_ok=True)
    for file in (files / "llama").iterdir():
        (files / "quantised" / file.name).write_bytes(file.read_bytes())
    changes = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (files / "quantised/config.json").write_text(json.dumps({**config, **changes}))
    assert prune("--method", "random", "--ratio", 0.2, model="quantised") == 2
    assert "is quantised" in capsys.readouterr().err
