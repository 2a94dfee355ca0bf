"""How long, how fast and with what a model is trained."""

from dataclasses import dataclass, field

from probeprune.errors import UsageError


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on every linear map of the blocks (LLM-Pruner's and LoRAPrune's defaults)."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05


@dataclass(frozen=True)
class TrainingText:
    """The text to train on, and how sequences are made of it."""

    corpus: str = "c4"
    """An embedded name, a file or a hub id."""
    packing: bool = False
    """Join documents and cut the result into sequences, instead of one sequence from each document."""


@dataclass(frozen=True)
class Training:
    """How long and how a model is trained. Raises `UsageError` for sizes that make no sense.

    The defaults are LLM-Pruner's recovery: 600 steps of 64 sequences of 256 tokens, AdamW, 100 warm-up steps,
    then linearly to zero, no weight decay, gradients clipped at norm 1.
    """

    steps: int = 600
    batch_size: int = 64
    """Sequences an optimiser step, over all processes."""
    micro_batch: int = 4
    """Sequences a forward pass of one process; gradients are accumulated up to `batch_size`."""
    length: int = 256
    """Tokens a sequence."""
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.0
    clip: float = 1.0
    lora: Lora | None = field(default_factory=Lora)
    """None trains all weights."""
    evaluate_every: int = 100
    """Steps between two evaluations on held-out text, each followed by a checkpoint."""
    evaluate_windows: int = 800
    """Held-out sequences an evaluation looks at, at most (LLM-Pruner holds out 800)."""
    patience: int | None = None
    """Stop early after this many evaluations without a better one."""
    keep_best: bool = True
    """End with the checkpoint that was best on held-out text, not the last one."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, a third more time."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "evaluate_every", "evaluate_windows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1.")
        if self.length < 2 or not self.learning_rate > 0 or self.warmup_steps < 0:
            raise UsageError("training needs sequences of at least 2 tokens and a positive learning rate.")
        if self.lora is not None and self.lora.rank < 1:
            raise UsageError("the rank of LoRA must be at least 1; to train all weights, leave LoRA out.")
