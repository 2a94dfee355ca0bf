"""The lines of `results.jsonl`: one JSON object a measurement, or a failure. Every key is documented here.

Writers (`experiment/`) and readers (`report/`) share these types, so that a misspelt key is a type error.
Files may come from elsewhere: `check_line` holds a line against these types, for all who read any. Few keys
are required (`REQUIRED`). Shares are of 1, times in seconds, memory in bytes. Numbers are finite.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import Required, TypedDict

_DEPTH = 20
"""How deep settings may be nested; readers walk through them."""


def _settings(value: dict[str, Any]) -> dict[str, Any]:
    """Raise `ValueError` for settings that are nested too deeply to be walked through."""
    layer: list[Any] = [value]
    for _ in range(_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in layer if isinstance(v, dict | list)]
        layer = [v for values in inner for v in values]
    if layer:
        raise ValueError("is nested too deeply")
    return value


def _method(value: dict[str, Any]) -> dict[str, Any]:
    """Raise `ValueError` for the record of a method that does not say when units are cut."""
    when = value.get("when")
    if not isinstance(when, dict) or not isinstance(when.get("kind"), str):
        raise ValueError("has no 'when'")
    return value


def _positive(value: float) -> float:
    """Raise `ValueError` for what cannot be divided by."""
    if value < 1e-30:
        raise ValueError("is not above 0")
    return value


def _error(value: float) -> float:
    """Raise `ValueError` for no standard error; NaN is one, of a single window."""
    if not isinstance(value, float | int) or value < 0 or value > 1e30:
        raise ValueError("is not a number from 0")
    return value


SettingsRecord = Annotated[dict[str, Any], AfterValidator(_settings)]
"""Settings as nested JSON records; `report/settings.py` reads them."""
MethodRecord = Annotated[dict[str, Any], AfterValidator(_settings), AfterValidator(_method)]
"""The settings of a method."""

Name = Annotated[str, Field(max_length=1000)]
"""What fits into a heading."""
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e30, le=1e30)]
"""Any measurement."""
Amount = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e30)]
"""A number from 0."""
Share = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1)]
"""A share of 1."""
Loss = Annotated[float, Field(allow_inf_nan=False, ge=0, le=700)]
"""Nats a token; beyond it, the perplexity is no number."""
StandardError = Annotated[float, AfterValidator(_error)]
"""A number from 0, or NaN where one window has no spread."""
Positive = Annotated[float, Field(allow_inf_nan=False, le=1e30), AfterValidator(_positive)]
"""A number above 0, to divide by."""
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""A whole number from 0."""


class TrainingRecord(TypedDict, total=False):
    """How a model was trained: settings first, then measurements."""

    corpus: Name
    """Name of the training text."""
    steps: Count
    """Optimiser steps."""
    batch_size: Count
    """Sequences a step."""
    length: Count
    """Tokens a sequence."""
    learning_rate: Amount
    """Peak learning rate."""
    best_step: Count
    """The step whose weights were kept."""
    tokens: Count
    """Tokens trained on."""
    seconds: Amount
    """Time of training."""
    peak_memory: Count
    """Bytes."""
    held_out_loss: list[Loss]
    """On held-out text before and after, in nats a token."""


class PhaseRecord(TypedDict, total=False):
    """Speed of prefill or decode; medians over interleaved rounds."""

    seconds: Amount
    """Time of a prefill, or of decoding one token."""
    tokens_per_second: Positive
    speedup: Positive
    """Dense time over the method's, in the same round."""
    speedup_range: Annotated[list[Positive], Field(min_length=1)]
    """Lowest and highest round."""
    efficiency: Amount
    """Speed-up times the share of work that is left; 1 where all work saved is time saved."""


