"""`probeprune recover` and `probeprune loraprune`: training after pruning, and while pruning."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from probeprune.cli.common import (
    DEVICE,
    DTYPE,
    JSON,
    MODEL,
    TRUST,
    err,
    one_of,
    progress_bar,
    say_saved,
    weights_dtype,
)
from probeprune.errors import UsageError
from probeprune.model.checkpoint import Layout
from probeprune.strategies.allocation import check_ratio

STEPS = Annotated[int, typer.Option(help="Optimiser steps.")]
TRAIN_BATCH = Annotated[int, typer.Option(help="Sequences a step, over all processes.")]
MICRO = Annotated[int, typer.Option(help="Sequences a forward pass of one process (memory).")]
RATE = Annotated[float, typer.Option(help="Learning rate, falling linearly to zero.")]
RANK = Annotated[int, typer.Option(help="Rank of LoRA.")]
ALPHA = Annotated[int, typer.Option(help="Alpha of LoRA; alpha / rank scales it.")]
DROPOUT = Annotated[float, typer.Option(help="Dropout in front of LoRA.")]
PACKING = Annotated[
    bool, typer.Option("--packing", help="Put documents one after the other instead of cutting each.")
]
CHECKPOINTING = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
]
CORPUS = Annotated[str, typer.Option(help="Text that perplexity is measured on, before and after.")]
WINDOWS = Annotated[int, typer.Option(help="Windows of 512 tokens of it; 0 measures nothing.")]


def recover(
    model: Annotated[str, typer.Argument(help="A pruned checkpoint, or any model.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the result; new or empty.")],
    steps: STEPS = 600,
    batch_size: TRAIN_BATCH = 64,
    micro_batch: MICRO = 4,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    learning_rate: RATE = 1e-4,
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 100,
    lora: Annotated[bool, typer.Option(help="Train LoRA adapters, or all weights.")] = True,
    rank: RANK = 8,
    alpha: ALPHA = 16,
    dropout: DROPOUT = 0.05,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter into a plain checkpoint.")] = False,
    text: Annotated[str, typer.Option(help="Training text: an embedded name, file or hub id.")] = "c4",
    packing: PACKING = False,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations, and checkpoints.")] = 100,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a better one.")
    ] = None,
    checkpointing: CHECKPOINTING = False,
    corpus: CORPUS = "wikitext2",
    windows: WINDOWS = 16,
    seed: Annotated[int, typer.Option(help="Of data order, adapters and dropout.")] = 0,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Train a pruned model again, so that it recovers what pruning lost.

    The result is a PEFT adapter, with --merge a checkpoint. Killed and started again, it goes on from there.
    Under `torchrun -m probeprune recover ...` or `accelerate launch` several processes share the work.

    Example: [bold]probeprune recover pruned --out recovered --merge[/bold]
    """
    from probeprune.data.windows import Text
    from probeprune.jobs import train as jobs
    from probeprune.model.checkpoint import check_free
    from probeprune.training.settings import Lora, Training, TrainingText

    check_free(out_dir)
    training = Training(
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        length=length,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        lora=Lora(rank, alpha, dropout) if lora else None,
        evaluate_every=evaluate_every,
        patience=patience,
        gradient_checkpointing=checkpointing,
        seed=seed,
    )
    loaded = load_for_training(model, dtype, device, trust_remote_code)
    with progress_bar() as show:
        record = jobs.recover_to(
            loaded,
            out_dir,
            jobs.TrainingJob(training, Text(corpus, windows), TrainingText(text, packing)),
            merge=merge,
            pruning=pruning_of(model),
            save_dtype=weights_dtype(loaded, dtype),
            progress=show,
        )
    say_trained(record, out_dir, as_json)


def loraprune(
    ratio: Annotated[float, typer.Option(help="Share of the blocks' parameters to remove.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Directory for the checkpoint; new or empty.")],
    model: MODEL = "smollm2-135m",
    layout: Annotated[str, typer.Option(help="uniform or per-layer, as in `prune`.")] = "uniform",
    round_to: Annotated[int, typer.Option(help="MLP widths are multiples of this (for speed).")] = 64,
    skip_layers: Annotated[
        int | None, typer.Option(help="First layers that are not pruned (per-layer only). [default: a tenth]")
    ] = None,
    steps: STEPS = 300,
    batch_size: TRAIN_BATCH = 128,
    micro_batch: MICRO = 4,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    learning_rate: RATE = 1e-4,
    rank: RANK = 8,
    alpha: ALPHA = 16,
    dropout: DROPOUT = 0.05,
    text: Annotated[str, typer.Option(help="Training text: an embedded name, file or hub id.")] = "c4",
    packing: PACKING = False,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations, and checkpoints.")] = 50,
    checkpointing: CHECKPOINTING = False,
    corpus: CORPUS = "wikitext2",
    windows: WINDOWS = 16,
    seed: Annotated[int, typer.Option(help="Of data order, adapters and dropout.")] = 0,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Prune a model while LoRA trains it (LoRAPrune), and save the smaller, merged checkpoint.

    Example: [bold]probeprune loraprune smollm2-135m --ratio 0.2 --out pruned[/bold]
    """
    from probeprune.data.windows import Text
    from probeprune.jobs import train as jobs
    from probeprune.model.checkpoint import check_free
    from probeprune.training.loraprune import LoraPruneCut
    from probeprune.training.settings import Lora, Training, TrainingText

    check_free(out_dir)
    check_ratio(ratio)
    one_of("layout", layout, get_args(Layout))
    if layout == "uniform" and skip_layers:
        raise UsageError("the uniform layout gives all layers one width: leave --skip-layers out.")
    training = Training(
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        length=length,
        learning_rate=learning_rate,
        warmup_steps=0,
        lora=Lora(rank, alpha, dropout),
        evaluate_every=evaluate_every,
        keep_best=False,
        gradient_checkpointing=checkpointing,
        seed=seed,
    )
    loaded = load_for_training(model, dtype, device, trust_remote_code)
    with progress_bar() as show:
        record = jobs.loraprune_to(
            loaded,
            out_dir,
            LoraPruneCut(ratio, layout, skip_layers, round_to),  # type: ignore[arg-type]
            jobs.TrainingJob(training, Text(corpus, windows), TrainingText(text, packing)),
            save_dtype=weights_dtype(loaded, dtype),
            progress=show,
        )
    say_trained(record, out_dir, as_json)


def pruning_of(model: str) -> dict[str, Any] | None:
    """What `prune` wrote beside a checkpoint about its making."""
    file = Path(model).expanduser() / "pruning.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def load_for_training(model: str, dtype: str, device: str, trust_remote_code: bool) -> Any:
    """The model in every process, each on its own device."""
    from probeprune.model.loading import load_model
    from probeprune.training import processes

    processes.join(device)
    with err.status("loading the model"):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        chosen = processes.agreed(loaded.dtype)  # auto measures, so processes could differ
        loaded.model.to(chosen)
    return dataclasses.replace(loaded, dtype=chosen)


def say_trained(record: dict[str, Any], out_dir: Path, as_json: bool) -> None:
    """The outcome of a training run, once."""
    from probeprune.training import processes

    if not processes.is_first():
        return
    before, after = record["held_out_loss"]
    did = (
        f"{record['steps']} steps, {record['tokens']:,} tokens in {record['seconds']:.0f} s; held-out loss "
        f"{before:.3f} -> {after:.3f}"
    )
    say_saved(record, out_dir, did, ("before", "after"), as_json)
