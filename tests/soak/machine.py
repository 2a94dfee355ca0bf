"""Random sequences of steps, by hypothesis; a failing one is shrunk and printed as a script.

python -m soak.machine --minutes 10
"""

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from all_methods import ALL, EVERYWHERE
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from soak.caching import GENERATION
from soak.steps import DTYPES, Full
from soak.world import AMBIENT
from tiny import FAMILIES
from transformers.utils import logging

METHODS = (
    *EVERYWHERE,
    "dense",
    "flap",
    "best-static",
    *("balanced heads", "query heads", "probe and bias", "refresh", "static balanced heads"),
)
assert set(METHODS) <= set(ALL)
HEAD = "from soak.steps import Full\n\n"
CHANGES = ("copy", "reorder", "repeat", "select", "crop", "reset")
RATIOS = (0.3, 0.2, 0.0)
SEEDS = st.integers(0, 9)
PLACES = st.integers(0, 11)
AMBIENTS = st.sampled_from(list(AMBIENT))
SIDES = st.sampled_from(["none", "left", "right"])
PASSES = ("forward", "go_on", "generate", "backward", "threads")
TOTAL: Counter[tuple[str, str]] = Counter()
RUNS: Counter[str] = Counter()
FAILED: list[str] = []
"""The lines of the first sequence that failed."""


class Soak(RuleBasedStateMachine):
    """One rule for each step of `Full`."""

    world: Full
    lines: list[str]

    @initialize(
        family=st.sampled_from(list(FAMILIES)), method=st.sampled_from(METHODS), ratio=st.sampled_from(RATIOS)
    )
    def build(self, family: str, method: str, ratio: float) -> None:
        """Sequences begin attached: most of what is of interest happens then."""
        self.world, self.lines = Full(family), [f"world = Full({family!r})"]
        RUNS["sequences"] += 1
        self.do("attach", method, ratio, "prepared")

    def do(self, step: str, *args: Any, **options: Any) -> None:
        """Take a step, remember it as a line of Python, and check the model."""
        given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in options.items())])
        self.lines.append(f"world.{step}({given}); world.check()")
        RUNS["steps"] += 1
        try:
            getattr(self.world, step)(*args, **options)
            self.world.check()
        except BaseException:
            if not FAILED:
                FAILED.extend(self.lines)
                traceback.print_exc(limit=-9, file=sys.stdout)
            raise

    def teardown(self) -> None:
        if hasattr(self, "world"):
            TOTAL.update(self.world.counts)
            torch.set_default_dtype(torch.float32)
            if self.world.handle is not None:
                self.do("detach", "handle")

    @rule(
        method=st.sampled_from(METHODS),
        ratio=st.sampled_from(RATIOS),
        calibration=st.sampled_from(["prepared", "prepared", "windows"]),
        ambient=AMBIENTS,
    )
    def attach(self, method: str, ratio: float, calibration: str, ambient: str) -> None:
        self.do("attach", method, ratio, calibration, ambient)

    @rule(how=st.sampled_from(["handle", "function", "context", "error", "twice", "lost"]), ambient=AMBIENTS)
    def detach(self, how: str, ambient: str) -> None:
        self.do("detach", how, ambient)

    @rule(
        batch=st.integers(1, 4),
        length=st.integers(1, 24),
        side=SIDES,
        mask=st.sampled_from(["2d", "none", "bool", "additive", "holes", "packed"]),
        seed=SEEDS,
        cache=st.sampled_from(["none", "own", "dynamic", "static"]),
        ambient=AMBIENTS,
        extras=st.booleans(),
    )
    def forward(self, **given: Any) -> None:
        self.do("forward", **given)

    @rule(
        batch=st.integers(1, 3),
        length=st.integers(1, 12),
        side=st.sampled_from(["none", "left"]),
        seed=SEEDS,
        cache=st.sampled_from(["own", "dynamic", "static"]),
        turns=st.lists(st.tuples(st.sampled_from(["", *CHANGES]), st.integers(1, 3)), min_size=1, max_size=4),
    )
    def talk(self, batch: int, length: int, side: str, seed: int, cache: str, turns: list) -> None:
        """A prompt, and a few more passes behind its cache."""
        self.do("forward", batch, length, side, "2d", seed, cache)
        for change, more in turns:
            if change and self.world.cache is not None:
                self.do("change_cache", change)
            if self.world.cache is not None:
                self.do("go_on", more, seed)

    @precondition(lambda self: self.world.cache is not None)
    @rule(length=st.integers(1, 3), seed=SEEDS, ambient=AMBIENTS)
    def go_on(self, length: int, seed: int, ambient: str) -> None:
        self.do("go_on", length, seed, ambient)

    @precondition(lambda self: self.world.cache is not None)
    @rule(how=st.sampled_from(CHANGES))
    def change_cache(self, how: str) -> None:
        self.do("change_cache", how)

    @rule(
        kind=st.sampled_from(list(GENERATION)),
        batch=st.integers(1, 3),
        length=st.integers(2, 12),
        side=st.sampled_from(["none", "left"]),
        seed=SEEDS,
    )
    def generate(self, **given: Any) -> None:
        self.do("generate", **given)

    @rule(dtype=st.sampled_from(list(DTYPES)))
    def cast(self, dtype: str) -> None:
        self.do("cast", dtype)

    @rule(name=st.sampled_from(["move", "zero_grad", "descend"]))
    def simply(self, name: str) -> None:
        self.do(name)

    @rule(implementation=st.sampled_from(["sdpa", "eager"]))
    def switch_attention(self, implementation: str) -> None:
        self.do("switch_attention", implementation)

    @rule(on=st.booleans(), what=st.sampled_from(["checkpointing", "train", "require_grad"]))
    def switch(self, on: bool, what: str) -> None:
        self.do(what, on)

    @rule(kind=st.sampled_from(["forward", "pre", "kwargs", "steer"]), place=PLACES)
    def hook(self, kind: str, place: int) -> None:
        self.do("hook", kind, place)

    @rule(index=st.integers(0, 3), what=st.sampled_from(["unhook", "wrap", "unwrap"]))
    def unhook(self, index: int, what: str) -> None:
        self.do(what, index)

    @rule(place=PLACES, what=st.sampled_from(["wrap", "unwrap"]))
    def wrap(self, place: int, what: str) -> None:
        self.do(what, place)

    @rule(place=PLACES, seed=SEEDS, cached=st.booleans())
    def fail(self, place: int, seed: int, cached: bool) -> None:
        self.do("fail", place, seed, cached)

    @rule(seed=SEEDS)
    def threads(self, seed: int) -> None:
        self.do("threads", seed)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def duplicate(self, how: str) -> None:
        self.do("duplicate", how)

    @rule(assign=st.booleans())
    def state(self, assign: bool) -> None:
        self.do("state", assign)

    @rule(method=st.integers(0, 20), layout=st.sampled_from(["per-layer", "uniform"]))
    def cut(self, method: int, layout: str) -> None:
        self.do("cut", method, layout)

    @rule(seed=SEEDS, between=st.booleans())
    def backward(self, seed: int, between: bool) -> None:
        self.do("backward", seed, between)

    @rule(how=st.sampled_from(["no_grad", "data", "new data"]), place=PLACES)
    def edit(self, how: str, place: int) -> None:
        self.do("edit", how, place)

    @rule(how=st.sampled_from(["parameter", "delete", "parametrization", "module"]), place=PLACES)
    def replace(self, how: str, place: int) -> None:
        self.do("replace", how, place)

    @rule(seed=SEEDS)
    def adapter(self, seed: int) -> None:
        if seed in (5, 6):  # slow, and not the simplest: hypothesis begins with that
            self.do("adapter", seed)


