"""LoRAPrune: prune while LoRA trains, guided by its gradients (Zhang et al., ACL 2024).

A Trainer callback on public hooks. After every backward pass it estimates the gradient of the frozen weights
from LoRA's gradients. It masks the least important units, more of them on a cubic schedule, and the masked
units are cut at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.methods import Method, compose, for_layout
from probeprune.model.blocks import Block, Member, find_layers
from probeprune.model.described import Layout
from probeprune.plan import parts_of, widths
from probeprune.progress import Progress, silent
from probeprune.ranges import check_fields
from probeprune.strategies.importance import sum_of_shares
from probeprune.surgery import cut as cut_units
from probeprune.training.recovery import Trained, merged, recover
from probeprune.training.settings import Training
from probeprune.training.trainer import saved_attributes


def schedule(progress: float, ramp: float = 0.1) -> float:
    """Share of the final cut that is masked at a point of the training: LoRAPrune's cubic schedule.

    `1 - (1 - p)^3`, where p rises from 0 to 1 between a warm-up and a cool-down.

    Args:
        progress: share of the steps that are done.
        ramp: share of the steps in the warm-up, and again in the cool-down.
    """
    p = min(max((progress - ramp) / (1 - 2 * ramp), 0.0), 1.0)
    return 1 - (1 - p) ** 3


def lora_salience(member: Member, adapter: Any, name: str = "default") -> torch.Tensor:
    """`sum |(dB A + B dA - dB dA) * (W + s B A)|` over each row or column of the member's linear map.

    LoRAPrune, equations 7 and 8: the gradient of the frozen weight W is estimated from LoRA's gradients.

    Args:
        member: a part of the frozen linear map; its axis says whether rows or columns belong to units.
        adapter: PEFT's LoRA layer around the map, with gradients.
        name: the adapter's name in that layer.

    Returns:
        Float32 tensor, one value per row or column of the whole map.
    """
    a, b = adapter.lora_A[name].weight, adapter.lora_B[name].weight
    assert a.grad is not None and b.grad is not None
    da, db = a.grad.float(), b.grad.float()
    a, b = a.detach().float(), b.detach().float()
    # dB A + (B - dB) dA, one product.
    gradient = torch.cat([db, b - db], 1) @ torch.cat([a, da], 0)
    weight = member.weight.float() + adapter.scaling[name] * (b @ a)
    return gradient.mul_(weight).abs_().sum(1 - member.axis)


class LoraPrune(TrainerCallback, ExportableState):
    """Masks units while LoRA trains.

    Masking zeroes a unit's channels of the coupled activation z, so q, k and v (gate and up) go together.

    Args:
        blocks: the blocks of the model before PEFT wraps it.
        block_widths: units that each block keeps at the end.
        every: steps between two updates of the masks.
        decay: decay of the moving average of saliences.
        ramp: share of the steps without pruning at the start, and at the full ratio at the end.

    Attributes:
        scores: moving average of saliences by block name, float32 (units,).
        masked: masked units by block name, BoolTensor (units,).
        skipped: steps left out of the average because a gradient was not finite.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        block_widths: Sequence[int],
        *,
        every: int = 10,
        decay: float = 0.9,
        ramp: float = 0.1,
    ) -> None:
        self.blocks = [(b, width) for b, width in zip(blocks, block_widths, strict=True) if width < b.units]
        self.every, self.decay, self.ramp = every, decay, ramp
        self.scores = {
            b.name: torch.zeros(b.units, dtype=torch.float32, device="cpu") for b, _ in self.blocks
        }
        self.masked = {b.name: torch.zeros(b.units, dtype=torch.bool, device="cpu") for b, _ in self.blocks}
        self.skipped = 0
        self._channels: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def kept(self) -> dict[str, torch.Tensor]:
        """Ids of the units that are not masked, by block name; LongTensors."""
        return {name: (~masked).nonzero().flatten() for name, masked in self.masked.items()}

    # -- the Trainer's events ------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if saved := saved_attributes(self, state):
            self.scores = {
                n: torch.tensor(s, dtype=torch.float32, device="cpu") for n, s in saved["scores"].items()
            }
            self.masked = {
                n: torch.tensor(m, dtype=torch.bool, device="cpu") for n, m in saved["masked"].items()
            }
            self.skipped = saved["skipped"]
        for block, _ in self.blocks:
            consumer = lora_layer(model, block.members[-1])
            self._channels[block.name] = self._channel_mask(block)
            self._hooks.append(consumer.register_forward_pre_hook(self._mask_channels(block.name)))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._update_scores(model)
        last = state.global_step == state.max_steps - 1
        if last or state.global_step % self.every == 0:
            self._update_masks(1.0 if last else schedule(state.global_step / state.max_steps, self.ramp))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks that mask. Needed after a training run that failed; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state(self) -> dict[str, Any]:
        """The attributes that a checkpoint stores, as JSON values."""
        return {
            "args": {},
            "attributes": {
                "scores": {n: s.tolist() for n, s in self.scores.items()},
                "masked": {n: m.tolist() for n, m in self.masked.items()},
                "skipped": self.skipped,
            },
        }

    # -- scores and masks ----------------------------------------------------------------------

    @torch.no_grad()
    def _update_scores(self, model: Any) -> None:
        """Add the saliences of this step to the moving averages, unless one is not finite."""
        saliences = {}
        for block, _ in self.blocks:
            parts = []
            for m in block.members:
                values = m.part(lora_salience(m, lora_layer(model, m)), block.units)
                parts.append(values.view(block.units, m.width).sum(1))
            saliences[block.name] = sum_of_shares(parts)
        # One copy to the CPU for all blocks: on CUDA each copy would wait for the device.
        joined = torch.cat([s.flatten() for s in saliences.values()]).cpu()
        if not torch.isfinite(joined).all():
            self.skipped += 1  # a single NaN would stay in the average
            return
        split = joined.split([len(s) for s in saliences.values()])
        for name, values in zip(saliences, split, strict=True):
            self.scores[name] = self.decay * self.scores[name] + (1 - self.decay) * values

    def _update_masks(self, share: float) -> None:
        """Mask the lowest scores until `share` of the final cut is masked."""
        for block, width in self.blocks:
            count = int(share * (block.units - width) + 1e-9)
            masked = self.masked[block.name]
            # Units that are masked already come first: masks only grow.
            order = self.scores[block.name].masked_fill(masked, -torch.inf).argsort(stable=True)
            masked[order[: max(count, int(masked.sum()))]] = True
            self._channels[block.name] = self._channel_mask(block)

    def _channel_mask(self, block: Block) -> torch.Tensor:
        """1 for the channels of units that stay, 0 for those of masked units."""
        shown = ~self.masked[block.name]
        return shown.repeat_interleave(block.unit_width).to(block.consumer.weight)

    def _mask_channels(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (args[0] * self._channels[name].to(args[0].dtype), *args[1:])

        return hook


def lora_layer(model: Any, member: Member) -> Any:
    """PEFT's LoRA layer around the linear map of a member; `model` is the one that the Trainer trains.

    Raises `UsageError` for a model whose weights are split over processes.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not isinstance(inner, PeftModel):
        raise UsageError(
            f"LoRAPrune needs whole gradients in every process, and {type(inner).__name__} splits them: use "
            "data parallel processes (torchrun alone), not FSDP or DeepSpeed."
        )
    return inner.get_base_model().get_submodule(member.name)


@dataclass(frozen=True)
class LoraPruneCut:
    """The cut that LoRAPrune makes. Raises `UsageError` for values out of range.

    Attributes:
        ratio: share of the parameters of all blocks to remove.
        layout: `per-layer`: widths that reach the ratio layer by layer; under other layouts, all layers have
            the widths or heads in common that the layout needs.
        skip_layers: first layers that are trained but not pruned, under `per-layer` only; None for the first
            tenth, as published.
        round_to: MLP widths are multiples of this.
    """

    ratio: float
    layout: Layout = "per-layer"
    skip_layers: int | None = None
    round_to: int = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def method(self, model: PreTrainedModel) -> Method:
        """The cut of that model as a method that prunes once."""
        first_tenth = len(find_layers(model)) // 10
        skip_layers = first_tenth if self.skip_layers is None else self.skip_layers
        method = compose(
            "loraprune",
            name="loraprune",
            allocation="uniform",
            skip_layers=skip_layers if self.layout == "per-layer" else 0,
            round_to=self.round_to,
        )
        return for_layout(method, self.layout)


def loraprune(
    model: PreTrainedModel,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    cut: LoraPruneCut,
    training: Training,
    work: Path,
    *,
    progress: Progress = silent,
) -> tuple[PreTrainedModel, Trained, dict[str, torch.Tensor]]:
    """Prune `model` while LoRA trains it; at the end cut the masked units and merge the adapters.

    Published: `Training(steps=300, batch_size=128, length=512, warmup_steps=0, keep_best=False)`. See
    `recover` for the other arguments, for several processes, and for resuming.

    Returns:
        The smaller model, the record of the training, and the ids of the units that each pruned block kept.

    Raises:
        UsageError: training without LoRA, or with `keep_best` (an earlier checkpoint has other masks); any
            error of `recover` or of the allocation.
    """
    if training.lora is None or training.keep_best:
        raise UsageError(
            "LoRAPrune needs LoRA's gradients up to the last step: give lora and keep_best=False."
        )
    method = cut.method(model)
    parts = parts_of(model, method)
    planned = zip(parts, widths(method, cut.ratio, parts, [], Statistics()), strict=True)
    linear = [(b, k) for b, k in planned if isinstance(b, Block)]  # experts stay whole
    pruner = LoraPrune([b for b, _ in linear], [k for _, k in linear])
    try:
        trained = recover(model, windows, held_out, training, work, callbacks=[pruner], progress=progress)
    finally:
        pruner.remove()
    kept = pruner.kept()
    smaller = merged(trained.model)
    cut_units(smaller, kept)
    return smaller, trained, kept
