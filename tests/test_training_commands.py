"""`recover` and `loraprune` as commands: files open again, a kill loses nothing, two processes agree."""

import json
import signal

import forked
import pytest
import torch
from forked import Forked, in_two
from peft import PeftModel
from tiny import FAMILIES, opened, token_ids

from probeprune import compose, find_blocks, load_model, prune, save
from probeprune.cli import app, run
from probeprune.cli.train import TrainingOptions
from probeprune.data.windows import Text
from probeprune.jobs.measure import Measure
from probeprune.progress import silent


@pytest.fixture(scope="module")
def files(tmp_path_factory, number_tokenizer):
    folder = tmp_path_factory.mktemp("training")
    model = FAMILIES["llama-gqa"]()
    done = prune(model, compose("random", skip_layers=1), 0.3)
    save(model, folder / "pruned", tokenizer=number_tokenizer, record=done.record())
    save(FAMILIES["opt"](), folder / "opt", tokenizer=number_tokenizer)
    save(FAMILIES["llama-gqa"](), folder / "dense", tokenizer=number_tokenizer)
    lines = [" ".join(str(i) for i in row) for row in token_ids(40, 30).tolist()]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    (folder / "test.txt").write_text("\n".join(lines * 40))
    return folder


def arguments(files, command, model, out, *more):
    sizes = ["--steps", 4, "--batch-size", 8, "--micro-batch", 4, "--length", 16, "--evaluate-every", 2]
    text = ["--text", files / "text.jsonl", "--corpus", files / "test.txt", "--windows", 0]
    rest = ["--learning-rate", 0.01, "--dtype", "float32", *more]
    return [str(a) for a in (command, files / model, "--out", out, *sizes, *text, *rest)]


def call(*parts):
    return run(lambda: app(list(parts)))


@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_recover_writes_what_opens(kind, files, tmp_path, capsys):
    out = tmp_path / "out"
    more = {"adapter": [], "merged": ["--merge"], "full": ["--no-lora"]}[kind]
    assert call(*arguments(files, "recover", "pruned", out, "--warmup-steps", 1, "--json", *more)) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 4 * 8 * 16 and record["steps"] == 4
    assert record == json.loads((out / "training.json").read_text())
    card = (out / "README.md").read_text()
    share = record["pruning"]["removed_share"]
    assert "held-out loss" in card and f"| pruned before | {share:.1%} of the blocks" in card
    assert list((out / "tensorboard").iterdir())
    assert not (tmp_path / "out.training").exists() and len(list(tmp_path.iterdir())) == 1
    base = load_model(str(files / "pruned"), dtype="float32").model
    ids = token_ids(2, 8)
    with torch.no_grad():
        before = base(ids).logits
        if kind == "adapter":
            after = PeftModel.from_pretrained(base, out).eval()(ids).logits
        else:
            loaded = opened(out)
            assert type(loaded).__name__ == "PerLayerLlamaForCausalLM"
            after = loaded(ids).logits
            assert (out / "adapter/adapter_model.safetensors").exists() == (kind == "merged")
            if kind == "merged":
                beside = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
                torch.testing.assert_close(after, beside, rtol=1e-3, atol=1e-3)
    assert (after - before).abs().max() > 1e-3


