"""The lines of `results.jsonl`: one JSON object a measurement, or a failure. Every key is documented here.

Writers (`experiment/`) and readers (`report/`) share these types, so that a misspelt key is a type error. No
key is required: files may come from elsewhere, and `report.read_results` checks the keys that it needs.
Shares are of 1, times in seconds, memory in bytes.
"""

from typing import Any, Literal, TypedDict

MethodRecord = dict[str, Any]
"""The settings of a method, as nested JSON records; `report/settings.py` reads them."""


class TrainingRecord(TypedDict, total=False):
    """How a model was trained: settings first, then measurements."""

    corpus: str
    """Name of the training text."""
    steps: int
    """Optimiser steps."""
    batch_size: int
    """Sequences a step."""
    length: int
    """Tokens a sequence."""
    learning_rate: float
    """Peak learning rate."""
    best_step: int
    """The step whose weights were kept."""
    tokens: int
    """Tokens trained on."""
    seconds: float
    """Time of training."""
    peak_memory: int
    """Bytes."""
    held_out_loss: list[float]
    """On held-out text before and after, in nats a token."""


class PhaseRecord(TypedDict, total=False):
    """Speed of prefill or decode; medians over interleaved rounds."""

    seconds: float
    """Time of a prefill, or of decoding one token."""
    tokens_per_second: float
    speedup: float
    """Dense time over the method's, in the same round."""
    speedup_range: list[float]
    """Lowest and highest round."""
    efficiency: float
    """Speed-up times the share of work that is left; 1 where all work saved is time saved."""


class UnitRecord(TypedDict, total=False):
    """Which units of one block were kept."""

    name: str
    """The block's module path."""
    layer: int
    """Index from 0."""
    kind: str
    """`attention` or `mlp`."""
    of: int
    """Units of the dense block."""
    kept: int
    """Units kept."""
    batches: int
    """Batches counted; 1 for a static method."""
    frequency: list[float]
    """Share of batches in which a unit was kept: one a head; channels sorted, averaged in bins."""
    changed: float
    """Mean share of the kept units that were new in a batch."""


class AccuracyRecord(TypedDict):
    """One metric of a task."""

    value: float
    """Share of items that are right."""
    standard_error: float
    """Over items."""


class Identity(TypedDict, total=False):
    """The first part of every line: which model, pruned how."""

    kind: Literal["result", "failure"]
    key: str
    """A hash of all settings that determine the result. Of lines with the same key, the last counts."""
    model: str
    name: str
    """The method's name."""
    method: MethodRecord
    ratio: float
    """Pruning ratio asked for, as a share; 0 for the dense model."""
    seed: int
    calibration: dict[str, Any] | None
    """The calibration text and its windows; None for a method without calibration."""
    task: str
    """The text, the task, or `cost`."""


class FailureLine(Identity, total=False):
    """A measurement that failed."""

    error: str
    """One sentence that says why."""


class ResultLine(Identity, total=False):
    """The part that all results share."""

    training: TrainingRecord | None
    """None for an untrained model."""
    removed_share: float
    """Share of all blocks' parameters that are left out."""
    dtype: str
    device: str
    threads: int
    """CPU threads."""
    versions: dict[str, str]
    """Of the libraries that a result depends on, by name."""
    metric: Literal["perplexity", "accuracy", "cost"]
    value: float
    """Perplexity, accuracy as a share, or prefill speed-up."""
    standard_error: float | None
    """Of `value`, over windows or items of this one run."""
    batch_size: int
    """Windows, options or prompts a batch."""
    peak_memory: int
    """Bytes."""


class TextLine(ResultLine, total=False):
    """Perplexity on a text, and its cost."""

    losses: list[float]
    """Mean loss of each window, in nats a token."""
    windows: int
    length: int
    """Tokens a window."""
    sampling: str
    """How windows were drawn: `in-order` or `published`."""
    averaging: str
    """Over what losses are averaged: `token` or `published`."""
    flops_per_token: float
    """FLOPs of the decoder, the probe included."""
    probe_flops_share: float
    """FLOPs of the probe over those of all dense blocks."""
    tokens: int
    """Tokens run through the model."""
    seconds: float
    """Time in forward passes."""
    tokens_per_second: float
    units: list[UnitRecord]
    """One a block; empty for the dense model."""


class TaskLine(ResultLine, total=False):
    """Accuracy on a task."""

    metrics: dict[str, AccuracyRecord]
    """By name: `acc`, and `acc_norm` where the task has it."""
    main: str
    """The metric that `value` is."""
    correct: str
    """One 0 or 1 an item."""
    items: int
    protocol: str
    """`harness` or `published`."""
    source: str
    """Where the items came from: `local` or `hub`."""
    order: str
    """Order of the options in batches: `length` or `given`."""
    padding: float
    """Share of the positions run that were padding."""
    batches: int
    tokens: int
    """Real tokens run through the model."""
    seconds: float
    """Time in forward passes."""
    tokens_per_second: float


class CostLine(ResultLine, total=False):
    """Time and memory beside the dense model."""

    prefill: PhaseRecord
    decode: PhaseRecord
    length: int
    """Tokens of the prompt."""
    new_tokens: int
    """Tokens decoded after the prompt."""
    rounds: int
    """Interleaved rounds."""
    flops_share: float
    """FLOPs of a prefill over dense, the probe included."""
    stages: dict[str, float]
    """Share of the prefill that each of `stages.STAGES` takes, by name."""
    memory_over_dense: float
    """Peak over dense."""
    kv_cache_bytes_per_token: int
    kv_cache_share: float
    """Bytes of the KV cache over dense."""
    parameters: list[int]
    """Of the whole model: dense, pruned."""
    calibration_seconds: float | None
    """Time to collect what the method must know; None for a method without calibration."""


class Line(TextLine, TaskLine, CostLine, FailureLine, total=False):
    """Any line; `kind` and `metric` say which keys to expect."""
