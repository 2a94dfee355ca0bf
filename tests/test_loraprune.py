"""LoRAPrune on tiny models: the published formulas, masks that only grow, a cut that equals the mask."""

import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from peft import get_peft_model
from short_training import HELD_OUT, SHORT, TEXT
from tiny import FAMILIES, masked
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from probeprune import find_blocks
from probeprune.errors import UsageError
from probeprune.surgery import cut
from probeprune.training.loraprune import (
    LoraPrune,
    LoraPruneCut,
    lora_layer,
    lora_salience,
    loraprune,
    schedule,
)
from probeprune.training.recovery import lora_config, merged, recover
from probeprune.training.settings import Lora


def test_schedule_values():
    # r(t) = r_f + (r_0 - r_f) (1 - p)^3 with r_0 = 0, over r_f; a tenth of the steps flat on both sides.
    assert [schedule(t) for t in (0.0, 0.05, 0.1)] == [0, 0, 0]
    assert schedule(0.5) == pytest.approx(1 - 0.5**3)
    assert schedule(0.3) == pytest.approx(1 - 0.75**3)
    assert [schedule(t) for t in (0.9, 0.95, 1.0)] == [pytest.approx(1)] * 3
    rising = [schedule(t / 100) for t in range(101)]
    assert rising == sorted(rising)


GPT2 = tiny.lively(lambda: GPT2LMHeadModel(GPT2Config(n_embd=48, n_head=6, n_layer=2, vocab_size=128)))
"""Its weights are stored as (in, out)."""


@pytest.mark.parametrize("build", [FAMILIES["llama-gqa"], FAMILIES["opt"], GPT2])
def test_lora_salience_is_the_explicit_formula(build):
    model = build()
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
            whole = m.weight.double() + 2 * b.double() @ a.double()
            expected = (gradient * whole).abs().sum(1 - m.axis)
            torch.testing.assert_close(lora_salience(m, layer).double(), expected, rtol=1e-4, atol=1e-9)


def test_scores_are_a_moving_average_of_normalised_sums_and_a_nan_step_is_skipped(tmp_path):
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
        replace(SHORT, steps=4, clip=1e9, keep_best=False),
        tmp_path / "w",
        callbacks=[Watch(), pruner, Mend()],
    )
    assert pruner.skipped == 1
    expected = torch.zeros(100)
    for step in (0, 1, 3):
        expected = 0.9 * expected + 0.1 * seen[step]
    torch.testing.assert_close(pruner.scores[blocks[1].name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "opt", "phi3", "gpt-neox"])
def test_loraprune_masks_grow_on_schedule_and_the_cut_model_is_the_masked_one(family, tmp_path):
    model = FAMILIES[family]()
    blocks = find_blocks(model)
    history, outputs = [], {}
    training = replace(SHORT, steps=10, keep_best=False, evaluate_every=5)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            history.append({n: m.clone() for n, m in pruner.masked.items()})
            if state.global_step == 10:
                model.eval()
                with torch.no_grad():
                    outputs["masked"] = model(input_ids=TEXT[:4]).logits
                model.train()

    block_widths = [b.units if b.layer < 1 else max(b.units // 2, 1) for b in blocks]
    pruner = LoraPrune(blocks, block_widths, every=2)
    trained = recover(model, TEXT, HELD_OUT, training, tmp_path / "w", callbacks=[pruner, Watch()])
    for before, after in itertools.pairwise(history):
        assert all((after[n] | ~before[n]).all() for n in before), "masks only grow"
    counts = [sum(int(m.sum()) for m in masks.values()) for masks in history]
    assert counts[0] == 0 and counts[-1] == sum(
        b.units - k for b, k in zip(blocks, block_widths, strict=True)
    )
    assert 0 < counts[5] < counts[-1]
    # Merged and cut, the model computes what the masked model with its adapters does, to rounding.
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
    assert [b.units for b in find_blocks(smaller)] == block_widths


def test_loraprune_reaches_the_ratio_and_spares_the_first_layers(tmp_path):
    model = FAMILIES["gemma3"]()  # 6 layers: a tenth is none
    blocks = find_blocks(model)
    total = sum(b.parameters for b in blocks)
    training = replace(SHORT, keep_best=False)
    smaller, trained, kept = loraprune(
        model, TEXT, HELD_OUT, LoraPruneCut(0.3, skip_layers=2), training, tmp_path / "w"
    )
    assert 1 - sum(b.parameters for b in find_blocks(smaller)) / total == pytest.approx(0.3, abs=0.01)
    assert trained.steps == 6 and not any("layers.0" in n or "layers.1" in n for n in kept)
    with pytest.raises(UsageError, match="keep_best=False"):
        loraprune(FAMILIES["llama"](), TEXT, HELD_OUT, LoraPruneCut(0.3), SHORT, tmp_path / "x")


def test_split_gradients_are_refused():
    with pytest.raises(UsageError, match="not FSDP"):
        lora_layer(torch.nn.Linear(2, 2), None)
