"""Settings of training as frozen records: the run, its LoRA adapters, its text."""

from dataclasses import dataclass, field
from math import gcd
from typing import Literal, get_args

from probeprune.algebra.divergence import Direction
from probeprune.errors import UsageError, unknown
from probeprune.ranges import check_fields


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear map of the blocks; the defaults of LLM-Pruner and LoRAPrune.

    Raises `UsageError` for values out of range.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self)


Weights = Literal["all", "consumers"]
"""Weights to train: all, or the consumers alone, the output maps of all blocks, with their biases."""


@dataclass(frozen=True)
class Distillation:
    """How a model's next-token distribution is compared with its teacher's.

    Raises `UsageError` for values out of range.
    """

    direction: Direction = "forward"
    """Direction of the KL divergence; see `algebra.divergence.Direction`."""
    temperature: float = 1.0
    """What both models' logits are divided by."""
    top_k: int | None = None
    """How many of the teacher's likeliest tokens are told apart, all others counting as one; None for all."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.direction not in get_args(Direction):
            raise UsageError(unknown("direction", self.direction, get_args(Direction)))


@dataclass(frozen=True)
class TrainingText:
    """The text to train on, and how it is cut into sequences."""

    corpus: str = "c4"
    """An embedded name, a file or a hub id."""
    packing: bool = False
    """Join documents and cut the result into sequences, instead of one sequence from each document."""


def micro_batch_for(batch_size: int, shares: int = 1) -> int:
    """The micro-batch where none is given: the default one, or the most that divides what each of `shares`
    processes takes of a batch."""
    return gcd(max(batch_size // shares, 1), Training.micro_batch)


@dataclass(frozen=True)
class Training:
    """Settings of a training run. Raises `UsageError` for impossible values.

    The defaults are LLM-Pruner's recovery: 600 steps of 64 sequences of 256 tokens with AdamW; the learning
    rate falls linearly to zero after 100 warm-up steps; no weight decay; gradients clipped to norm 1.
    """

    steps: int = 600
    batch_size: int = 64
    """Sequences per optimiser step, over all processes."""
    micro_batch: int = 4
    """Sequences per forward pass of one process; gradients accumulate until `batch_size` is reached."""
    length: int = 256
    """Tokens per sequence."""
    learning_rate: float = 1e-4
    warmup_steps: int | None = None
    """Steps in which the learning rate rises; None for a sixth of all steps (LLM-Pruner's 100 of 600)."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the gradient."""
    lora: Lora | None = field(default_factory=Lora)
    """Adapters to train; None trains weights."""
    weights: Weights = "all"
    """Which weights are trained without adapters."""
    distillation: Distillation | None = None
    """Train towards a teacher's predictions; None trains to predict the text."""
    evaluate_every: int = 100
    """Steps between evaluations on held-out text, each followed by a checkpoint."""
    evaluate_windows: int | None = None
    """Largest number of held-out sequences in an evaluation; None for a twenty-fifth of those trained on, but
    from 16 to 800 (LLM-Pruner's number)."""
    patience: int | None = None
    """Evaluations without improvement before training stops early; None never stops early."""
    keep_best: bool = True
    """Return the checkpoint with the lowest held-out loss instead of the last one."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of storing them: less memory, a third more time."""
    seed: int = 0
    """Draws data order, adapters and dropout."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.weights not in get_args(Weights):
            raise UsageError(unknown("weights", self.weights, get_args(Weights)))
        if self.lora is not None and self.weights != "all":
            raise UsageError("consumers are trained themselves, without adapters: give lora=None.")
        if self.evaluate_windows is None:
            own = min(max(self.steps * self.batch_size // 25, 16), 800)
            object.__setattr__(self, "evaluate_windows", own)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", self.steps // 6)
        elif self.warmup_steps > self.steps:
            raise UsageError(
                f"warmup_steps {self.warmup_steps} is more than the {self.steps} steps; lower it."
            )
