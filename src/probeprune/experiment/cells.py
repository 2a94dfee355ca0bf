"""Experiments as data: a cell is a subject (one model pruned by one method) and a measure to take on it.

A cell's key is a hash of everything that determines its result, so that results can be found again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from probeprune import records
from probeprune.data.windows import BATCH_SIZE, CALIBRATION, Sampling, Text
from probeprune.errors import UsageError
from probeprune.evaluation.perplexity import Averaging
from probeprune.evaluation.tasks import TaskSettings
from probeprune.methods import METHODS, Method
from probeprune.plan import may_need
from probeprune.ranges import check_fields, plain
from probeprune.strategies.importance import IMPORTANCES
from probeprune.training.settings import Training, TrainingText, micro_batch_for

_FORMAT = 1
"""Version of the key; raise it when the same settings come to give another result."""


@dataclass(frozen=True)
class TrainingBudget:
    """How long a method may train and on which text; all else follows in LLM-Pruner's proportions.

    Raises `UsageError` for the values that `Training` refuses.
    """

    steps: int = Training.steps
    batch_size: int = Training.batch_size
    """Sequences an optimiser step."""
    length: int = Training.length
    """Tokens a sequence."""
    learning_rate: float = Training.learning_rate
    corpus: str = TrainingText.corpus
    packing: bool = TrainingText.packing

    def __post_init__(self) -> None:
        check_fields(self)
        self.training(seed=0)

    def training(self, seed: int) -> Training:
        """The settings of the training run.

        Held-out text is evaluated four times.
        """
        return Training(
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch=micro_batch_for(self.batch_size),
            length=self.length,
            learning_rate=self.learning_rate,
            evaluate_every=max(self.steps // 4, 1),
            seed=seed,
        )

    @property
    def text(self) -> TrainingText:
        """The text to train on."""
        return TrainingText(self.corpus, self.packing)

    def record(self) -> dict[str, Any]:
        """Everything that determines the training but its seed, as JSON has it.

        Fields of `Training` that no budget sets are left out: keys stay what they were before there were any.
        """
        training = asdict(self.training(seed=0))
        for name in ("weights", "distillation"):
            del training[name]
        return {"training": training, **asdict(self.text)}


@dataclass(frozen=True)
class Setting:
    """What the subjects of one comparison share: a model, the machine's part, and the texts."""

    model: str
    dtype: str
    """Name of the torch dtype the model computes in, such as `float32`."""
    device: str
    calibration: Text = CALIBRATION
    budget: TrainingBudget | None = None
    """For methods that train; None where there are none."""
    weights: str = ""
    """Fingerprint of the weights of a local directory."""


@dataclass(frozen=True)
class Subject:
    """One model pruned by one method. Made by `subject`, which drops the settings that have no effect."""

    model: str
    method: Method
    ratio: float
    seed: int
    """Draws calibration windows, the method's random numbers, and the order of training text."""
    calibration: Text | None
    budget: TrainingBudget | None
    dtype: str
    device: str
    weights: str
    """Fingerprint of the weights of a local directory; else empty."""

    @property
    def label(self) -> str:
        """Short name for people, such as `probe 40%`."""
        name = self.method.name
        return f"{name} {self.ratio:.0%}" if prunes(self.method) else name

    @property
    def seed_matters(self) -> bool:
        """Whether another seed gives another model."""
        return self.calibration is not None or self.budget is not None or _draws(self.method)

    @cached_property
    def key(self) -> str:
        """Hash of all settings."""
        budget = None if self.budget is None else self.budget.record()
        calibration = None if self.calibration is None else self.calibration.record()
        return _key({**records.to_json(self), "budget": budget, "calibration": calibration})


