"""`probeprune push`: a folder with a model, on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probeprune.cli.terminal import print_text


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that `prune`, `recover` or probeprune.save wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository, as owner/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            help="File that `probeprune eval --json` wrote, for the card's evaluation results.",
            show_default="what was measured when the folder was made",
        ),
    ] = None,
) -> None:
    """Upload a model to the Hugging Face hub, with a card that has the hub's metadata.

    The token is the one of `hf auth login` or of the variable HF_TOKEN.

    Example: [bold]probeprune push probe-40 me/smollm2-probe-40 --private[/bold]
    """
    from probeprune.jobs.share import push as run

    print_text(run(folder, repo, private=private, results=results))
