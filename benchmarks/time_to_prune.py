"""Time that `best-static` takes for one layer of a given shape, by parts, over a forward pass of its windows.

Run: .venv/bin/python benchmarks/time_to_prune.py   (SmolLM2-135M's, LLaMA-3.2-1B's and LLaMA-2-7B's layers;
about 20 minutes)

One LLaMA layer with random weights in float32, 40 % of its heads and channels to go. Passes and moments are
measured on a few windows of 512 tokens and multiplied up to 128; choice and refit are measured once, as they
do not depend on the number of windows. All times are CPU seconds of this process, which others disturb least.
*Earlier* is the algorithm before: products of inputs on both sides of the diagonal, the metric multiplied
with the whole weight at each of 64 looks, all units put in order, and everything factorised anew where it was
needed; of its looks, four are measured, and the others interpolated.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probeprune.algebra.elimination import LOOKS, eliminate_fitted
from probeprune.algebra.least_squares import Equations, Gram, squared_error
from probeprune.algebra.precision import choosing_dtype
from probeprune.model.blocks import Block, find_blocks
from probeprune.model.layers import LayerRunner, capture
from probeprune.model.partition import Partition

WINDOWS, LENGTH, RATIO, DAMPING = 128, 512, 0.4, 0.3
HEADS = {576: (9, 3), 2048: (32, 8), 4096: (32, 32)}
"""Query and key-value heads by hidden size."""


class Clock:
    """CPU seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, times: float = 1.0) -> Iterator[None]:
        """Add what the context takes, `times` times, to `name`."""
        started = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + times * (time.process_time() - started)


