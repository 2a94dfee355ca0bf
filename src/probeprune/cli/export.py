"""`probeprune export`: a checkpoint in the format of another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probeprune.cli.groups import GGUF_TYPE, Model, TrustRemoteCode
from probeprune.cli.options import grouped
from probeprune.cli.terminal import notices, print_line, progress_bar
from probeprune.cli.values import one_of
from probeprune.model.loading import EMBEDDED_MODEL

FORMATS = ("gguf",)


@grouped
def export(
    *,
    model: Model = EMBEDDED_MODEL,
    to: Annotated[str, typer.Option(help="Format: gguf (llama.cpp, ollama, LM Studio).")] = "gguf",
    type: Annotated[str, GGUF_TYPE] = "f16",
    out: Annotated[Path, typer.Option(help="File for the result; one that is there is replaced.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model, pruned or not, as a file that other engines run.

    What no such file can hold is refused before the weights are read.

    Example: [bold]probeprune export pruned --to gguf --type q8_0 --out pruned.gguf[/bold]
    """
    one_of("format", to, FORMATS)
    from probeprune.engines.gguf_write import export_gguf

    with notices(), progress_bar() as show:
        export_gguf(model, out, type=type, trust_remote_code=trust_remote_code, progress=show)  # type: ignore[arg-type]
    print_line(f"{out}: {out.stat().st_size / 1e6:.1f} MB", "green", mark="written")
