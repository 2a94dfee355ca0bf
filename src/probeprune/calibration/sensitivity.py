"""Sensitivity: the effect of an error in a block's output on the model's next-token distribution.

To second order, an error `e` in one token's output costs `e' F e / 2` nats of KL divergence from the model's
own prediction. `F` is the Fisher information `E[g g']`, where `g` is the gradient of the log-likelihood of
labels drawn from the model. Takes one backward pass per window; the text itself is never used as a label.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probeprune.algebra.precision import exact
from probeprune.calibration.backward import backward_by_layer, backward_bytes
from probeprune.calibration.routing import uncalled_experts
from probeprune.calibration.stored import TENSORS
from probeprune.calibration.unfinished import Unfinished, resumed
from probeprune.model.blocks import Block, find_blocks, uncalled_consumer
from probeprune.model.decoding import HEAD_TOKENS
from probeprune.model.experts import Stack, find_stacks
from probeprune.model.forwards import temporary_hooks
from probeprune.model.identity import content_file
from probeprune.model.passes import check_eval, token_windows
from probeprune.processes import shares
from probeprune.progress import Progress, silent

_FORMAT = 1
FLOOR = 0.1
"""Least weight of a direction, as a share of the mean direction's: few windows do not show all directions."""


@exact()
def sensitivities(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """The Fisher information of every block's output, averaged over tokens; of experts, of what those of a
    layer add together.

    Memory: d^2 float32 numbers per block and stack of experts, and the activations of one window. A token's
    gradient is that of the whole window's log-likelihood, so its effect on later tokens counts too.
    Interactions between the errors of different tokens are ignored.

    Args:
        model: a supported causal LM in eval mode, with nothing attached. Its weights get no gradients.
        windows: LongTensor (count, length) of token ids.
        seed: for drawing the labels.
        cache: a folder to store results in, by content; None stores nothing.
        progress: called with (`sensitivities`, windows done, windows in all).

    Returns:
        By the name of a block or stack `F + FLOOR mean(diag F) I` (d, d), float32.

    Raises:
        UsageError: unsupported model, windows too long.
        FloatingPointError: a NaN or infinite gradient (float16 overflows easily).
    """
    windows = token_windows(model, windows)
    check_eval(model, "sensitivities need")
    of_experts = ["experts"] if find_stacks(model) else []
    path = content_file(cache, model, windows, "sensitivities", _FORMAT, seed, *of_experts)
    return resumed(
        path,
        TENSORS,
        model,
        lambda kept: _measure(model, windows, seed, progress, kept),
        states=backward_bytes(model, windows),
    )


def _measure(
    model: nn.Module, windows: torch.Tensor, seed: int, progress: Progress, kept: Unfinished
) -> dict[str, torch.Tensor]:
    blocks: list[Block | Stack] = [*find_blocks(model), *find_stacks(model)]
    generator = torch.Generator("cpu").manual_seed(seed)
    passed_over = shares.own(len(windows)).start

    def loss(window: int, first: int, logits: torch.Tensor) -> torch.Tensor:
        """That of labels drawn from the model's prediction."""
        nonlocal passed_over
        for _ in range(passed_over):  # those of other processes: a window has the same labels in all
            for tokens in torch.arange(windows.shape[1]).split(HEAD_TOKENS):
                torch.rand(len(tokens), logits.shape[1], generator=generator, device="cpu")
        passed_over = 0
        # The Gumbel trick lets one generator on the CPU draw for every device.
        uniform = (
            torch.rand(logits.shape, generator=generator, dtype=torch.float32, device="cpu")
            .clamp_(1e-20)
            .to(logits.device)
        )
        labels = (logits.detach() - (-uniform.log()).log()).argmax(-1)
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    @contextmanager
    def visit(layer: int) -> Iterator[Callable[[int], None]]:
        here = [b for b in blocks if b.layer == layer]
        total: dict[str, torch.Tensor] = {}
        with _outputs(here) as outputs:

            def add(window: int) -> None:
                for block in here:
                    if block.name not in outputs:
                        if isinstance(block, Stack):
                            raise uncalled_experts(block)
                        raise uncalled_consumer(block)
                    gradient = outputs.pop(block.name).grad
                    assert gradient is not None
                    if isinstance(block, Stack) and block.record.scales_input:  # once for each expert, equal
                        gradient = gradient.view(block.experts, -1, block.hidden_size)[0]
                    share = _second_moment(gradient, block.name, window) / len(windows)
                    total[block.name] = total[block.name] + share if block.name in total else share

            yield add
        for b in here:
            d, device = b.hidden_size, b.device if isinstance(b, Stack) else b.consumer.weight.device
            if b.name not in total:  # this process has no window
                total[b.name] = torch.zeros(d, d, dtype=torch.float32, device=device)
            shares.add_up(total[b.name])
            diagonal = total[b.name].diagonal()
            diagonal += FLOOR * diagonal.mean()
        kept.results |= total

    backward_by_layer(model, windows, loss, visit, "sensitivities", progress, kept=kept)
    return {b.name: kept.results[b.name] for b in blocks}


def _second_moment(gradient: torch.Tensor, name: str, window: int) -> torch.Tensor:
    """`E[g g']` over the tokens of one window: (d, d)."""
    g = gradient.flatten(0, -2).float()
    if not torch.isfinite(g).all():
        raise FloatingPointError(
            f"the gradient of {name} is NaN or infinite at calibration window {window}; use float32 or "
            "bfloat16."
        )
    return g.T @ g / len(g)


@contextmanager
def _outputs(blocks: Sequence[Block | Stack]) -> Iterator[dict[str, torch.Tensor]]:
    """The outputs of these blocks' consumers, or of the module of experts, by name, each with its gradient
    after a backward pass."""
    outputs: dict[str, torch.Tensor] = {}

    def keep_gradient(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
                outputs[name] = output

        return hook

    modules = ((b.name, b.module if isinstance(b, Stack) else b.consumer) for b in blocks)
    hooks = (module.register_forward_hook(keep_gradient(name)) for name, module in modules)
    with temporary_hooks(hooks):
        yield outputs