def random_layer(hidden: int, inner: int) -> LlamaForCausalLM:
    """A LLaMA of one layer."""
    heads, kv_heads = HEADS.get(hidden, (max(hidden // 64, 1),) * 2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    return LlamaForCausalLM(config).eval()


def measure(hidden: int, inner: int, windows: int, earlier: bool) -> Clock:
    """Times of all parts of one layer."""
    model, clock = random_layer(hidden, inner), Clock()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(512, (windows, LENGTH), generator=generator)
    runner = LayerRunner(model, [ids[:1], ids])
    blocks = find_blocks(model)
    keep = {b.name: max(round((1 - RATIO) * b.units), 1) for b in blocks}
    times = WINDOWS / windows
    runner.run(0, 0, runner.hidden[0])  # the first pass sets up threads and kernels
    states = runner.hidden[1]
    metric = torch.randn(hidden, hidden, generator=generator)
    metric = metric @ metric.T / hidden + 0.1 * torch.eye(hidden)
    with clock("forward", times):
        runner.run(0, 1, states)
    with clock("passes", times), capture(blocks) as dense:
        runner.run(0, 1, states)
    partitions = [Partition(b) for b in blocks]
    for block, partition in zip(blocks, partitions, strict=True):
        with clock("passes", times), capture(blocks, until=block) as seen:
            runner.run(0, 1, states)
        z, target = seen[block.kind].z.flatten(0, -2), dense[block.kind].output.flatten(0, -2)
        gram = Gram(block.width, hidden)
        with clock("moments", times):
            gram.update(z, target)
        if earlier:
            with clock("earlier moments", times):
                z - z.mean(0), target - target.mean(0)
                z.T @ z, target.T @ z
            earlier_choice(clock, block, gram, metric)
        weight = partition.consumer_weight
        with clock("choice"):
            equations = Equations(gram, weight, False, DAMPING, choosing_dtype(DAMPING))
            right, inverse = equations.right, equations.inverse()
            del equations
            width, kept = block.unit_width, keep[block.name]
            stay = eliminate_fitted(inverse, right, width, metric=metric, keep=kept).stay
            del right, inverse
        partition.keep(stay)
        fit, weight = gram.part(partition.channels[: kept * width]), weight[:, : kept * width]
        if earlier:
            earlier_refit(clock, fit, weight)
        with clock("refit"):
            squared_error(fit, weight, None)
            Equations(fit, weight, False, DAMPING).solution()
    with clock("passes", times):
        runner.run(0, 1, states)
    if earlier:
        earlier_passes(clock, runner, blocks, partitions, states, times)
    return clock


def earlier_passes(
    clock: Clock,
    runner: LayerRunner,
    blocks: list[Block],
    partitions: list[Partition],
    states: torch.Tensor,
    times: float,
) -> None:
    """Two passes of the dense stream, the first up to the attention's output, and three of the pruned one."""
    attention, mlp = blocks

    def until(block: Block) -> None:
        def stop(*_: object) -> None:
            raise StopIteration

        hook = block.consumer.register_forward_hook(stop)
        with suppress(StopIteration):
            runner.run(0, 1, states)
        hook.remove()

    wide, narrow = [p.widen for p in partitions], [p.narrow for p in partitions]
    steps: list[tuple[Callable[[], None], Callable[[], None], Block]] = [
        (wide[0], wide[1], attention),
        (wide[0], wide[1], mlp),
        (wide[0], wide[1], attention),
        (narrow[0], wide[1], mlp),
        (narrow[0], narrow[1], mlp),
    ]
    for show_attention, show_mlp, block in steps:
        show_attention(), show_mlp()
        with clock("earlier passes", times):
            until(block)


def earlier_choice(clock: Clock, block: Block, gram: Gram, metric: torch.Tensor) -> None:
    """Two factors and a solution, and then looks that multiply the metric with all that is left."""
    weight = block.consumer_weight
    with clock("earlier choice"):
        moment = gram.zz.double() / gram.count
        moment.diagonal().mul_(1 + DAMPING)
        w, m = weight.double(), metric.double()
        target = gram.tz.double() / gram.count - w @ moment
        w = w + torch.cholesky_solve(target.T, torch.linalg.cholesky(moment)).T
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    seconds = []
    looks = min(LOOKS, block.units)
    for share in (1.0, 0.75, 0.5, 0.25):
        n = round(share * block.units) * block.unit_width
        count = max(block.units // looks, 1) * block.unit_width
        own, left = w[:, :n].contiguous(), inverse[:n, :n].contiguous()
        one = Clock()
        with one("look"):
            ((m @ own) * own).sum(0) / left.diagonal()
            rows = left[:count]
            update = torch.linalg.solve(rows[:, :count], rows[:, count:])
            own[:, count:] - own[:, :count] @ update
            left[torch.arange(count, n)][:, torch.arange(count, n)] - rows[:, count:].T @ update
        seconds.append(one.seconds["look"])
    points = [*seconds, 0.0]
    mean = sum((a + b) / 2 for a, b in pairwise(points)) / (len(points) - 1)
    clock.seconds["earlier choice"] += looks * mean


def earlier_refit(clock: Clock, fit: Gram, weight: torch.Tensor) -> None:
    """The same equations factorised and solved twice, and two errors."""
    with clock("earlier refit"):
        for _ in range(2):
            moment, w = fit.zz.double() / fit.count, weight.double()
            target = fit.tz.double() / fit.count - w @ moment
            moment.diagonal().mul_(1 + DAMPING)
            torch.cholesky_solve(target.T, torch.linalg.cholesky(moment))
        for _ in range(2):
            w @ (fit.zz.double() / fit.count)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--shapes", default="576x1536,2048x8192,4096x11008", help="hidden size x MLP channels"
    )
    parser.add_argument("--windows", type=int, default=2, help="of 512 tokens, to measure passes on")
    parser.add_argument("--no-earlier", action="store_true", help="leave the earlier algorithm out")
    arguments = parser.parse_args()
    parts = ["passes", "moments", "choice", "refit"]
    print("| shape | forward, s | part | earlier | now |", "| --- | ---: | --- | ---: | ---: |", sep="\n")
    for shape in arguments.shapes.split(","):
        hidden, inner = map(int, shape.split("x"))
        with torch.no_grad():
            seconds = measure(hidden, inner, arguments.windows, not arguments.no_earlier).seconds
        rows = {part: (seconds.get(f"earlier {part}", 0.0), seconds[part]) for part in parts}
        rows["all"] = tuple(map(sum, zip(*rows.values(), strict=True)))
        for part, (before, now) in rows.items():
            ratios = " | ".join(f"{s / seconds['forward']:.2f}" for s in (before, now))
            print(f"| {shape} | {seconds['forward']:.1f} | {part} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
