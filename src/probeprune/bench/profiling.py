"""Where the milliseconds of a pass go: by stage of a dynamic method, and by kind of block.

From torch's profiler and the labels that `runtime.py` puts around its stages; blocks are labelled here, from
their entry to their consumer. Times are exclusive: a label's own, without those of labels inside it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from probeprune.model.blocks import Block

T = TypeVar("T")

OVERHEAD = ("choose", "score", "swap", "refit", "history")
"""Stages that are neither the probe's nor the pruned blocks' own arithmetic."""
PARTS = ("attention", "mlp", "run_ahead", *OVERHEAD, "rest")
"""Of a pass: blocks, then the stages of a dynamic method, then norms, residuals and Python."""
_PREFIX = "probeprune::"


def profiled(
    blocks: Sequence[Block], device: torch.device, forward: Callable[[], T]
) -> tuple[dict[str, float], T]:
    """Run `forward` under the profiler; milliseconds by part (`PARTS`), and what it returned.

    On a GPU they are the kernels' own, on a CPU those of the operators.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler logs its starts and stops
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with labelled(blocks), profile(activities=activities, acc_events=True) as trace:
        with record_function(_PREFIX + "rest"):
            result = forward()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = dict.fromkeys(PARTS, 0.0)
    for event in trace.events() or []:
        part = _part(event)
        if part is None:
            continue
        outer = _outer(event)
        if outer is not None and _part(outer) == "run_ahead":
            continue  # the probe runs through the block's own forward, labels and all
        own = (event.device_time_total if on_gpu else event.cpu_time_total) / 1e3
        found[part] += own
        if outer is not None:
            found[_part(outer) or "rest"] -= own
    return found, result


def _part(event: Any) -> str | None:
    name = event.name.removeprefix(_PREFIX)
    return name if event.name.startswith(_PREFIX) and name in PARTS else None


def _outer(event: Any) -> Any:
    """The nearest labelled event around one, or None."""
    outer = event.cpu_parent
    while outer is not None and _part(outer) is None:
        outer = outer.cpu_parent
    return outer


@contextmanager
def labelled(blocks: Sequence[Block]) -> Iterator[None]:
    """Label every block for the profiler, by its kind."""
    hooks, open_labels = [], []

    def enter(block: Block) -> Callable[..., None]:
        def hook(*_: object) -> None:
            label = record_function(_PREFIX + block.kind)
            label.__enter__()
            open_labels.append(label)

        return hook

    def leave(*_: object) -> None:
        open_labels.pop().__exit__(None, None, None)

    for block in blocks:
        hooks.append(block.entry.register_forward_pre_hook(enter(block)))
        hooks.append(block.consumer.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
