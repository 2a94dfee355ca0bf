"""What is measured, as data: a subject is one model as one method leaves it, a measure says on what, and a
cell is both. A cell's key names everything that determines its result, so that results can be found again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import gcd
from typing import Any, Literal

from probeprune.data.windows import Sampling, Text
from probeprune.errors import UsageError
from probeprune.evaluation.perplexity import Averaging
from probeprune.methods import Method
from probeprune.strategies.allocation import check_ratio
from probeprune.training.settings import Training

_FORMAT = 1
"""Of what a cell's key stands for; changed when the same settings come to mean something else."""


@dataclass(frozen=True)
class TrainingBudget:
    """How much a method with training may train, and on what text."""

    training: Training = field(default_factory=Training)
    corpus: str = "c4"
    packing: bool = False


@dataclass(frozen=True)
class Subject:
    """One model as one method leaves it. Made by `subject`, which leaves out what does not matter."""

    model: str
    method: Method
    ratio: float
    seed: int
    """Draws calibration windows, what the method draws, and the order of training text."""
    calibration: Text | None
    budget: TrainingBudget | None
    dtype: str
    device: str
    weights: str = ""
    """Fingerprint of a local directory's weights."""

    @property
    def label(self) -> str:
        """For people: `probe 40%`."""
        name = self.method.name
        return name if self.method.when == "never" else f"{name} {self.ratio:.0%}"

    @property
    def seed_matters(self) -> bool:
        """Whether another seed gives another model."""
        return self.calibration is not None or self.budget is not None or _draws(self.method)

    @cached_property
    def key(self) -> str:
        """A name for all of this."""
        return _key(asdict(self))


@dataclass(frozen=True)
class TextMeasure:
    """Perplexity on windows of a text."""

    corpus: str = "wikitext2"
    windows: int | None = 48
    """From the front; None for the whole text."""
    length: int = 512
    batch_size: int = 16
    """Windows a batch; dynamic methods prune at each."""
    sampling: Sampling = "in-order"
    averaging: Averaging = "token"
    seed: int = 0
    """Draws the windows where `sampling` is published."""

    @property
    def name(self) -> str:
        """The column it fills."""
        return self.corpus


@dataclass(frozen=True)
class TaskMeasure:
    """Accuracy on a commonsense task."""

    task: str
    limit: int | None = None
    """The first so many items; None for all."""
    batch_size: int | None = None
    """Options a batch; dynamic methods prune at each. None for the protocol's own."""
    order: Literal["length", "given"] | None = None
    """Of the options: the longest first, or as given. None for the protocol's own."""
    protocol: Literal["harness", "published"] = "harness"
    source: Literal["local", "hub"] = "local"

    @property
    def name(self) -> str:
        """The column it fills; the two protocols never share one."""
        return self.task if self.protocol == "harness" else f"{self.task} ({self.protocol})"


@dataclass(frozen=True)
class CostMeasure:
    """Time and memory against the dense model, interleaved with it."""

    batch_size: int = 16
    length: int = 512
    """Of the prompt, in tokens."""
    new_tokens: int = 32
    """Decoded after the prompt."""
    rounds: int = 3

    @property
    def name(self) -> str:
        """The column it fills."""
        return "cost"


Measure = TextMeasure | TaskMeasure | CostMeasure


@dataclass(frozen=True)
class Cell:
    """One measurement: a subject and what it is measured on."""

    subject: Subject
    measure: Measure

    @cached_property
    def key(self) -> str:
        """A name for everything that determines the result."""
        return _key({"subject": self.subject.key, type(self.measure).__name__: asdict(self.measure)})


def scaled_budget(
    steps: int, batch_size: int, length: int, learning_rate: float, corpus: str = "c4", packing: bool = False
) -> TrainingBudget:
    """A budget of any size in the proportions of LLM-Pruner's recovery.

    The learning rate rises for a sixth of the steps; a twenty-fifth of the text is held out (at least 16
    sequences) and looked at four times.
    """
    training = Training(
        steps=steps,
        batch_size=batch_size,
        micro_batch=gcd(batch_size, 4),
        length=length,
        learning_rate=learning_rate,
        warmup_steps=steps // 6,
        evaluate_every=max(steps // 4, 1),
        evaluate_windows=min(max(steps * batch_size // 25, 16), 800),
    )
    return TrainingBudget(training, corpus, packing)


def subject(
    model: str,
    method: Method,
    ratio: float,
    *,
    seed: int = 0,
    calibration: Text,
    budget: TrainingBudget | None = None,
    dtype: str,
    device: str,
    weights: str = "",
) -> Subject:
    """A subject without what makes no difference to it: the dense model has no ratio, seed or calibration.

    Raises `UsageError` for an impossible ratio, or a method with training and no budget.
    """
    check_ratio(ratio)
    trains = method.training != "none"
    if trains and budget is None:
        raise UsageError(f"method {method.name!r} trains; say how much, with a training budget.")
    draws = _draws(method)
    return Subject(
        model=model,
        method=replace(method, seed=seed) if draws else method,
        ratio=0.0 if method.when == "never" else ratio,
        seed=seed if draws or trains or method.needs_calibration else 0,
        calibration=calibration if method.needs_calibration else None,
        budget=budget if trains else None,
        dtype=dtype,
        device=device,
        weights=weights,
    )


def _draws(method: Method) -> bool:
    return method.importance in ("random", "lora-guided") and method.when != "never"


def grid(subjects: Sequence[Subject], measures: Sequence[Measure]) -> list[Cell]:
    """Every subject on every measure, nothing twice."""
    return list(dict.fromkeys(Cell(s, m) for s in subjects for m in measures))


def _key(record: dict[str, Any]) -> str:
    text = json.dumps([_FORMAT, record], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
