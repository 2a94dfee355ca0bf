"""`probeprune recover` and `probeprune loraprune`: training after pruning, and while pruning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import typer

from probeprune.cli.groups import (
    TEXT,
    CheckpointOptions,
    EvaluationOptions,
    LoadOptions,
    Model,
    Ratio,
    WidthOptions,
)
from probeprune.cli.options import grouped
from probeprune.cli.saved import print_trained
from probeprune.cli.terminal import err, notices, progress_bar
from probeprune.cli.values import one_of
from probeprune.errors import UsageError, first_line
from probeprune.experiment.cells import TrainingBudget
from probeprune.model.loading import EMBEDDED_MODEL, LoadedModel
from probeprune.processes import shares
from probeprune.ranges import RANGES
from probeprune.training.settings import Distillation, Lora, Training, micro_batch_for


@dataclass(frozen=True)
class TrainingOptions:
    """How long, how fast and on which text a model is trained."""

    panel: ClassVar[str] = "Training"
    steps: Annotated[int, typer.Option(help="Number of optimiser steps."), RANGES["steps"]] = Training.steps
    batch_size: Annotated[
        int, typer.Option(help="Sequences per optimiser step, over all processes."), RANGES["batch_size"]
    ] = Training.batch_size
    micro_batch: Annotated[
        int | None,
        typer.Option(
            help="Sequences per forward pass of one process; fewer take less memory.",
            show_default=f"{Training.micro_batch}, or the most that divides a smaller or odd batch",
        ),
        RANGES["micro_batch"],
    ] = None
    length: Annotated[int, typer.Option(help="Tokens per training sequence."), RANGES["length"]] = (
        Training.length
    )
    learning_rate: Annotated[
        float, typer.Option(help="Highest learning rate; it falls linearly to zero."), RANGES["learning_rate"]
    ] = Training.learning_rate
    rank: Annotated[int, typer.Option(help="Rank of the LoRA adapters."), RANGES["rank"]] = Lora.rank
    alpha: Annotated[
        int, typer.Option(help="LoRA alpha; adapters are scaled by alpha / rank."), RANGES["alpha"]
    ] = Lora.alpha
    dropout: Annotated[float, typer.Option(help="Dropout before the LoRA adapters."), RANGES["dropout"]] = (
        Lora.dropout
    )
    text: Annotated[str, typer.Option(help=f"Training text: {TEXT}.")] = TrainingBudget.corpus
    packing: Annotated[
        bool,
        typer.Option(
            "--packing",
            help="Join documents and cut the result into sequences, instead of cutting one sequence "
            "from each document.",
        ),
    ] = TrainingBudget.packing
    evaluate_every: Annotated[
        int,
        typer.Option(
            help="Optimiser steps between evaluations on held-out text; each also writes a checkpoint."
        ),
        RANGES["evaluate_every"],
    ] = Training.evaluate_every
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Recompute activations in the backward pass: takes less memory and a third more time.",
        ),
    ] = Training.gradient_checkpointing
    seed: Annotated[
        int,
        typer.Option(help="Random seed for the order of the text, the adapters and dropout."),
        RANGES["seed"],
    ] = Training.seed

    def lora(self) -> Lora:
        """The adapters."""
        return Lora(self.rank, self.alpha, self.dropout)

    def settings(self, lora: Lora | None, **changes: Any) -> Training:
        """The settings of the training run.

        Args:
            lora: the adapters; None trains all weights.
            changes: fields of `Training` that only one command has options for.

        Raises `UsageError` for values that do not go together.
        """
        from probeprune import processes

        return Training(
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch or micro_batch_for(self.batch_size, processes.count()),
            length=self.length,
            learning_rate=self.learning_rate,
            lora=lora,
            evaluate_every=self.evaluate_every,
            gradient_checkpointing=self.checkpointing,
            seed=self.seed,
            **changes,
        )


LORAPRUNE = TrainingOptions(steps=300, batch_size=128, length=512, evaluate_every=50)
"""LoRAPrune's published schedule."""