class UnitRecord(TypedDict, total=False):
    """Which units of one block were kept."""

    name: Name
    """The block's module path."""
    layer: Required[Count]
    """Index from 0."""
    kind: Required[Name]
    """`attention` or `mlp`."""
    of: Required[Count]
    """Units of the dense block."""
    kept: Required[Count]
    """Units kept."""
    batches: Count
    """Batches counted; 1 for a static method."""
    frequency: Required[list[Share]]
    """Share of batches in which a unit was kept: one a head; channels sorted, averaged in bins."""
    changed: Amount
    """Mean share of the kept units that were new in a batch."""


class AccuracyRecord(TypedDict):
    """One metric of a task."""

    value: Share
    """Share of items that are right."""
    standard_error: StandardError
    """Over items."""


class PaysRecord(TypedDict, total=False):
    """Which batches a method with `pays="auto"` probed, and by which costs it decided."""

    batches: Count
    """Batches run, prompts included."""
    probed: Count
    """Those of them that were probed."""
    costs: dict[str, list[Amount]]
    """The fields of `Costs`: sizes in tokens, and seconds."""


class Identity(TypedDict, total=False):
    """The first part of every line: which model, pruned how."""

    kind: Literal["result", "failure"]
    key: Name
    """A hash of all settings that determine the result. Of lines with the same key, the last counts."""
    model: Name
    name: Name
    """The method's name."""
    method: MethodRecord
    ratio: Share
    """Pruning ratio asked for, as a share; 0 for the dense model."""
    seed: Count
    calibration: SettingsRecord | None
    """The calibration text and its windows; None for a method without calibration."""
    task: Name
    """The text, the task, or `cost`."""


class FailureLine(Identity, total=False):
    """A measurement that failed."""

    error: str
    """One sentence that says why."""


class ResultLine(Identity, total=False):
    """The part that all results share."""

    training: TrainingRecord | None
    """None for an untrained model."""
    removed_share: Share
    """Share of all blocks' parameters that are left out."""
    dtype: Name
    device: Name
    threads: Count
    """CPU threads."""
    versions: dict[str, str]
    """Of the libraries that a result depends on, by name."""
    metric: Literal["perplexity", "accuracy", "cost"]
    value: Number
    """Perplexity, accuracy as a share, or prefill speed-up."""
    standard_error: StandardError | None
    """Of `value`, over windows or items of this one run."""
    batch_size: Count
    """Windows, options or prompts a batch."""
    peak_memory: Count
    """Bytes."""
    pays: PaysRecord
    """Missing where every batch was probed, or none."""


class AgreementRecord(TypedDict, total=False):
    """How far a model predicts what the dense one does."""

    top1: Required[Share]
    """Share of tokens whose likeliest successor is the dense model's."""
    top1_error: StandardError
    """Over windows."""
    divergence: Required[Amount]
    """Mean KL(dense || model) in nats a token; all but the dense model's `top_k` likeliest tokens are one."""
    divergence_error: StandardError
    """Over windows."""
    top_k: Count


class TextLine(ResultLine, total=False):
    """Perplexity on a text, and its cost."""

    losses: list[Loss]
    """Mean loss of each window, in nats a token."""
    agreement: AgreementRecord | None
    """With the dense model's predictions; None for the dense model."""
    windows: Count
    length: Count
    """Tokens a window."""
    sampling: Name
    """How windows were drawn: `in-order` or `published`."""
    averaging: Name
    """Over what losses are averaged: `token` or `published`."""
    flops_per_token: Positive
    """FLOPs of the decoder, the probe included."""
    probe_flops_share: Amount
    """FLOPs of the probe over those of all dense blocks, on average over batches."""
    tokens: Count
    """Tokens run through the model."""
    seconds: Amount
    """Time in forward passes."""
    tokens_per_second: Positive
    units: list[UnitRecord]
    """One a block; empty for the dense model."""


