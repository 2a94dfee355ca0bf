"""The outcome of commands that save a model, in a few lines or as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probeprune.cli.facts import missed
from probeprune.cli.terminal import print_line, print_text, warn


def print_saved(
    record: dict[str, Any], folder: Path, summary: str, compared: Sequence[str], as_json: bool
) -> None:
    """The outcome of a command that saves a checkpoint: its record as JSON, or two lines.

    Args:
        record: as in `pruning.json` or `training.json`.
        folder: the checkpoint.
        summary: what was done and how long it took.
        compared: the names of the perplexities to print, in this order.
        as_json: print the record alone.
    """
    if as_json:
        print(json.dumps(record))
        return
    print_line(f"{folder}: {summary}", "green", mark="saved")
    evaluation = record["evaluation"]
    if evaluation is not None:
        figures = ", ".join(f"{name} {evaluation['perplexity'][name]:.2f}" for name in compared)
        print_text(f"{evaluation['corpus']} perplexity: {figures}")


def print_trained(record: dict[str, Any], folder: Path, as_json: bool) -> None:
    """The outcome of a training run, from the first process alone.

    Args:
        record: as in `training.json`.
        folder: the checkpoint or adapter.
        as_json: print the record alone.
    """
    from probeprune import processes

    if not processes.is_first():
        return
    before, after = record["held_out_loss"]
    summary = (
        f"{record['steps']} steps, {record['tokens']:,} tokens in {record['seconds']:.0f} s; held-out loss "
        f"{before:.3f} -> {after:.3f}"
    )
    if "teacher" in record:
        summary += f", nats from {record['teacher']}"
    print_saved(record, folder, summary, ("before", "after"), as_json)
    agreements = (record["evaluation"] or {}).get("agreement")
    if agreements and not as_json:
        shares, nats = (
            " -> ".join(format(agreements[name][figure], form) for name in ("before", "after"))
            for figure, form in (("top1", ".1%"), ("divergence", ".3f"))
        )
        print_text(f"agreement with {record['teacher']}: {shares} of likeliest tokens, {nats} nats")
    if "removed_share" in record:
        warn(filter(None, [missed("loraprune", {}, record["ratio"], record["removed_share"])]))