@dataclass(frozen=True)
class RecoveryOptions:
    """What is trained, and when it ends."""

    panel: ClassVar[str] = "Training"
    warmup_steps: Annotated[
        int | None,
        typer.Option(
            help="Number of leading steps in which the learning rate rises.",
            show_default="a sixth of the steps",
        ),
        RANGES["warmup_steps"],
    ] = Training.warmup_steps
    lora: Annotated[bool, typer.Option(help="Train LoRA adapters; --no-lora trains all weights.")] = True
    consumers: Annotated[
        bool,
        typer.Option(
            "--consumers",
            help="Train the output maps of all blocks alone (o_proj, down_proj), with their biases and "
            "without adapters.",
        ),
    ] = False
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold the adapters into the weights and save a plain checkpoint.")
    ] = False
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after this number of evaluations without improvement.",
            show_default="train all steps",
        ),
        RANGES["patience"],
    ] = Training.patience


@dataclass(frozen=True)
class LossOptions:
    """What training minimises."""

    panel: ClassVar[str] = "Loss"
    loss: Annotated[
        str | None,
        typer.Option(
            help="What to minimise: distill (KL divergence to the dense model's predictions) or text "
            "(cross-entropy of the text itself).",
            show_default="distill for a pruned model, text for others",
        ),
    ] = None
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The dense model to distil from.", show_default="the one that the model was pruned from"
        ),
    ] = None
    kl: Annotated[
        str | None,
        typer.Option(
            help="Direction of the divergence: forward (dense to pruned), reverse, or mixed (their mean).",
            show_default=Distillation.direction,
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            help="What the logits of both models are divided by.",
            show_default=f"{Distillation.temperature:g}",
        ),
        RANGES["Distillation.temperature"],
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Number of the dense model's most likely tokens to tell apart; all others count as one.",
            show_default="all",
        ),
        RANGES["top_k"],
    ] = None

    def check(self) -> None:
        """Raise `UsageError` for an unknown loss or direction, and for options without effect."""
        if self.loss is not None:
            one_of("loss", self.loss, ("distill", "text"))
        without = self._given(("teacher", "kl", "temperature", "top_k"))
        if self.loss == "text" and without:
            raise UsageError(f"--loss text has no dense model to follow: leave {' and '.join(without)} out.")
        self.settings()

    def settings(self) -> Distillation:
        """The settings of a distillation. Raises `UsageError` for an unknown direction."""
        changes: dict[str, Any] = {"direction": self.kl, "temperature": self.temperature, "top_k": self.top_k}
        return Distillation(**{name: value for name, value in changes.items() if value is not None})

    def _given(self, fields: tuple[str, ...]) -> list[str]:
        """The options among these that were given."""
        return [f"--{name.replace('_', '-')}" for name in fields if getattr(self, name) is not None]

    def open_teacher(self, student: LoadedModel, load: LoadOptions) -> LoadedModel | None:
        """The teacher, in this process; None where the loss is that of the text.

        Raises `UsageError` where no teacher is known and one is needed, or it cannot be opened.
        """
        from probeprune.jobs.teachers import dense_name, open_teacher

        if self.loss == "text":
            return None
        if self.teacher is not None:
            with err.status("loading the dense model"):
                return open_teacher(self.teacher, student, trust_remote_code=load.trust_remote_code)
        name = dense_name(student)
        if name is None:
            if self.loss is None and not self._given(("kl", "temperature", "top_k")):
                return None
            raise UsageError(
                f"no record says which dense model '{student.name}' was pruned from; give it as --teacher."
            )
        try:
            with err.status("loading the dense model"):
                return open_teacher(name, student)  # a record is no reason to run a model's own code
        except UsageError as error:
            raise UsageError(
                f"the dense model that '{student.name}' was pruned from could not be opened "
                f"({first_line(error)}); give it as --teacher, or choose --loss text."
            ) from error


