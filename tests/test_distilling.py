"""Distillation of tiny models: the loss by parts, what is trained, what is refused, and resuming."""

import warnings
from dataclasses import replace

import pytest
import torch
from short_training import HELD_OUT, SHORT, TEXT, KillAt, Killed
from tiny import FAMILIES, token_ids
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from probeprune import compose, find_blocks, prune
from probeprune.algebra.divergence import divergence, target
from probeprune.errors import Notice, UsageError
from probeprune.training import losses
from probeprune.training.checkpoints import last_checkpoint
from probeprune.training.distilling import DistillLoss
from probeprune.training.losses import training_loss
from probeprune.training.recovery import merged, recover
from probeprune.training.settings import Distillation, Lora

IDS = token_ids(3, 17)
DISTILL = replace(SHORT, distillation=Distillation())


def pruned(family="llama-gqa"):
    model = FAMILIES[family]()
    prune(model, compose("random", skip_layers=1), 0.3)
    return model


def small(**changes):
    shape = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**{**shape, "vocab_size": 128, **changes})).eval()


@pytest.mark.parametrize("tokens", [1, 7, 1000])
@pytest.mark.parametrize(
    "settings",
    [
        Distillation(),
        Distillation("reverse", 2.0),
        Distillation("mixed", 0.5, 5),
        Distillation("forward", top_k=9),
        Distillation("forward", top_k=5000),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_all_logits_at_once(settings, tokens, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", 128 * tokens)
    teacher = FAMILIES["gemma2"]()  # its logits have a soft cap
    one, two = pruned("gemma2"), pruned("gemma2")
    with training_loss(one, DistillLoss(teacher, settings)):
        got = one(input_ids=IDS, labels=IDS).loss
        got.backward()
    goal = target(teacher(IDS).logits[:, :-1].flatten(0, 1).detach(), settings.temperature, settings.top_k)
    logits = two(IDS).logits[:, :-1].flatten(0, 1)
    want = divergence(logits, goal, settings.direction, settings.temperature).mean()
    want.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    scale = max(p.grad.abs().max() for p in two.parameters())
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * scale, name
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("kind", ["lora", "all", "consumers"])
def test_training_brings_the_model_closer_to_its_teacher(kind, tmp_path):
    teacher, model = FAMILIES["llama-bias"](), pruned("llama-bias")
    dense = {k: v.clone() for k, v in teacher.state_dict().items()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lora = Lora(rank=8, dropout=0.0) if kind == "lora" else None
    weights = "consumers" if kind == "consumers" else "all"
    rate = {"lora": 1e-2, "all": 1e-3, "consumers": 3e-3}[kind]
    training = replace(DISTILL, lora=lora, weights=weights, steps=20, learning_rate=rate)
    trained = recover(model, TEXT, HELD_OUT, training, tmp_path / "w", teacher=teacher)
    assert trained.held_out[1] < 0.95 * trained.held_out[0]
    logs = target(teacher(HELD_OUT).logits[:, :-1].flatten(0, 1))
    with torch.no_grad():
        now = divergence(trained.model(input_ids=HELD_OUT).logits[:, :-1].flatten(0, 1), logs).mean()
    assert float(now) == pytest.approx(trained.held_out[1], rel=1e-4)
    assert all(v.equal(teacher.state_dict()[k]) for k, v in dense.items()) and not teacher.training
    if kind != "lora":
        changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
        names = [b.members[-1].name for b in find_blocks(model)]
        consumers = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
        assert changed == consumers if kind == "consumers" else changed > consumers
    assert not any(p.requires_grad for p in model.parameters() if p.ndim > 1) or kind == "lora"


def test_consumers_of_a_model_in_half_precision_train_in_float32(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({p.dtype for p in model.parameters() if p.requires_grad})
            seen.append({p.dtype for p in model.parameters() if not p.requires_grad})

    model, teacher = pruned().to(torch.bfloat16), FAMILIES["llama-gqa"]().to(torch.bfloat16)
    training = replace(DISTILL, lora=None, weights="consumers")
    trained = recover(model, TEXT, HELD_OUT, training, tmp_path / "w", teacher=teacher, callbacks=[Watch()])
    assert seen == [{torch.float32}, {torch.bfloat16}] * 6
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert trained.held_out[1] < trained.held_out[0]


@pytest.mark.parametrize("kind", ["lora", "consumers"])
def test_resumed_is_the_same_as_unbroken(kind, tmp_path):
    training = DISTILL if kind == "lora" else replace(DISTILL, lora=None, weights="consumers")

    def go(work, *kill):
        return recover(
            pruned(), TEXT, HELD_OUT, training, work, teacher=FAMILIES["llama-gqa"](), callbacks=kill
        )

    whole = go(tmp_path / "whole")
    with pytest.raises(Killed):
        go(tmp_path / "broken", KillAt(3))
    resumed = go(tmp_path / "broken")
    assert (resumed.steps, resumed.best_step, resumed.history) == (
        whole.steps,
        whole.best_step,
        whole.history,
    )
    two = merged(resumed.model).state_dict()
    assert all(v.equal(two[k]) for k, v in merged(whole.model).state_dict().items())


def test_a_run_with_another_teacher_or_loss_is_refused(tmp_path):
    teacher = FAMILIES["llama-gqa"]()
    training = replace(DISTILL, steps=1, warmup_steps=0)
    recover(pruned(), TEXT, HELD_OUT, training, tmp_path / "w", teacher=teacher)
    with torch.no_grad():
        teacher.lm_head.weight[0, 0] += 1
    with pytest.raises(UsageError, match=r"begun differently \(teacher\)"):
        recover(pruned(), TEXT, HELD_OUT, training, tmp_path / "w", teacher=teacher)
    with pytest.raises(UsageError, match=r"begun differently \(teacher; distillation was"):
        recover(pruned(), TEXT, HELD_OUT, replace(training, distillation=None), tmp_path / "w")


def test_a_loss_that_becomes_nan_names_the_step_and_the_last_good_state(tmp_path):
    teacher = FAMILIES["llama-gqa"]()

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                teacher.lm_head.weight.data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match=r"at step 5; the last good checkpoint is .*checkpoint-4"):
        recover(pruned(), TEXT, HELD_OUT, DISTILL, tmp_path / "w", teacher=teacher, callbacks=[Spoil()])
    assert last_checkpoint(tmp_path / "w").name == "checkpoint-4"


def test_what_does_not_fit_is_refused_before_any_work(tmp_path):
    model = pruned()

    def go(says, training=DISTILL, **more):
        with pytest.raises(UsageError, match=says):
            recover(model, TEXT, HELD_OUT, training, tmp_path / "w", **more)

    go("distillation needs a teacher")
    go("distillation needs settings", SHORT, teacher=FAMILIES["llama-gqa"]())
    go("vocabulary has 100 tokens and the model's 128", teacher=small(vocab_size=100))
    go("open the dense model a second time", teacher=model)
    go("call model.eval", teacher=FAMILIES["llama-gqa"]().train())
    go("8 positions", teacher=small(max_position_embeddings=8))
    go("fewer than one step of 64", replace(DISTILL, batch_size=64), teacher=FAMILIES["llama-gqa"]())
    assert not (tmp_path / "w").exists()
    for changes, says in (
        ({"direction": "sideways"}, "unknown direction 'sideways'"),
        ({"temperature": 0.0}, r"temperature must be a number in \(0, 1000\], not 0.0"),
        ({"top_k": 0}, "top_k must be a whole number of tokens from 1"),
    ):
        with pytest.raises(UsageError, match=says):
            Distillation(**changes)
    with pytest.raises(UsageError, match="give lora=None"):
        replace(SHORT, weights="consumers")
    with pytest.raises(UsageError, match="unknown weights 'some'"):
        replace(SHORT, lora=None, weights="some")


@pytest.mark.parametrize(
    ("model", "teacher", "says"),
    [
        (small, FAMILIES["llama-gqa"], "hidden size 16, and 48"),
        (FAMILIES["gpt-neox"], FAMILIES["llama-gqa"], "GPT-NeoX, Pythia, and LLaMA"),
        (FAMILIES["mistral"], FAMILIES["llama-gqa"], None),  # how a LLaMA with fewer heads is saved
        (pruned, FAMILIES["llama-gqa"], None),
    ],
)
def test_a_model_that_is_no_cut_of_its_teacher_is_said(model, teacher, says, tmp_path):
    training = replace(DISTILL, steps=1, warmup_steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Notice)
        recover(model(), TEXT, HELD_OUT, training, tmp_path / "w", teacher=teacher())
    found = [str(w.message) for w in caught if issubclass(w.category, Notice)]
    assert len(found) == (says is not None) and all(says in sentence for sentence in found)