@dataclass(frozen=True)
class TextMeasure:
    """Perplexity on windows of a text. Raises `UsageError` for values out of range."""

    corpus: str = "wikitext2"
    windows: int | None = 48
    """Number of windows, from the start of the text; None for all."""
    length: int = CALIBRATION.length
    """Tokens a window."""
    batch_size: int = BATCH_SIZE
    """Windows a batch; dynamic methods prune at each batch."""
    sampling: Sampling = "in-order"
    averaging: Averaging = "token"
    seed: int = 0
    """Draws the windows under `published` sampling."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.averaging == "published" and self.windows is not None and self.windows < self.batch_size:
            raise UsageError(
                f"published averaging needs a full batch: {self.windows} windows are fewer than batch_size "
                f"{self.batch_size}."
            )

    @property
    def name(self) -> str:
        """The column of the table."""
        return self.corpus


@dataclass(frozen=True)
class TaskMeasure:
    """Accuracy on a commonsense task. Raises `UsageError` for what `TaskSettings` refuses."""

    task: str
    limit: int | None = None
    """Number of items, from the first one; None for all."""
    batch_size: int | None = None
    """Answer options a batch; dynamic methods prune at each batch. None for the protocol's default."""
    order: Literal["length", "given"] | None = None
    """Order of the options: the longest first, or as given. None for the protocol's default."""
    protocol: Literal["harness", "published"] = "harness"
    source: Literal["local", "hub"] = "local"

    def __post_init__(self) -> None:
        check_fields(self)
        self.settings()

    def settings(self) -> TaskSettings:
        """How the task is scored."""
        return TaskSettings(self.limit, self.batch_size, self.source, self.protocol, self.order)

    @property
    def name(self) -> str:
        """The column of the table; each protocol has its own."""
        return self.task if self.protocol == "harness" else f"{self.task} ({self.protocol})"


@dataclass(frozen=True)
class CostMeasure:
    """Time and memory beside the dense model, measured in turn with it.

    Raises `UsageError` for values out of range.
    """

    batch_size: int = BATCH_SIZE
    length: int = CALIBRATION.length
    """Tokens of the prompt."""
    new_tokens: int = 32
    """Tokens decoded after the prompt."""
    rounds: int = 3
    """Repetitions; figures are medians over them."""
    time_calibration: bool = True
    """Whether to measure the time to calibrate, on a few windows."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """The column of the table."""
        return "cost"


Measure = TextMeasure | TaskMeasure | CostMeasure


@dataclass(frozen=True)
class Cell:
    """One measurement: a subject and the measure to take on it."""

    subject: Subject
    measure: Measure

    @cached_property
    def key(self) -> str:
        """Hash of everything that determines the result."""
        return _key({"subject": self.subject.key, type(self.measure).__name__: asdict(self.measure)})


def prunes(method: Method) -> bool:
    """Whether the method removes units at all: all do but the dense model."""
    return method.when.prunes


def trains(method: Method) -> bool:
    """Whether the method trains the model, after pruning or meanwhile."""
    return method.when.trains


def subject(setting: Setting, method: Method, ratio: float, seed: int = 0) -> Subject:
    """The subject without the settings that have no effect on it, so that equal subjects have equal keys.

    The dense model, for example, has no ratio, no seed and no calibration. Raises `UsageError` for an
    impossible ratio, and for a method that trains where the setting has no budget.
    """
    ratio, seed = plain("ratio", ratio), plain("seed", seed)
    draws, training, calibrated = _draws(method), trains(method), bool(may_need(method))
    if training and setting.budget is None:
        raise UsageError(f"method {method.name!r} trains the model: give a training budget.")
    return Subject(
        model=setting.model,
        method=replace(method, seed=seed) if draws else method,
        ratio=ratio if prunes(method) else 0.0,
        seed=seed if draws or training or calibrated else 0,
        calibration=setting.calibration if calibrated else None,
        budget=setting.budget if training else None,
        dtype=setting.dtype,
        device=setting.device,
        weights=setting.weights,
    )


def dense_subject(pruned: Subject) -> Subject:
    """The dense model of a subject; itself where it is that."""
    return replace(pruned, method=METHODS["dense"], ratio=0.0, seed=0, calibration=None, budget=None)


def _draws(method: Method) -> bool:
    """Whether the method's own random numbers change its units."""
    of_experts = method.experts == "expert" and method.expert_importance == "random"
    return (IMPORTANCES[method.importance].draws or of_experts) and prunes(method)


def grid(subjects: Sequence[Subject], measures: Sequence[Measure]) -> list[Cell]:
    """One cell for every subject and measure, without repeats.

    None for the cost of a trained model: it is that of the same cut without training.
    """
    return list(
        dict.fromkeys(
            Cell(s, m)
            for s in subjects
            for m in measures
            if not (trains(s.method) and isinstance(m, CostMeasure))
        )
    )


def _key(record: dict[str, Any]) -> str:
    text = json.dumps([_FORMAT, record], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