def run(examples: int, steps: int, derandomize: bool = False) -> None:
    """Run this number of sequences; raises at the first that fails."""
    run_state_machine_as_test(
        Soak,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=derandomize,
            database=None,
            deadline=None,
            print_blob=False,
            phases=[Phase.generate],  # sequences are shrunk line by line, which is faster: see `shrunk`
            suppress_health_check=list(HealthCheck),
        ),
    )


def outcome(lines: list[str]) -> str:
    """How a script ends: the type of its exception and the file that raised it, or nothing."""
    names = {"Full": Full}
    try:
        for line in lines:
            exec(line, names)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        return f"{type(error).__name__} {str(error)[:24]} {frames[-1].filename}"
    finally:
        torch.set_default_dtype(torch.float32)
        world = names.get("world")
        if isinstance(world, Full) and world.handle is not None:
            with suppress(Exception):
                world.handle.detach()
    return ""


def shrunk(lines: list[str], seconds: float = 60) -> list[str]:
    """The fewest lines that fail in the same way, found by leaving one or more out."""
    end, failure, size = time.monotonic() + seconds, outcome(lines), len(lines) // 2
    if not failure:
        return lines
    while size:
        start = 1
        while start < len(lines) and time.monotonic() < end:
            fewer = lines[:start] + lines[start + size :]
            if outcome(fewer) == failure:
                lines = fewer
            else:
                start += size
        size //= 2
    return lines


def mostly_run() -> bool:
    """Whether most passes ran: refusing everything would be right too."""
    ran, refused = (sum(TOTAL[step, how] for step in PASSES) for how in ("ran", "refused"))
    return ran > 2 * refused


def report() -> str:
    """What was run, and how often each kind of step ran or was refused."""
    lines = [f"{RUNS['sequences']} sequences, {RUNS['steps']} states checked"]
    lines += [f"  {step}: {count} {outcome}" for (step, outcome), count in sorted(TOTAL.items())]
    return "\n".join(lines)


def main() -> None:
    """Run for some minutes, then print the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    end = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < end and not FAILED:
        try:
            run(10, arguments.steps)
        except Exception:
            if not FAILED:
                raise
    print(report())
    if FAILED:
        print("\n".join([HEAD, *shrunk(FAILED)]))
        raise SystemExit(1)
    assert mostly_run(), "most passes were refused"


if __name__ == "__main__":
    main()
