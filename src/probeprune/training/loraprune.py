"""LoRAPrune: prune while LoRA trains, guided by its gradients (Zhang et al., ACL 2024).

A Trainer callback on public hooks. After every backward pass the frozen weights' gradient is estimated from
LoRA's own; units that stay unimportant are masked, more of them on a cubic schedule; at the end they are cut.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.methods import Method, compose
from probeprune.model.blocks import Block, Member, find_blocks, find_layers
from probeprune.plan import widths
from probeprune.progress import Progress, silent
from probeprune.strategies.importance import sum_of_shares
from probeprune.surgery import cut
from probeprune.training.recovery import Trained, merged, recover
from probeprune.training.settings import Training
from probeprune.training.trainer import remembered


def schedule(progress: float, ramp: float = 0.1) -> float:
    """The share of the final cut that is masked after this share of the steps: LoRAPrune's cubic schedule.

    `1 - (1 - p)^3`, p running from 0 to 1 between a warm-up and a cool-down of `ramp` of all steps each.
    """
    p = min(max((progress - ramp) / (1 - 2 * ramp), 0.0), 1.0)
    return 1 - (1 - p) ** 3


def lora_salience(member: Member, adapter: Any, name: str = "default") -> torch.Tensor:
    """`sum |(dB A + B dA - dB dA) * (W + s B A)|` over each row or column that belongs to the member.

    LoRAPrune, equations 7 and 8: the frozen weight's gradient estimated from LoRA's.

    Args:
        member: the frozen linear map's part.
        adapter: PEFT's LoRA layer around it, gradients in place.
        name: of the adapter.
    """
    a, b = adapter.lora_A[name].weight, adapter.lora_B[name].weight
    assert a.grad is not None and b.grad is not None
    da, db = a.grad.float(), b.grad.float()
    a, b = a.detach().float(), b.detach().float()
    # dB A + (B - dB) dA, one product.
    gradient = torch.cat([db, b - db], 1) @ torch.cat([a, da], 0)
    weight = member.linear.weight.detach().float() + adapter.scaling[name] * (b @ a)
    return gradient.mul_(weight).abs_().sum(1 - member.axis)


class LoraPrune(TrainerCallback, ExportableState):
    """Masks units while LoRA trains.

    A masked unit's channels of the coupled activation are zero, so q, k and v (gate and up) go together.

    Args:
        blocks: of the model before PEFT wraps it.
        keep: units each block keeps in the end.
        every: steps between two mask updates.
        decay: of the moving average of sensitivities.
        ramp: share of the steps without pruning at the start, and at the full ratio at the end.

    Attributes:
        scores: by block name, the moving average (units,), float32.
        masked: by block name, BoolTensor (units,).
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        keep: Sequence[int],
        *,
        every: int = 10,
        decay: float = 0.9,
        ramp: float = 0.1,
    ) -> None:
        self.blocks = [(b, k) for b, k in zip(blocks, keep, strict=True) if k < b.units]
        self.every, self.decay, self.ramp = every, decay, ramp
        self.scores = {b.name: torch.zeros(b.units) for b, _ in self.blocks}
        self.masked = {b.name: torch.zeros(b.units, dtype=torch.bool) for b, _ in self.blocks}
        self.left_out = 0
        """Steps left out of the average for a gradient that was not finite."""
        self._channels: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def kept(self) -> dict[str, torch.Tensor]:
        """Ids of the units that are not masked, by block name."""
        return {name: (~masked).nonzero().flatten() for name, masked in self.masked.items()}

    # -- the Trainer's events ------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if found := remembered(self, state):
            self.scores = {n: torch.tensor(s) for n, s in found["scores"].items()}
            self.masked = {n: torch.tensor(m, dtype=torch.bool) for n, m in found["masked"].items()}
            self.left_out = found["left_out"]
        for block, _ in self.blocks:
            consumer = _adapter(model, block.members[-1])
            self._channels[block.name] = self._mask_of(block)
            self._hooks.append(consumer.register_forward_pre_hook(self._hide(block.name)))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._observe(model)
        last = state.global_step == state.max_steps - 1
        if last or state.global_step % self.every == 0:
            self._mask(1.0 if last else schedule(state.global_step / state.max_steps, self.ramp))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Hide nothing any more. Harmless when called twice; for training that was broken off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "args": {},
            "attributes": {
                "scores": {n: s.tolist() for n, s in self.scores.items()},
                "masked": {n: m.tolist() for n, m in self.masked.items()},
                "left_out": self.left_out,
            },
        }

    # -- scores and masks ----------------------------------------------------------------------

    @torch.no_grad()
    def _observe(self, model: Any) -> None:
        fresh = {}
        for block, _ in self.blocks:
            parts = []
            for m in block.members:
                values = m.part(lora_salience(m, _adapter(model, m)), block.units)
                parts.append(values.view(block.units, m.width).sum(1))
            fresh[block.name] = sum_of_shares(parts)
        # One copy to the CPU for all blocks: on CUDA each would wait for the device.
        at_once = torch.cat([s.flatten() for s in fresh.values()]).cpu()
        if not torch.isfinite(at_once).all():
            self.left_out += 1  # one bad step would spoil the average for good
            return
        split = at_once.split([len(s) for s in fresh.values()])
        for name, values in zip(fresh, split, strict=True):
            self.scores[name] = self.decay * self.scores[name] + (1 - self.decay) * values

    def _mask(self, share: float) -> None:
        for block, keep in self.blocks:
            count = int(share * (block.units - keep) + 1e-9)
            masked = self.masked[block.name]
            # Those masked already come first: masks only grow.
            order = self.scores[block.name].masked_fill(masked, -torch.inf).argsort(stable=True)
            masked[order[: max(count, int(masked.sum()))]] = True
            self._channels[block.name] = self._mask_of(block)

    def _mask_of(self, block: Block) -> torch.Tensor:
        kept = ~self.masked[block.name]
        return kept.repeat_interleave(block.unit_width).to(block.consumer.weight)

    def _hide(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (args[0] * self._channels[name].to(args[0].dtype), *args[1:])

        return hook


def _adapter(model: Any, member: Member) -> Any:
    """PEFT's LoRA layer around a member's linear map."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not isinstance(inner, PeftModel):
        raise UsageError(
            f"LoRAPrune needs whole gradients in every process, and {type(inner).__name__} splits them: use "
            "data parallel processes (torchrun alone), not FSDP or DeepSpeed."
        )
    return inner.get_base_model().get_submodule(member.name)


def loraprune_method(
    model: PreTrainedModel,
    allocation: Literal["uniform", "even"] = "uniform",
    skip_layers: int | None = None,
    round_to: int = 1,
) -> Method:
    """LoRAPrune's cut as a method: `loraprune` has the arguments."""
    first_tenth = len(find_layers(model)) // 10
    return compose(
        "loraprune",
        name="loraprune",
        allocation=allocation,
        skip_layers=0 if allocation == "even" else first_tenth if skip_layers is None else skip_layers,
        round_to=round_to,
    )


def loraprune(
    model: PreTrainedModel,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    ratio: float,
    training: Training,
    work: Path,
    *,
    skip_layers: int | None = None,
    round_to: int = 1,
    allocation: Literal["uniform", "even"] = "uniform",
    progress: Progress = silent,
) -> tuple[PreTrainedModel, Trained, dict[str, torch.Tensor]]:
    """Prune `model` while LoRA trains it; cut and merged at the end.

    Published: `Training(steps=300, batch_size=128, length=512, warmup_steps=0, keep_best=False)`. See
    `recover` for the arguments it shares, for processes, and for going on after a kill.

    Args:
        ratio: share of the parameters of all blocks to remove.
        skip_layers: first layers that are trained but not pruned; None for the first tenth, as published.
        round_to, allocation: as in `Method`.

    Returns:
        The smaller model, what the training gave, and the ids each block kept.

    Raises:
        UsageError: training without LoRA, or with `keep_best` (an earlier checkpoint has other masks); and
            what `recover` and the allocation raise.
    """
    if training.lora is None or training.keep_best:
        raise UsageError(
            "LoRAPrune is guided by LoRA's gradients to its last step: lora and keep_best=False."
        )
    blocks = find_blocks(model)
    method = loraprune_method(model, allocation, skip_layers, round_to)
    pruner = LoraPrune(blocks, widths(method, ratio, blocks, [], Statistics()))
    try:
        trained = recover(model, windows, held_out, training, work, callbacks=[pruner], progress=progress)
    finally:
        pruner.remove()
    kept = pruner.kept()
    smaller = merged(trained.model)
    cut(smaller, kept)
    return smaller, trained, kept
