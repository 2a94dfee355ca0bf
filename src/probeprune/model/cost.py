"""Cost: FLOPs, counted while they run and from formulas, a clock and peak memory.

Only matrix products count, a multiply-add as two FLOPs. Attention counts all query-key pairs, as torch's
counter does, though a causal kernel may skip half. The tests check counts and formulas against each other.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from probeprune.model.blocks import Block
from probeprune.model.experts import Stack
from probeprune.model.linear_maps import sizes
from probeprune.model.machine import release_freed


@dataclass
class FlopCount:
    """The result of `counting_flops`; set when its context ends."""

    flops: int = 0


def _attention_flops(
    query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    batch, heads, q_length, width = query
    return 2 * batch * heads * q_length * key[2] * (width + value[3])


def _cholesky_flops(matrix: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(matrix[-1] ** 3 // 3)


def _cholesky_solve_flops(right: Any, factor: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * factor[-1] ** 2 * right[-1])


def _grouped_flops(left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of rows sorted by expert (rows, in), (experts, in, out); of gradients (in, rows), (rows, out)."""
    return 2 * int(left[0]) * int(left[1]) * int(right[-1])


@contextmanager
def counting_flops() -> Iterator[FlopCount]:
    """Count the FLOPs that run inside, with torch's `FlopCounterMode`."""
    count = FlopCount()
    # Torch's table lacks the CPU's fused attention kernel, the solvers of a per-batch refit and the product
    # of all experts at once.
    aten = torch.ops.aten
    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten.linalg_cholesky_ex: _cholesky_flops,
        aten.cholesky_solve: _cholesky_solve_flops,
        aten._grouped_mm: _grouped_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        yield count
    count.flops = counter.get_total_flops()


def block_flops(block: Block, kept: int, batch: int, length: int, *, consumer: bool = True) -> int:
    """FLOPs of one block that keeps `kept` units, on (batch, length) tokens.

    With `consumer=False` the consumer's are left out: a probe stops in front of it.
    """
    tokens = batch * length
    gone = block.units - kept
    total = 0
    for linear in block.producers:
        rows, columns = sizes(linear)
        rows -= gone * sum(m.width for m in block.members if m.linear is linear)
        total += 2 * tokens * columns * rows
    if consumer:
        total += 2 * tokens * block.hidden_size * kept * block.unit_width
    if block.kind == "attention":
        heads = kept * block.unit_width // block.value_dim
        total += 2 * batch * heads * length * length * (block.head_dim + block.value_dim)
    return total


def blocks_flops(blocks: Sequence[Block | Stack], kept: Sequence[int], batch: int, length: int) -> int:
    """FLOPs of all blocks that keep `kept` units each, on (batch, length) tokens; of experts, those that the
    tokens are sent to."""
    return sum(
        b.flops(k, batch * length) if isinstance(b, Stack) else block_flops(b, k, batch, length)
        for b, k in zip(blocks, kept, strict=True)
    )


def synced_clock(device: torch.device) -> float:
    """Seconds of a clock, read once the device has finished all work queued so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """Context that measures peak memory: of this process on the CPU (sampled), or of its GPU.

    Memory that earlier work has freed, and that the C library has kept, is given back first.

    Args:
        device: where the work runs.
        every: seconds between two samples on the CPU.

    Attributes:
        bytes: the peak; set when the context ends.
    """

    def __init__(self, device: torch.device, every: float = 0.01) -> None:
        self.bytes = 0
        self._device, self._every = device, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(self._every):
                return

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            release_freed()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._thread.join()


def product_rate(blocks: Sequence[Block], dtype: torch.dtype, device: torch.device, tokens: int) -> float:
    """FLOPs a second of the linear maps of one layer, over about a second."""
    last = blocks[-1].layer
    maps = [m for b in blocks if b.layer == last for m in (*b.producers, b.consumer)]
    weights = [torch.ones(sizes(m), dtype=dtype, device=device) for m in maps]
    inputs = [torch.ones(tokens, sizes(m)[1], dtype=dtype, device=device) for m in maps]
    done = started = 0.0
    for turn in range(100):
        if turn == 1:
            started = synced_clock(device)  # the first turn sets up threads and kernels
        for x, weight in zip(inputs, weights, strict=True):
            nn.functional.linear(x, weight)
        if turn:
            done += sum(2.0 * tokens * w.numel() for w in weights)
            if synced_clock(device) - started > 0.7:
                break
    return done / (time.perf_counter() - started)
