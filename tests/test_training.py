"""Recovery and LoRAPrune on tiny models: explicit formulas, resumed as unbroken, two processes as one."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from tiny import FAMILIES, masked, token_ids
from transformers import AutoModelForCausalLM, TrainerCallback

from probeprune import compose, find_blocks, load_model, prune, save
from probeprune.cli import app, run
from probeprune.data.windows import training_windows
from probeprune.errors import UsageError
from probeprune.training import processes
from probeprune.training.loraprune import LoraPrune, lora_salience, loraprune, schedule
from probeprune.training.recovery import lora_config, merged, recover
from probeprune.training.settings import Lora, Training
from probeprune.training.trainer import last_checkpoint

TEXT, HELD_OUT = token_ids(32, 16, seed=1), token_ids(4, 16, seed=2)
SMALL = Training(
    steps=6, batch_size=8, micro_batch=4, length=16, warmup_steps=1, evaluate_every=2, learning_rate=3e-3
)


def changed(training, **changes):
    return Training(**{**{k: getattr(training, k) for k in training.__dataclass_fields__}, **changes})


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Ends the process's work as a kill would: in the middle of a step, nothing cleaned up."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def weights(model):
    return {k: v.clone() for k, v in merged(model).state_dict().items()}


def test_schedule_values():
    # r(t) = r_f + (r_0 - r_f) (1 - p)^3 with r_0 = 0, over r_f; a tenth of the steps flat on both sides.
    assert [schedule(t) for t in (0.0, 0.05, 0.1)] == [0, 0, 0]
    assert schedule(0.5) == pytest.approx(1 - 0.5**3)
    assert schedule(0.3) == pytest.approx(1 - 0.75**3)
    assert [schedule(t) for t in (0.9, 0.95, 1.0)] == [pytest.approx(1)] * 3
    rising = [schedule(t / 100) for t in range(101)]
    assert rising == sorted(rising)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_sensitivity_is_the_explicit_formula(family):
    from peft import get_peft_model

    model = FAMILIES[family]()
    blocks = find_blocks(model)
    wrapped = get_peft_model(model, lora_config(model, Lora(rank=3, alpha=6, dropout=0.0)))
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.05)
    wrapped(input_ids=TEXT[:4], labels=TEXT[:4]).loss.backward()
    for block in blocks[:2]:
        for m in block.members:
            layer = wrapped.get_base_model().get_submodule(m.name)
            a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
            gradient = (
                b.grad.double() @ a.double()
                + b.double() @ a.grad.double()
                - b.grad.double() @ a.grad.double()
            )
            whole = m.linear.weight.double() + 2 * b.double() @ a.double()
            expected = (gradient * whole).abs().sum(1 - m.axis)
            torch.testing.assert_close(lora_salience(m, layer).double(), expected, rtol=1e-4, atol=1e-9)


def test_scores_are_a_moving_average_of_normalised_sums_and_a_nan_step_is_left_out(tmp_path):
    model = FAMILIES["llama-gqa"]()
    blocks = find_blocks(model)
    pruner = LoraPrune(blocks, [b.units - 1 for b in blocks], every=100)
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            layer = model.get_base_model().get_submodule(blocks[0].members[0].name)
            if state.global_step == 2:
                layer.lora_A["default"].weight.grad[0, 0] = float("nan")
            parts = []
            for m in blocks[1].members:
                s = lora_salience(m, model.get_base_model().get_submodule(m.name))
                parts.append(s / s.square().sum().sqrt())
            seen.append(sum(parts))

    class Mend(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.nan_to_num_()

    recover(
        model,
        TEXT,
        HELD_OUT,
        changed(SMALL, steps=4, clip=1e9, keep_best=False),
        tmp_path / "w",
        callbacks=[Watch(), pruner, Mend()],
    )
    assert pruner.left_out == 1
    expected = torch.zeros(100)
    for step in (0, 1, 3):
        expected = 0.9 * expected + 0.1 * seen[step]
    torch.testing.assert_close(pruner.scores[blocks[1].name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "opt", "phi3", "gpt-neox"])
def test_loraprune_masks_grow_on_schedule_and_the_cut_model_is_the_masked_one(family, tmp_path):
    model = FAMILIES[family]()
    blocks = find_blocks(model)
    history, outputs = [], {}
    training = changed(SMALL, steps=10, keep_best=False, evaluate_every=5)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            history.append({n: m.clone() for n, m in pruner.masked.items()})
            if state.global_step == 10:
                model.eval()
                with torch.no_grad():
                    outputs["masked"] = model(input_ids=TEXT[:4]).logits
                model.train()

    kept_units = [b.units if b.layer < 1 else max(b.units // 2, 1) for b in blocks]
    pruner = LoraPrune(blocks, kept_units, every=2)
    trained = recover(model, TEXT, HELD_OUT, training, tmp_path / "w", callbacks=[pruner, Watch()])
    for before, after in itertools.pairwise(history):
        assert all((after[n] | ~before[n]).all() for n in before), "masks only grow"
    counts = [sum(int(m.sum()) for m in masks.values()) for masks in history]
    assert counts[0] == 0 and counts[-1] == sum(b.units - k for b, k in zip(blocks, kept_units, strict=True))
    assert 0 < counts[5] < counts[-1]
    # Merged and cut: the function of the masked model with its adapters, to rounding.
    from probeprune.surgery import cut

    smaller = merged(trained.model)
    dense = {k: v.clone() for k, v in smaller.state_dict().items()}
    with (
        torch.no_grad(),
        masked([(b, pruner.kept()[b.name].tolist()) for b in blocks if b.name in pruner.kept()]),
    ):
        by_hand = smaller(input_ids=TEXT[:4]).logits
    torch.testing.assert_close(by_hand, outputs["masked"], rtol=1e-3, atol=1e-3)
    cut(smaller, pruner.kept())
    with torch.no_grad():
        torch.testing.assert_close(smaller(input_ids=TEXT[:4]).logits, by_hand, rtol=1e-4, atol=1e-4)
    assert sum(v.numel() for v in smaller.state_dict().values()) < sum(v.numel() for v in dense.values())
    assert [b.units for b in find_blocks(smaller)] == kept_units


def test_loraprune_reaches_the_ratio_and_spares_the_first_layers(tmp_path):
    model = FAMILIES["gemma3"]()  # 6 layers: a tenth is none
    blocks = find_blocks(model)
    total = sum(b.parameters for b in blocks)
    training = changed(SMALL, keep_best=False)
    smaller, trained, kept = loraprune(model, TEXT, HELD_OUT, 0.3, training, tmp_path / "w", skip_layers=2)
    assert 1 - sum(b.parameters for b in find_blocks(smaller)) / total == pytest.approx(0.3, abs=0.01)
    assert trained.steps == 6 and not any("layers.0" in n or "layers.1" in n for n in kept)
    with pytest.raises(UsageError, match="keep_best=False"):
        loraprune(FAMILIES["llama"](), TEXT, HELD_OUT, 0.3, SMALL, tmp_path / "x")


def test_training_helps_and_only_adapters_move(tmp_path):
    model = FAMILIES["llama-gqa"]()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    trained = recover(model, TEXT, HELD_OUT, changed(SMALL, steps=30, learning_rate=1e-2), tmp_path / "w")
    losses = [e["loss"] for e in trained.history if "loss" in e]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    inner = {k.replace(".base_layer", ""): v for k, v in trained.model.get_base_model().state_dict().items()}
    assert all(v.equal(inner[k]) for k, v in base.items())
    assert not trained.model.training
    config = trained.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.05)
    assert config.target_modules == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert list((tmp_path / "w/tensorboard").iterdir())


@pytest.mark.parametrize("kind", ["lora", "full", "loraprune", "patience"])
@pytest.mark.parametrize("killed_at", [1, 3])
def test_resumed_is_the_same_as_unbroken(kind, killed_at, tmp_path):
    training = SMALL
    if kind == "full":
        training = changed(training, lora=None)
    if kind == "loraprune":
        training = changed(training, keep_best=False)
    if kind == "patience":
        training = changed(training, patience=3, evaluate_every=1, learning_rate=0.3, steps=8)

    def go(work, *kill):
        model = FAMILIES["llama-gqa"]()
        callbacks = []
        if kind == "loraprune":
            callbacks.append(
                LoraPrune(find_blocks(model), [b.units // 2 for b in find_blocks(model)], every=2)
            )
        trained = recover(model, TEXT, HELD_OUT, training, work, callbacks=[*callbacks, *kill])
        return trained, callbacks

    whole, pruners = go(tmp_path / "whole")
    with pytest.raises(Killed):
        go(tmp_path / "broken", KillAt(killed_at))
    if killed_at == 3:  # and the newest checkpoint was only half written
        newest = last_checkpoint(tmp_path / "broken")
        shutil.copytree(newest, tmp_path / "broken/checkpoint-9")
        (tmp_path / "broken/checkpoint-9/trainer_state.json").write_text('{"glob')
    resumed, again = go(tmp_path / "broken")
    assert resumed.steps == whole.steps and resumed.best_step == whole.best_step
    assert resumed.held_out == pytest.approx(whole.held_out, rel=1e-6)
    if kind == "patience":
        assert 3 < whole.steps < 8
    one, two = weights(whole.model), weights(resumed.model)
    assert all(v.equal(two[k]) for k, v in one.items())
    for a, b in zip(pruners, again, strict=True):
        assert all(m.equal(b.masked[n]) and a.scores[n].equal(b.scores[n]) for n, m in a.masked.items())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradient_checkpointing_and_micro_batches_change_nothing(kind, tmp_path):
    lora = None if kind == "full" else Lora(dropout=0.0)
    plain = changed(SMALL, lora=lora)
    one = recover(FAMILIES["llama-gqa"](), TEXT, HELD_OUT, plain, tmp_path / "one")
    runs = [changed(plain, gradient_checkpointing=True), changed(plain, micro_batch=2)]
    for i, training in enumerate(runs):
        seen = []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, seen=seen, **kwargs):
                seen.append(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))

        model = FAMILIES["llama-gqa"]()
        two = recover(model, TEXT, HELD_OUT, training, tmp_path / str(i), callbacks=[Watch()])
        assert seen == [training.gradient_checkpointing] * 6
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        for (name, a), b in zip(weights(one.model).items(), weights(two.model).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_half_precision_trains_in_float32(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({p.dtype for p in model.parameters() if p.requires_grad})

    for lora in (Lora(), None):
        model = FAMILIES["llama-gqa"]().to(torch.bfloat16)
        trained = recover(
            model,
            TEXT,
            HELD_OUT,
            changed(SMALL, lora=lora),
            tmp_path / str(lora is None),
            callbacks=[Watch()],
        )
        assert len(seen) == 6 and all(dtypes == {torch.float32} for dtypes in seen)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
        assert trained.held_out[1] < trained.held_out[0]
        seen.clear()


def test_a_run_begun_differently_is_refused(tmp_path):
    recover(FAMILIES["llama"](), TEXT, HELD_OUT, changed(SMALL, steps=1), tmp_path / "w")
    for model, text, training, says in (
        ("llama", TEXT, changed(SMALL, steps=1, lora=Lora(rank=4)), "rank"),
        ("llama-gqa", TEXT, changed(SMALL, steps=1), "model"),
        ("llama", TEXT + 1, changed(SMALL, steps=1), "text"),
    ):
        with pytest.raises(UsageError, match=says):
            recover(FAMILIES[model](), text, HELD_OUT, training, tmp_path / "w")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    with pytest.raises(UsageError, match="no training run"):
        recover(FAMILIES["llama"](), TEXT, HELD_OUT, SMALL, tmp_path / "mine")


def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    model = FAMILIES["llama"]()

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                next(model.parameters()).data.fill_(float("nan"))

    with pytest.raises(
        FloatingPointError, match=r"NaN or infinite at step 5; the last good checkpoint is .*checkpoint-4"
    ):
        recover(model, TEXT, HELD_OUT, SMALL, tmp_path / "w", callbacks=[Spoil()])
    assert last_checkpoint(tmp_path / "w").name == "checkpoint-4"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
            "lower micro_batch",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "lower micro_batch"),
        (OSError(28, "No space left on device"), "goes on from checkpoint-2"),
        (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), "disk is full"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(error, says, tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise error

    with pytest.raises(UsageError, match=says):
        recover(FAMILIES["llama"](), TEXT, HELD_OUT, SMALL, tmp_path / "w", callbacks=[Fail()])


def test_text_and_batches_that_do_not_fit(tmp_path, number_tokenizer):
    with pytest.raises(UsageError, match="fewer than one step of 64"):
        recover(FAMILIES["llama"](), TEXT, HELD_OUT, changed(SMALL, batch_size=64), tmp_path / "w")
    with pytest.raises(UsageError, match="multiple of 4"):
        recover(FAMILIES["llama"](), TEXT, HELD_OUT, changed(SMALL, batch_size=6), tmp_path / "w")
    with pytest.raises(UsageError, match="positions"):
        recover(FAMILIES["llama"](), token_ids(8, 200), HELD_OUT, SMALL, tmp_path / "w")
    for bad in ({"steps": 0}, {"learning_rate": 0.0}, {"lora": Lora(rank=0)}, {"length": 1}):
        with pytest.raises(UsageError):
            changed(SMALL, **bad)
    documents = [" ".join(str(i) for i in range(n)) for n in (5, 30, 40, 12)]
    train, held = training_windows(documents, number_tokenizer, length=10, held_out=0.25)
    assert len(train) + len(held) == 3 and all(row.tolist() == list(range(10)) for row in [*train, *held])
    with pytest.raises(UsageError, match="no document of more than 99 tokens"):
        training_windows(documents, number_tokenizer, length=99)
    with pytest.raises(UsageError, match="end-of-text"):
        training_windows(documents, number_tokenizer, length=10, packing=True)
    number_tokenizer.eos_token = "<s>"
    try:
        packed, _ = training_windows(documents, number_tokenizer, length=10, packing=True, held_out=0.25)
    finally:
        number_tokenizer.eos_token = None
    flat = packed.flatten().tolist()
    assert len(packed) >= 5 and 1000 in flat and flat[0] == 0
    assert all(b in (a + 1, 1000) or a == 1000 for a, b in itertools.pairwise(flat)), "nothing is lost"


# -- the commands ------------------------------------------------------------------------------------------


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
            loaded = AutoModelForCausalLM.from_pretrained(out).eval()
            assert type(loaded).__name__ == "PrunedLlamaForCausalLM"
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
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert not type(loaded).__name__.startswith("Pruned")
    units = {b.name: b.units for b in find_blocks(loaded)}
    assert units == {n: len(k["units"]) for n, k in record["kept"].items()}
    assert record["parameters"][1] == sum(p.numel() for p in loaded.parameters())
    assert "while training" in (out / "README.md").read_text()


def test_killed_for_real_and_started_again(files, tmp_path, capsys):
    more = ["--warmup-steps", 1, "--merge", "--steps", 12]
    assert call(*arguments(files, "recover", "pruned", tmp_path / "whole", *more)) == 0
    command = arguments(files, "recover", "pruned", tmp_path / "out", *more)
    process = subprocess.Popen([sys.executable, "-m", "probeprune", *command], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out.training").glob("checkpoint-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
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
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launched, "-m", "probeprune", *arguments(files, command, model, tmp_path / "two", *more, "--json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)  # one line: one process prints
    assert record["processes"] == 2
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "one/training.json").read_text()).get("kept") == record.get("kept")


@pytest.mark.parametrize(
    ("command", "more", "says"),
    [
        ("recover", ["--length", "50"], "no document of more than 50 tokens"),
        ("recover", ["--steps", "0"], "--steps must be at least 1, not 0"),
        ("recover", ["--batch-size", "6"], "multiple of 4"),
        ("recover", ["--rank", "0"], "--rank must be at least 1"),
        ("loraprune", ["--ratio", "1.2"], "outside [0, 1)"),
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
    from probeprune.data.windows import Text
    from probeprune.jobs.measure import Measure
    from probeprune.progress import silent

    loaded = load_model(str(files / "dense"), dtype="float32")
    text = Text(str(files / "test.txt"), 2, 16)
    Measure(loaded, text, silent, keep=tmp_path / "kept.json")("before", loaded.model)
    again = Measure(loaded, text, silent, keep=tmp_path / "kept.json")
    again("before", None)  # not measured: there is nothing to measure
    assert again.figures["before"] > 1
    other = Measure(loaded, Text(str(files / "test.txt"), 3, 16), silent, keep=tmp_path / "kept.json")
    assert other.figures == {}


def test_split_gradients_are_refused():
    from probeprune.training.loraprune import _adapter

    with pytest.raises(UsageError, match="not FSDP"):
        _adapter(torch.nn.Linear(2, 2), None)


def test_progress_names_the_loss(tmp_path):
    seen = []
    recover(FAMILIES["llama"](), TEXT, HELD_OUT, SMALL, tmp_path / "w", progress=lambda *a: seen.append(a))
    assert seen[-1][1:] == (6, 6) and all("loss" in what for what, _, _ in seen)
    assert processes.is_first() and processes.count() == 1
