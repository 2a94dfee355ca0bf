"""Recovery on tiny models: it learns, resumes as if never interrupted, and explains its failures."""

import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from short_training import HELD_OUT, SHORT, TEXT, KillAt, Killed
from tiny import FAMILIES, token_ids
from transformers import TrainerCallback

from probeprune import find_blocks, processes
from probeprune.data.windows import training_windows
from probeprune.errors import UsageError
from probeprune.training.checkpoints import last_checkpoint
from probeprune.training.loraprune import LoraPrune
from probeprune.training.recovery import merged, recover
from probeprune.training.settings import Lora


def weights(model):
    return {k: v.clone() for k, v in merged(model).state_dict().items()}


def test_training_helps_and_only_adapters_move(tmp_path):
    model = FAMILIES["llama-gqa"]()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    trained = recover(model, TEXT, HELD_OUT, replace(SHORT, steps=30, learning_rate=1e-2), tmp_path / "w")
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
    training = SHORT
    if kind == "full":
        training = replace(training, lora=None)
    if kind == "loraprune":
        training = replace(training, keep_best=False)
    if kind == "patience":
        training = replace(training, patience=3, evaluate_every=1, learning_rate=0.3, steps=8)

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
    plain = replace(SHORT, lora=lora)
    one = recover(FAMILIES["llama-gqa"](), TEXT, HELD_OUT, plain, tmp_path / "one")
    runs = [replace(plain, gradient_checkpointing=True), replace(plain, micro_batch=2)]
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
            replace(SHORT, lora=lora),
            tmp_path / str(lora is None),
            callbacks=[Watch()],
        )
        assert len(seen) == 6 and all(dtypes == {torch.float32} for dtypes in seen)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
        assert trained.held_out[1] < trained.held_out[0]
        seen.clear()


def test_a_run_begun_differently_is_refused(tmp_path):
    recover(FAMILIES["llama"](), TEXT, HELD_OUT, replace(SHORT, steps=1), tmp_path / "w")
    for model, text, training, says in (
        ("llama", TEXT, replace(SHORT, steps=1, lora=Lora(rank=4)), "rank"),
        ("llama-gqa", TEXT, replace(SHORT, steps=1), "model"),
        ("llama", TEXT + 1, replace(SHORT, steps=1), "text"),
    ):
        with pytest.raises(UsageError, match=says):
            recover(FAMILIES[model](), text, HELD_OUT, training, tmp_path / "w")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    with pytest.raises(UsageError, match="no training run"):
        recover(FAMILIES["llama"](), TEXT, HELD_OUT, SHORT, tmp_path / "mine")


def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    model = FAMILIES["llama"]()

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                next(model.parameters()).data.fill_(float("nan"))

    with pytest.raises(
        FloatingPointError, match=r"NaN or infinite at step 5; the last good checkpoint is .*checkpoint-4"
    ):
        recover(model, TEXT, HELD_OUT, SHORT, tmp_path / "w", callbacks=[Spoil()])
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
        recover(FAMILIES["llama"](), TEXT, HELD_OUT, SHORT, tmp_path / "w", callbacks=[Fail()])


@pytest.mark.parametrize(
    ("ids", "changes", "says"),
    [
        (TEXT, {"batch_size": 64}, "fewer than one step of 64"),
        (TEXT, {"batch_size": 6}, "multiple of 4"),
        (token_ids(8, 200), {}, "positions"),
    ],
)
def test_text_and_batches_that_do_not_fit(ids, changes, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        recover(FAMILIES["llama"](), ids, HELD_OUT, replace(SHORT, **changes), tmp_path / "w")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps must be a whole number of steps from 1 to 10000000, not 0"),
        ({"learning_rate": 0.0}, r"learning_rate must be a number in \(0, 1\], not 0.0"),
        ({"warmup_steps": 7}, "warmup_steps 7 is more than the 6 steps"),
        ({"length": 1}, "length must be a whole number of tokens from 2 to 16777216, not 1"),
    ],
)
def test_impossible_settings(changes, says):
    with pytest.raises(UsageError, match=says):
        replace(SHORT, **changes)


def test_training_windows_are_beginnings_of_documents_or_packed_without_loss(number_tokenizer):
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


def test_progress_names_the_loss(tmp_path):
    seen = []
    recover(FAMILIES["llama"](), TEXT, HELD_OUT, SHORT, tmp_path / "w", progress=lambda *a: seen.append(a))
    assert seen[-1][1:] == (6, 6) and all("loss" in what for what, _, _ in seen)
    assert processes.is_first() and processes.count() == 1
