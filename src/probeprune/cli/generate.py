"""`probeprune generate`: text from a pruned model, as it comes."""

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from probeprune.cli.common import DEVICE, DTYPE, JSON, MODEL, TRUST, err, progress_bar
from probeprune.errors import UsageError
from probeprune.methods import Method, check_untrained, compose, get_method
from probeprune.strategies.allocation import check_ratio

ROUNDS = 3
"""Of `--compare`, dense and pruned in turn; medians are shown."""


def generate(
    model: MODEL = "smollm2-135m",
    method: Annotated[str, typer.Option(help="A method; see `probeprune methods`.")] = "probe",
    ratio: Annotated[float, typer.Option(help="Pruning ratio.")] = 0.2,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; several are one batch, printed when all are done.")
    ] = None,
    file: Annotated[
        list[Path] | None, typer.Option(help="A file that holds a prompt; - reads standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="A text ends there at the latest.")] = 128,
    temperature: Annotated[float, typer.Option(help="Draw tokens; 0 takes the most likely ones.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from this share of the probability.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
    refresh: Annotated[
        int, typer.Option(help="Choose MLP channels anew every so many tokens (probing methods).")
    ] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure speed beside the dense model's, in turn.")
    ] = False,
    calibration: Annotated[
        str, typer.Option(help="Calibration text: an embedded name, file or hub id.")
    ] = "c4",
    calibration_windows: Annotated[int, typer.Option(help="Windows of it.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens a calibration window.")] = 512,
    seed: Annotated[int, typer.Option(help="Draws tokens and calibration windows.")] = 0,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    as_json: JSON = False,
) -> None:
    """Continue prompts with a pruned model; a dynamic method chooses heads and channels by the prompt.

    The first run calibrates (minutes on a CPU) and keeps the statistics; the next starts at once.

    Example: [bold]probeprune generate smollm2-135m --method probe --ratio 0.2 --chat --prompt "Hello"[/bold]
    """
    from probeprune import attach
    from probeprune.data.windows import Text
    from probeprune.jobs.generate import Decoding, encode
    from probeprune.jobs.generate import generate as run
    from probeprune.model.loading import load_model
    from probeprune.provenance import dtype_name

    chosen = _method(method, refresh)
    check_ratio(ratio)
    decoding = Decoding(temperature, top_p, seed)
    prompts = _prompts(prompt or [], file or [])
    if max_new_tokens < 1:
        raise UsageError("--max-new-tokens must be at least 1.")
    if compare and chosen.when == "never":
        raise UsageError("--compare sets a method beside the dense model; choose another than dense.")
    with err.status("loading the model"):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    inputs = encode(loaded, prompts, chat=chat)
    with progress_bar() as show:
        known = _statistics(loaded, chosen, ratio, Text(calibration, calibration_windows, length), seed, show)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "decoding": decoding}
    stream = len(prompts) == 1 and not as_json
    with attach(loaded.model, chosen, ratio, statistics=known) as handle:
        made = run(loaded, inputs, stream=stream, **options)
        removed = handle.removed_share
    speed = _compare(loaded, chosen, ratio, known, inputs, options) if compare else None
    if as_json:
        for asked, text in zip(prompts, made.texts, strict=True):
            print(
                json.dumps(
                    {
                        "prompt": asked,
                        "text": text,
                        "model": loaded.name,
                        "method": chosen.record(),
                        "ratio": 0.0 if chosen.when == "never" else ratio,
                        "removed_share": removed,
                        "prompts_in_batch": len(prompts),
                        "prefill_tokens_per_second": made.prefill_rate,
                        "decode_tokens_per_second": made.decode_rate,
                        "compared": speed,
                        "seed": seed,
                        "dtype": dtype_name(loaded.dtype),
                        "device": str(loaded.device),
                    }
                )
            )
        return
    if not stream:
        for asked, text in zip(prompts, made.texts, strict=True):
            err.print(f"[bold]{asked.strip().splitlines()[0][:80]}[/bold]", highlight=False, soft_wrap=True)
            print(text.strip() + "\n")
    _say(made, chosen, removed, speed)


def _method(name: str, refresh: int) -> Method:
    """The method that the options compose."""
    method = get_method(name)
    check_untrained(method)
    if not refresh:
        return method
    if method.probe is None:
        raise UsageError(f"--refresh is for methods that probe; {name!r} chooses once.")
    return compose(method, name=method.name, probe=dataclasses.replace(method.probe, refresh=refresh))


def _prompts(prompts: list[str], files: list[Path]) -> list[str]:
    """All prompts, those of files behind the others."""
    found = list(prompts)
    for path in files:
        try:
            found.append(sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read as text: {error}.") from error
    if not found:
        raise UsageError('there is nothing to continue; give --prompt "..." or --file.')
    return found


def _statistics(loaded: Any, method: Method, ratio: float, text: Any, seed: int, progress: Any) -> Any:
    """What the method needs to know of the model, from the cache where it is there."""
    from probeprune.experiment.cells import subject
    from probeprune.experiment.workbench import Workbench
    from probeprune.provenance import dtype_name

    bench = Workbench(Path(), progress)
    bench.take(loaded)
    return bench.statistics(
        subject(
            loaded.name,
            method,
            ratio,
            seed=seed,
            calibration=text,
            dtype=dtype_name(loaded.dtype),
            device=loaded.device.type,
        )
    )


def _compare(
    loaded: Any, method: Method, ratio: float, known: Any, inputs: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Median rates of the dense and the pruned model, generating in turn to equal length."""
    from probeprune import METHODS, attach
    from probeprune.jobs.generate import generate as run

    rates: dict[str, list[tuple[float, float]]] = {"dense": [], method.name: []}
    with err.status("measuring speed"):
        for _ in range(ROUNDS):
            for one in (METHODS["dense"], method):
                with attach(loaded.model, one, ratio, statistics=known):
                    made = run(loaded, inputs, ignore_end=True, **options)
                rates[one.name].append((made.prefill_rate, made.decode_rate))
    medians = {
        name: dict(zip(("prefill", "decode"), map(statistics.median, zip(*found, strict=True)), strict=True))
        for name, found in rates.items()
    }
    return {"rounds": ROUNDS, "tokens_per_second": medians}


def _say(made: Any, method: Method, removed: float, speed: dict[str, Any] | None) -> None:
    """What it was and how fast, on stderr."""
    what = "dense" if method.when == "never" else f"{method.name}, {removed:.1%} of the blocks left out"
    if speed is None:
        said = f"prefill {made.prefill_rate:.1f} tokens/s, decode {made.decode_rate:.1f} tokens/s"
    else:
        both = speed["tokens_per_second"]
        own, dense = both[method.name], both["dense"]
        said = ", ".join(
            f"{part} {own[part]:.1f} tokens/s, dense {dense[part]:.1f} ({own[part] / dense[part]:.2f}x)"
            for part in own
            if dense[part]
        )
        said += f"; medians of {speed['rounds']} rounds in turn"
    err.print(f"{what}: {said}", highlight=False, soft_wrap=True)
