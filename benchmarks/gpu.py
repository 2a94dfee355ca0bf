"""What only a GPU can say, in one command: checks, speed, compiled and captured passes, time to prune.

    python benchmarks/gpu.py --out runs/gpu                             # `make gpu`: under eight minutes
    python benchmarks/gpu.py --out runs/gpu --device cpu --shapes tiny  # end to end anywhere, in a minute

Models are random, of real sizes, so nothing is downloaded. Every part gives JSON lines (`gpu.jsonl`) and rows
of a table (`gpu.md`); a part that fails becomes a line with the reason, the others run on, and the exit code
is 1. Speeds are medians over rounds in which dense and pruned take turns.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import probeprune
from probeprune.bench.measure import GridPoint, measure_point
from probeprune.bench.targets import SHAPES, Target, of_shape, of_sizes
from probeprune.errors import first_line
from probeprune.methods import METHODS, Method, with_pays
from probeprune.model.blocks import find_blocks, find_layers
from probeprune.model.cost import synced_clock
from probeprune.model.machine import choose_device
from probeprune.model.passes import find_decoder
from probeprune.runtime.handle import Handle

RATIO = 0.4
TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest error over the largest logit, by dtype."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    prompt: GridPoint
    chat: GridPoint
    new_tokens: int
    windows: int
    """Calibration windows."""
    rounds: int


FULL = Sizes(GridPoint(4, 1024), GridPoint(1, 512), 64, 32, 5)
SMALL = Sizes(GridPoint(2, 32), GridPoint(1, 16), 4, 4, 2)


def main() -> None:
    """Run all parts; exit with 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu.jsonl and gpu.md")
    parser.add_argument("--device", default="auto", help="cuda, cpu or auto")
    parser.add_argument("--shapes", default="llama-3.2-1b,llama-2-7b", help=f"tiny, {', '.join(SHAPES)}")
    parser.add_argument("--minutes", type=float, default=8, help="parts that would begin later are left out")
    options = parser.parse_args()
    device, started = choose_device(options.device), time.monotonic()
    sizes = SMALL if options.shapes == "tiny" else FULL
    lines: list[Line] = [machine(device)]
    for name, part in parts(options.shapes.split(","), device, sizes):
        if time.monotonic() - started > 60 * options.minutes:
            lines.append({"part": name, "failed": f"not begun within {options.minutes:g} minutes"})
            continue
        before = time.monotonic()
        try:
            found = [{"part": name, **line} for line in part()]
        except Exception as error:  # the other parts still have something to say
            found = [{"part": name, "failed": f"{type(error).__name__}: {first_line(error)}"}]
        lines += found
        print(f"{name}: {time.monotonic() - before:.0f} s", file=sys.stderr, flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (options.out / "gpu.md").write_text(table(lines))
    print(table(lines), end="")
    sys.exit(any("failed" in line for line in lines))


def parts(
    shapes: Sequence[str], device: torch.device, sizes: Sizes
) -> Iterator[tuple[str, Callable[[], Iterator[Line]]]]:
    """The name of each part, and what runs it."""
    for dtype in LIMITS:
        short = str(dtype).removeprefix("torch.")
        yield f"checks, {short}", lambda dtype=dtype: checks(dtype, device)
    for shape in shapes:
        opened: dict[str, tuple[Target, Any]] = {}

        def at(work: Callable[..., Iterator[Line]], shape: str = shape, opened: dict = opened) -> Any:
            def run() -> Iterator[Line]:
                if not opened:
                    target = load(shape, device)
                    windows = target.windows(sizes.windows, sizes.prompt.length)
                    opened["it"] = (
                        target,
                        probeprune.prepare(target.model, methods(), RATIO, windows, batch_size=4),
                    )
                return work(*opened["it"], sizes)

            return run

        yield f"time to prune, {shape}", lambda shape=shape: pruning(load(shape, device), sizes)
        yield f"speed, {shape}", at(speed)
        yield f"compiled, {shape}", at(compiled)
        yield f"captured, {shape}", at(captured)
        yield f"parallel probe, {shape}", at(parallel)
        opened.clear()


def machine(device: torch.device) -> Line:
    """The first line: what ran here."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    return {"part": "machine", "device": str(device), "name": name, "torch": torch.__version__}


def load(shape: str, device: torch.device) -> Target:
    """A random bfloat16 model of the shape: all its layers, or as many as take a third of the free memory."""
    if shape == "tiny":
        return of_sizes(shape, TINY, torch.bfloat16, device)
    layers = SHAPES[shape]["num_hidden_layers"]
    if device.type == "cuda":
        one = of_shape(shape, 1, torch.bfloat16, torch.device("meta"))
        size = sum(2 * block.parameters for block in find_blocks(one.model))
        layers = max(min(layers, torch.cuda.mem_get_info(device)[0] // 3 // size), 1)
    return of_shape(shape, layers, torch.bfloat16, device)


def methods() -> list[Method]:
    """What is measured beside the dense model, with no layer left dense."""
    named = METHODS["wanda-sp"], METHODS["probe"], with_pays("best-dynamic", "always")
    return [replace(method, skip_layers=0) for method in named]


# -- checks ----------------------------------------------------------------------------------------


def checks(dtype: torch.dtype, device: torch.device) -> Iterator[Line]:
    """The runtime on this device: what it computes, what it leaves behind, and that it never waits."""
    target = of_sizes("tiny", TINY, dtype, device)
    model, windows = target.model, target.windows(24, 48)
    batches = [b.to(device) for b in windows[:12].split(4)]
    prepared = probeprune.prepare(model, methods(), RATIO, windows[12:], batch_size=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for method in methods():
        with torch.inference_mode(), probeprune.attach(model, method, RATIO, calibration=prepared) as handle:
            chosen, errors = [], []
            for ids in batches:
                got = model(ids, use_cache=False).logits
                chosen.append([k.units for k in handle.kept_units()])
                if method.refit is None:
                    kept = handle.kept_units()
                    errors.append((ids, got, kept))
            waits = "not on a GPU" if device.type != "cuda" else no_waiting(model, batches[0])
            text = generated(model, batches[0][:1], use_cache=True)
            again = generated(model, batches[0][:1], use_cache=False)
        worst = max((error(got, masked(model, kept, ids)) for ids, got, kept in errors), default=None)
        restored = all(p.equal(before[name]) for name, p in model.named_parameters())
        line: Line = {
            "method": method.name,
            "error": worst,
            "limit": LIMITS[dtype],
            "choices": len({str(c) for c in chosen}),
            "restored": restored,
            "waits": waits,
            "same_text_with_a_cache": bool(text.equal(again)),
        }
        wrong = [n for n, bad in (("error", (worst or 0) > LIMITS[dtype]), ("restored", not restored)) if bad]
        if dtype == torch.float32 and not method.when.every_batch and not line["same_text_with_a_cache"]:
            wrong.append("same_text_with_a_cache")
        if method.when.chooses and line["choices"] == 1:
            wrong.append("choices")
        if waits not in ("never", "not on a GPU"):
            wrong.append("waits")
        yield {**line, **({"failed": f"wrong: {', '.join(wrong)}"} if wrong else {})}


@torch.inference_mode()
def masked(model: Any, kept: Sequence[Any], ids: torch.Tensor) -> torch.Tensor:
    """Logits of the dense model with the activations of all other units zero."""
    hooks = []
    for block, choice in zip(find_blocks(model), kept, strict=True):
        keep = torch.zeros(block.units, device=ids.device, dtype=model.dtype)
        keep[list(choice.units)] = 1
        keep = keep.repeat_interleave(block.unit_width)
        hooks.append(block.consumer.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep,)))
    try:
        return model(ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def no_waiting(model: Any, ids: torch.Tensor) -> str:
    """Whether a pass through the decoder waits for the GPU: `never`, or what waited."""
    decoder = find_decoder(model)
    decoder(input_ids=ids, use_cache=False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder(input_ids=ids, use_cache=False)
    except RuntimeError as reason:
        return first_line(reason)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "never"


def generated(model: Any, ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
    """Sixteen greedy tokens."""
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, use_cache=use_cache)


# -- speed -----------------------------------------------------------------------------------------


def speed(target: Target, prepared: Any, sizes: Sizes) -> Iterator[Line]:
    """Prefill of a batch, and decoding behind one prompt."""
    yield from timed(target, methods(), prepared, sizes.prompt, 0, sizes.rounds)
    yield from timed(target, methods(), prepared, sizes.chat, sizes.new_tokens, sizes.rounds)


def parallel(target: Target, prepared: Any, sizes: Sizes) -> Iterator[Line]:
    """A probe in turn, and one on a second stream beside the block before."""
    turn = next(m for m in methods() if m.name == "probe")
    probe = replace(turn.when.probe, parallel=True)
    beside = replace(turn, name="probe, parallel", when=replace(turn.when, probe=probe))
    windows = target.windows(sizes.windows, sizes.prompt.length)
    prepared = probeprune.prepare(target.model, [turn, beside], RATIO, windows, batch_size=4)
    yield from timed(target, [turn, beside], prepared, sizes.prompt, 0, sizes.rounds)


def timed(
    target: Target, chosen: Sequence[Method], prepared: Any, point: GridPoint, new_tokens: int, rounds: int
) -> Iterator[Line]:
    """The lines of bench at one point, those of the prompt left out where tokens are decoded."""
    lines = measure_point(
        target,
        chosen,
        RATIO,
        point,
        calibration=prepared,
        new_tokens=new_tokens,
        rounds=rounds,
        progress=lambda what, done, total: None,
    )
    for line in lines:
        if line["phase"] == ("decode" if new_tokens else "prefill"):
            yield dict(line)


def compiled(target: Target, prepared: Any, sizes: Sizes) -> Iterator[Line]:
    """Each decoder layer compiled by itself, beside the same uncompiled."""
    batches = prompts(target, sizes)
    for method in (METHODS["dense"], *methods()):
        found = []
        for compile in (False, True):
            attached = probeprune.attach(target.model, method, RATIO, calibration=prepared, compile=compile)
            with torch.inference_mode(), attached:
                run(target, batches[:1])
                found.append(run(target, batches))
        (want, eager), (got, fast) = found
        # Compiled code rounds in other places, and units that are nearly equal may then change places.
        limit = torch.inf if method.when.chooses else LIMITS[torch.bfloat16]
        yield beside(method, "eager", eager, fast, got, want, limit)


def captured(target: Target, prepared: Any, sizes: Sizes) -> Iterator[Line]:
    """A whole pass as one CUDA graph, probe, choice and swaps included, beside the same pass as it is."""
    if target.device.type != "cuda":
        yield {"left_out": "CUDA graphs need a GPU"}
        return
    batches = prompts(target, sizes)
    for method in (METHODS["dense"], *methods()):
        with torch.inference_mode():
            with probeprune.attach(target.model, method, RATIO, calibration=prepared):
                for _ in range(3):
                    run(target, batches[:1])
                want, eager = run(target, batches)
            # Attached anew: the history of the probe begins where it began for the pass as it is.
            with probeprune.attach(target.model, method, RATIO, calibration=prepared) as handle:
                got, fast = replayed(target, handle, batches)
        yield beside(method, "eager", eager, fast, got, want)


def replayed(
    target: Target, handle: Handle, batches: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[float]]:
    """The outputs and seconds of a captured pass, which three passes on the first batch have warmed up."""
    decoder, ids = find_decoder(target.model), batches[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            decoder(input_ids=ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decoder(input_ids=ids, use_cache=False)[0]
    outputs, seconds = [], []
    for batch in batches:
        ids.copy_(batch)
        begun = synced_clock(target.device)
        graph.replay()
        seconds.append(synced_clock(target.device) - begun)
        outputs.append(output.clone())
    return outputs, seconds


def prompts(target: Target, sizes: Sizes) -> list[torch.Tensor]:
    """One batch a round."""
    point = sizes.prompt
    windows = target.windows(sizes.rounds * point.batch_size, point.length)
    return [b.to(target.device) for b in windows.split(point.batch_size)]


def run(target: Target, batches: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[float]]:
    """The decoder's outputs and seconds for each batch."""
    decoder, outputs, seconds = find_decoder(target.model), [], []
    for ids in batches:
        begun = synced_clock(target.device)
        output = decoder(input_ids=ids, use_cache=False)[0]
        seconds.append(synced_clock(target.device) - begun)
        outputs.append(output.clone())
    return outputs, seconds


def beside(
    method: Method,
    base: str,
    slow: Sequence[float],
    fast: Sequence[float],
    got: Sequence[torch.Tensor],
    want: Sequence[torch.Tensor],
    limit: float = LIMITS[torch.bfloat16],
) -> Line:
    """A line about two ways to run one method."""
    worst = max(error(g, w) for g, w in zip(got, want, strict=True))
    line: Line = {
        "method": method.name,
        "seconds": statistics.median(fast),
        f"speedup_over_{base}": statistics.median(s / f for s, f in zip(slow, fast, strict=True)),
        "error": worst,
    }
    if not worst <= limit:
        line["failed"] = f"an error of {worst:.2g}"
    return line


# -- time to prune ---------------------------------------------------------------------------------


def pruning(target: Target, sizes: Sizes) -> Iterator[Line]:
    """Seconds a layer to prepare each method, beside the layers' forward passes over the same text."""
    windows = target.windows(sizes.windows, sizes.prompt.length)
    layers = len(find_layers(target.model))
    with torch.inference_mode():
        run(target, [windows[:4].to(target.device)])
        forward = sum(run(target, [b.to(target.device) for b in windows.split(4)])[1])
    for name in ("wanda-sp", "best-static"):
        method = replace(METHODS[name], skip_layers=0)
        begun = synced_clock(target.device)
        probeprune.prepare(target.model, method, RATIO, windows, batch_size=4)
        seconds = synced_clock(target.device) - begun
        yield {
            "method": name,
            "layers": layers,
            "tokens": windows.numel(),
            "seconds_a_layer": seconds / layers,
            "over_forward": seconds / forward,
        }


# -- table -----------------------------------------------------------------------------------------

SHOWN = (
    *("method", "phase", "batch_size", "length", "speedup", "work_share", "efficiency", "seconds"),
    *("speedup_over_eager", "memory_over_dense", "seconds_a_layer", "over_forward", "error", "choices"),
    *("restored", "waits", "same_text_with_a_cache", "left_out", "failed"),
)


def table(lines: Sequence[Line]) -> str:
    """One Markdown table for each part that has lines, with the columns that it has."""
    first, *rest = lines
    text = f"{first['name']} ({first['device']}), torch {first['torch']}, {RATIO:.0%} removed\n"
    for name in dict.fromkeys(line["part"] for line in rest):
        of_part = [line for line in rest if line["part"] == name]
        columns = [c for c in SHOWN if any(c in line for line in of_part)]
        text += f"\n**{name}**\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n"
        for line in of_part:
            text += f"| {' | '.join(shown(line.get(c, '')) for c in columns)} |\n"
    return text


def shown(value: Any) -> str:
    """A value for a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    main()
