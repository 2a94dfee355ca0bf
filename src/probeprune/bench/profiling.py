"""Where the milliseconds of a forward pass go: by stage of a dynamic method, and by kind of block.

Uses torch's profiler and the labels that the runtime puts around its stages (`stages.py`); blocks are
labelled here, from their entry to their consumer. Times are exclusive: without those of labels inside.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from probeprune.model.blocks import Block
from probeprune.stages import PROBE, STAGES

T = TypeVar("T")

PARTS = ("attention", "mlp", *(stage.name for stage in STAGES), "rest")
"""Of a pass: blocks, then the stages of a dynamic method, then norms, residuals and Python."""

_PREFIX = "probeprune::"


def profiled(
    blocks: Sequence[Block], device: torch.device, forward: Callable[[], T]
) -> tuple[dict[str, float], T]:
    """Run `forward` under the profiler; returns milliseconds by part (`PARTS`) and the result of `forward`.

    Times are those of kernels on a GPU, and of operators on a CPU.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # without it, torch's profiler logs every start and stop
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with labelled(blocks), profile(activities=activities, acc_events=True) as trace:
        with record_function(_PREFIX + "rest"):
            result = forward()
        if on_gpu:
            torch.cuda.synchronize(device)
    milliseconds = dict.fromkeys(PARTS, 0.0)
    for event in trace.events() or []:
        part = _part(event)
        if part is None:
            continue
        outer = _outer(event)
        if outer is not None and _part(outer) == PROBE.name:
            continue  # the probe calls the block's own forward, which is labelled too
        duration = (event.device_time_total if on_gpu else event.cpu_time_total) / 1e3
        milliseconds[part] += duration
        if outer is not None:
            milliseconds[_part(outer) or "rest"] -= duration
    return milliseconds, result


def _part(event: Any) -> str | None:
    name = event.name.removeprefix(_PREFIX)
    return name if event.name.startswith(_PREFIX) and name in PARTS else None


def _outer(event: Any) -> Any:
    """The nearest labelled event that contains `event`, or None."""
    outer = event.cpu_parent
    while outer is not None and _part(outer) is None:
        outer = outer.cpu_parent
    return outer


@contextmanager
def labelled(blocks: Sequence[Block]) -> Iterator[None]:
    """Label every block for the profiler by its kind."""
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