class TaskLine(ResultLine, total=False):
    """Accuracy on a task."""

    metrics: dict[str, AccuracyRecord]
    """By name: `acc`, and `acc_norm` where the task has it."""
    main: Name
    """The metric that `value` is."""
    correct: Annotated[str, Field(pattern="^[01]*$")]
    """One 0 or 1 an item."""
    items: Count
    protocol: Name
    """`harness` or `published`."""
    source: Name
    """Where the items came from: `local` or `hub`."""
    order: Name
    """Order of the options in batches: `length` or `given`."""
    padding: Amount
    """Share of the positions run that were padding."""
    batches: Count
    tokens: Count
    """Real tokens run through the model."""
    seconds: Amount
    """Time in forward passes."""
    tokens_per_second: Positive


class CostLine(ResultLine, total=False):
    """Time and memory beside the dense model."""

    prefill: PhaseRecord
    decode: PhaseRecord
    length: Count
    """Tokens of the prompt."""
    new_tokens: Count
    """Tokens decoded after the prompt."""
    rounds: Count
    """Interleaved rounds."""
    flops_share: Amount
    """FLOPs of a prefill over dense, the probe included."""
    stages: dict[str, Amount]
    """Share of the prefill that each of `stages.STAGES` takes, by name."""
    memory_over_dense: Amount
    """Peak over dense."""
    kv_cache_bytes_per_token: Count
    kv_cache_share: Amount
    """Bytes of the KV cache over dense."""
    parameters: list[Count]
    """Of the whole model: dense, pruned."""
    calibration_seconds: Amount | None
    """Time to collect what the method must know; None for a method without calibration."""


class Line(TextLine, TaskLine, CostLine, FailureLine, total=False):
    """Any line; `kind` and `metric` say which keys to expect."""


REQUIRED = {
    "perplexity": ("name", "method", "ratio", "task", "value"),
    "accuracy": ("name", "method", "ratio", "task", "value", "protocol"),
    "cost": ("name", "method", "ratio", "task", "value"),
    "failure": ("name", "method", "ratio", "error"),
}
"""Keys that every line has, by metric, or of a failure."""

_WORDS = {
    "string_type": "is not a string",
    "string_unicode": "is not whole characters",
    "string_pattern_mismatch": "is not one 0 or 1 an item",
    "int_type": "is not a whole number",
    "float_type": "is not a finite number",
    "finite_number": "is not a finite number",
    "list_type": "is not a list",
    "dict_type": "is not a record",
    "missing": "is missing",
}
"""What a line's key is not, by the kind of error that pydantic names."""

_LINE = TypeAdapter(Line)
_VALUES: dict[str, TypeAdapter[float]] = {
    "perplexity": TypeAdapter(Positive),
    "accuracy": TypeAdapter(Share),
    "cost": TypeAdapter(Number),
}
"""What `value` is, by metric."""


def check_line(line: Any) -> None:
    """Raise `ValueError` for what is no line: it names the first key that is missing or has another type."""
    kind = line.get("kind") if isinstance(line, dict) else None
    if kind not in ("result", "failure"):
        raise ValueError(f"its kind is {kind!r}, neither 'result' nor 'failure'")
    metric = line.get("metric") if kind == "result" else kind
    if not isinstance(metric, str) or metric not in REQUIRED:
        raise ValueError(f"its metric is {metric!r}, none of 'perplexity', 'accuracy' and 'cost'")
    for key in REQUIRED[metric]:
        if key not in line:
            raise ValueError(f"{key!r} is missing")
    try:
        _LINE.validate_python(line, strict=True)
        if kind == "result":
            _VALUES[metric].validate_python(line["value"], strict=True)
    except ValidationError as error:
        raise ValueError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    """The first of pydantic's errors in the words of a reader: the key, and what is wrong with its value."""
    first = error.errors()[0]
    path = ".".join(map(str, first["loc"])) or "value"
    if first["type"] == "value_error":  # raised by our own functions
        return f"{path!r} {first['ctx']['error']}"
    return f"{path!r} {_WORDS.get(first['type']) or 'must' + first['msg'].partition(' should')[2]}"