def test_loraprune_writes_a_plain_checkpoint(files, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--ratio", 0.3, "--round-to", 4, "--json"]
    assert call(*arguments(files, "loraprune", "dense", out, *more)) == 0
    record = json.loads(capsys.readouterr().out)
    loaded = opened(out)
    assert not type(loaded).__name__.startswith(("Pruned", "PerLayer"))
    units = {b.name: b.units for b in find_blocks(loaded)}
    assert units == {n: len(k["units"]) for n, k in record["kept"].items()}
    assert record["parameters"][1] == sum(p.numel() for p in loaded.parameters())
    assert "while training" in (out / "README.md").read_text()


def test_killed_for_real_and_started_again(files, tmp_path, capsys):
    more = ["--warmup-steps", 1, "--merge", "--steps", 12]
    assert call(*arguments(files, "recover", "pruned", tmp_path / "whole", *more)) == 0
    command = arguments(files, "recover", "pruned", tmp_path / "out", *more)
    process = Forked(forked.command, *command)
    process.until(lambda: list((tmp_path / "out.training").glob("checkpoint-*")))
    process.send(signal.SIGKILL)
    assert process.ended()[0] == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert call(*command) == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("command", ["recover", "loraprune"])
def test_two_processes_give_what_one_gives(command, files, tmp_path, capsys):
    model = "pruned" if command == "recover" else "dense"
    more = ["--dropout", 0.0, "--warmup-steps", 1, "--merge"] if command == "recover" else ["--ratio", 0.3]
    if command == "loraprune":
        more += ["--dropout", 0.0, "--round-to", 1]
    assert call(*arguments(files, command, model, tmp_path / "one", *more)) == 0
    together = arguments(files, command, model, tmp_path / "two", *more, "--json")
    (first, output, errors), (second, nothing, _) = in_two(forked.command, *together)
    assert (first, second) == (0, 0) and not nothing, errors[-3000:]
    record = json.loads(output)  # one line: one process prints
    assert record["processes"] == 2
    one = opened(tmp_path / "one").state_dict()
    two = opened(tmp_path / "two").state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "one/training.json").read_text()).get("kept") == record.get("kept")


@pytest.mark.parametrize(
    ("command", "more", "says"),
    [
        ("recover", ["--length", "50"], "no document of more than 50 tokens"),
        ("recover", ["--steps", "0"], "--steps must be a whole number of steps from 1 to 10000000, not 0"),
        ("recover", ["--batch-size", "6", "--windows", "2", "--corpus", "nowhere.txt"], "multiple of 4"),
        ("recover", ["--rank", "0"], "--rank must be a whole number from 1 to 8192, not 0"),
        ("loraprune", ["--ratio", "1.2"], "--ratio must be a number in [0, 1), not 1.2"),
        ("loraprune", ["--ratio", "0.2", "--layout", "even"], "unknown layout"),
        ("loraprune", ["--ratio", "0.2", "--skip-layers", "2"], "leave --skip-layers out"),
        ("loraprune", ["--ratio", "0.95", "--layout", "per-layer"], "without units"),
    ],
)
def test_bad_input_is_one_sentence(command, more, says, files, tmp_path, capsys):
    assert call(*arguments(files, command, "dense", tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error and error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_micro_batches_divide_the_batch_unless_their_size_is_given():
    sizes = [TrainingOptions(batch_size=size).settings(None).micro_batch for size in (64, 6, 2, 1)]
    assert sizes == [4, 2, 2, 1]
    assert TrainingOptions(batch_size=6, micro_batch=3).settings(None).micro_batch == 3


def test_a_cut_that_no_plain_config_holds_fails_before_training(files, tmp_path, capsys):
    # OPT ties its number of heads to its hidden size.
    more = ["--ratio", 0.4, "--round-to", 1]
    assert call(*arguments(files, "loraprune", "opt", tmp_path / "out", *more)) == 2
    assert "use layout per-layer" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_adapter_given_as_model_is_said_to_be_one(files, tmp_path, capsys):
    assert call(*arguments(files, "recover", "pruned", tmp_path / "adapter", "--warmup-steps", 1)) == 0
    capsys.readouterr()
    assert call(*arguments(files, "recover", tmp_path / "adapter", tmp_path / "out")) == 2
    assert "is an adapter, not a model" in capsys.readouterr().err


def test_figures_before_training_are_measured_once(tmp_path, number_tokenizer, files):
    loaded = load_model(str(files / "dense"), dtype="float32")
    text = Text(str(files / "test.txt"), 2, 16)
    Measure(loaded, text, silent, keep=tmp_path / "kept.json")("before", loaded.model)
    again = Measure(loaded, text, silent, keep=tmp_path / "kept.json")
    again("before", None)  # not measured: there is nothing to measure
    assert again.figures["before"] > 1
    other = Measure(loaded, Text(str(files / "test.txt"), 3, 16), silent, keep=tmp_path / "kept.json")
    assert other.figures == {}
