"""`probeprune bench`: measured speed and memory."""

import json
from pathlib import Path
from typing import Annotated

import typer

from probeprune.cli.common import DEVICE, DTYPE, JSON, MODEL, TRUST, err, names, out, progress_bar
from probeprune.methods import get_method


def bench(
    model: MODEL = "smollm2-135m",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "ppsp,probe",
    ratio: Annotated[float, typer.Option(help="Pruning ratio.")] = 0.4,
    batch_size: Annotated[int, typer.Option(help="Sequences a batch.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 5,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the figures.")] = Path("runs/bench"),
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Measure speed and memory against the dense model, interleaved in one run.

    Example: [bold]probeprune bench --methods probe --ratio 0.4 --batch-size 16 --length 512[/bold]
    """
    from probeprune import bench as benchmark
    from probeprune.models import load_model

    chosen = [get_method(name) for name in names(methods, "methods")]
    with err.status("loading the model"):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with progress_bar() as show:
        figures = benchmark.bench(
            loaded, chosen, ratio, batch_size=batch_size, length=length, rounds=rounds, progress=show
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(f) + "\n" for f in figures)
    (out_dir / "bench.jsonl").write_text(lines, encoding="utf-8")
    if as_json:
        print(lines, end="")
    else:
        out().print(benchmark.table(figures))