@grouped
def recover(
    *,
    model: Annotated[
        str,
        typer.Argument(
            help="Model to train: a pruned checkpoint, or any model that `probeprune prune` takes."
        ),
    ],
    output: CheckpointOptions,
    training: TrainingOptions,
    recovery: RecoveryOptions,
    loss: LossOptions,
    evaluation: EvaluationOptions,
    load: LoadOptions,
) -> None:
    """Train a pruned model to recover the quality that pruning cost.

    A pruned model learns the predictions of the dense model that it came from (distillation), others the text
    itself. The result is a PEFT adapter, or with --merge a checkpoint. Perplexity is measured before and
    after on windows of 512 tokens, and with a dense model the agreement with it. A run that was interrupted
    continues when started again with the same options. To train with several processes, run
    `torchrun -m probeprune recover ...` or use `accelerate launch`.

    Example: [bold]probeprune recover pruned --out recovered --merge[/bold]
    """
    from probeprune.jobs.train import TrainingJob, recover_to
    from probeprune.training.settings import TrainingText

    _begin(output, load)
    loss.check()
    settings = training.settings(
        training.lora() if recovery.lora and not recovery.consumers else None,
        weights="consumers" if recovery.consumers else "all",
        warmup_steps=recovery.warmup_steps,
        patience=recovery.patience,
    )
    measured_on = evaluation.text()
    with shares.sharing():
        loaded = load.open_everywhere(model)
        with shares.alike():
            teacher = loss.open_teacher(loaded, load)
    if teacher is not None:
        settings = replace(settings, distillation=loss.settings())
    with notices(), progress_bar() as show:
        record = recover_to(
            loaded,
            output.out_dir,
            TrainingJob(settings, measured_on, TrainingText(training.text, training.packing)),
            teacher=teacher,
            merge=recovery.merge,
            pruning=loaded.pruning,
            save_dtype=load.dtype_to_save(loaded),
            progress=show,
        )
    print_trained(record, output.out_dir, output.as_json)


@grouped
def loraprune(
    *,
    ratio: Ratio,
    output: CheckpointOptions,
    model: Model = EMBEDDED_MODEL,
    widths: WidthOptions,
    training: TrainingOptions = LORAPRUNE,
    evaluation: EvaluationOptions,
    load: LoadOptions,
) -> None:
    """Prune a model while LoRA trains it (LoRAPrune), and save a smaller checkpoint.

    The adapters are merged into the weights. Perplexity is measured before and after on windows of 512
    tokens. With --layout per-layer, the first tenth of the layers stays dense unless --skip-layers is given.

    Example: [bold]probeprune loraprune smollm2-135m --ratio 0.2 --out pruned[/bold]
    """
    from probeprune.jobs.train import TrainingJob, loraprune_to
    from probeprune.training.loraprune import LoraPruneCut
    from probeprune.training.settings import TrainingText

    _begin(output, load)
    layout = widths.checked_layout()
    settings = training.settings(training.lora(), warmup_steps=0, keep_best=False)
    measured_on = evaluation.text()
    with shares.sharing():
        loaded = load.open_everywhere(model)
    with notices(), progress_bar() as show:
        record = loraprune_to(
            loaded,
            output.out_dir,
            LoraPruneCut(ratio, layout, widths.skip_layers, widths.rounding()),
            TrainingJob(settings, measured_on, TrainingText(training.text, training.packing)),
            save_dtype=load.dtype_to_save(loaded),
            progress=show,
        )
    print_trained(record, output.out_dir, output.as_json)


def _begin(output: CheckpointOptions, load: LoadOptions) -> None:
    """Connect the processes, and let the first one try where the result goes."""
    from probeprune import processes
    from probeprune.jobs.train import check_output

    processes.join(load.device)
    if processes.is_first():
        check_output(output.out_dir)
