"""`probeprune generate`: text from a pruned model, printed as it is generated."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from probeprune.cli.facts import is_dense, missed, refuse_beside_kept, with_refresh
from probeprune.cli.groups import RATIO, CalibrationOptions, DeviceMap, Json, LoadOptions, Model
from probeprune.cli.options import grouped
from probeprune.cli.terminal import err, print_line, print_text, progress_bar, warn
from probeprune.errors import UsageError
from probeprune.jobs.generate import Decoding
from probeprune.methods import METHODS, Method, check_untrained, get_method
from probeprune.model.loading import EMBEDDED_MODEL, LoadedModel
from probeprune.ranges import RANGES

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from probeprune.data.windows import Text
    from probeprune.jobs.generate import Generated
    from probeprune.prepare import Prepared
    from probeprune.runtime.attachment import Attachment

ROUNDS = 3
"""Rounds of `--compare`, each of the dense and the pruned model; medians over them are printed."""


@dataclass(frozen=True)
class PruningOptions:
    """The method that prunes the model while it generates."""

    method: Annotated[
        str | None,
        typer.Option(
            help="Pruning method; `probeprune methods` lists all.",
            show_default="probe; of a pruned model dense, of one that keeps a method this one",
        ),
    ] = None
    ratio: Annotated[
        float | None,
        typer.Option(help=RATIO, show_default="0.2, or the one that is kept with the model"),
        RANGES["ratio"],
    ] = None
    refresh: Annotated[
        int,
        typer.Option(
            help="Number of new tokens after which a probing method chooses MLP channels again; 0 keeps the "
            "choice of the prompt."
        ),
        RANGES["refresh"],
    ] = 0

    def composed(self, pruned: bool = False) -> Method:
        """The method. Raises `UsageError` for one that trains, and for options it cannot honour.

        A model that is `pruned` already is not pruned once more, unless a method or a ratio asks for it.
        """
        as_it_is = pruned and self.method is None and self.ratio is None
        method = get_method(self.method or ("dense" if as_it_is else "probe"))
        check_untrained(method)
        return with_refresh(method, self.refresh)

    def check_kept(self, model: str) -> None:
        """Raise `UsageError` for options that would change the method that is kept with a model."""
        refuse_beside_kept(
            model, {"method": self.method, "ratio": self.ratio, "refresh": self.refresh or None}
        )


@dataclass(frozen=True)
class PromptOptions:
    """The texts to continue."""

    panel: ClassVar[str] = "Prompts"
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt to continue; repeat the option for a batch, whose texts are printed when all "
            "are done.",
            show_default=False,
        ),
    ] = None
    file: Annotated[
        list[Path] | None,
        typer.Option(
            help="File that holds one prompt, or - for standard input; may be repeated.", show_default=False
        ),
    ] = None
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the chat template of the model.")
    ] = False

    def read(self) -> list[str]:
        """All prompts, those from files last. Raises `UsageError` for none, or a file that is no text."""
        prompts = list(self.prompt or [])
        for path in self.file or []:
            try:
                prompts.append(sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"{path} cannot be read as text: {error}.") from error
        if not prompts:
            raise UsageError('there is nothing to continue; give --prompt "..." or --file.')
        return prompts


@dataclass(frozen=True)
class DecodingOptions:
    """How text is generated."""

    panel: ClassVar[str] = "Decoding"
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of new tokens per prompt."), RANGES["max_new_tokens"]
    ] = 128
    temperature: Annotated[
        float,
        typer.Option(help="Sampling temperature; 0 always takes the most likely token."),
        RANGES["temperature"],
    ] = Decoding.temperature
    top_p: Annotated[
        float,
        typer.Option(help="Sample only from the most likely tokens that together have this probability."),
        RANGES["top_p"],
    ] = Decoding.top_p

    def decoding(self, seed: int) -> Decoding:
        """How the next token is taken. Raises `UsageError` for values that do not go together."""
        return Decoding(self.temperature, self.top_p, seed)


@dataclass(frozen=True)
class Request:
    """Everything that determines the generated text.

    Attributes:
        loaded: the dense model.
        method, ratio: as in `attach`.
        prepared: calibration for them; None for a method that needs none.
        kept: the attachment that is kept with the model, which comes with a method of its own; None for none.
        inputs: the prompts as one batch of token ids.
        max_new_tokens, decoding: as in `jobs.generate.generate`.
    """

    loaded: LoadedModel
    method: Method
    ratio: float
    prepared: Prepared | None
    inputs: BatchEncoding
    max_new_tokens: int
    decoding: Decoding
    kept: Attachment | None = None


@grouped
def generate(
    *,
    model: Model = EMBEDDED_MODEL,
    pruning: PruningOptions,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure the speed of the pruned and the dense model in turn.")
    ] = False,
    as_json: Json = False,
    prompts: PromptOptions,
    decoding: DecodingOptions,
    calibration: CalibrationOptions,
    load: LoadOptions,
    device_map: DeviceMap = None,
) -> None:
    """Continue prompts with a pruned model; a dynamic method chooses heads and channels for the prompt.

    The first run collects calibration statistics, which takes minutes on a CPU; later runs read them from the
    cache. A checkpoint that `prune` cut runs as it is, a folder with a dynamic method under that method.

    Example: [bold]probeprune generate smollm2-135m --method probe --ratio 0.2 --chat --prompt "Hello"[/bold]
    """
    from probeprune.jobs.generate import encode

    method, prompt_texts = pruning.composed(), prompts.read()
    sampling, text = decoding.decoding(calibration.seed), calibration.text()
    _check_compared(method, compare)
    loaded = load.open(model, device_map=device_map, attached=True)
    if loaded.cut is not None:
        method = pruning.composed(pruned=True)
        _check_compared(method, compare)
    kept, ratio = None, 0.2 if pruning.ratio is None else pruning.ratio
    if loaded.handle is not None:
        pruning.check_kept(model)
        kept = loaded.handle.kept
        method, ratio = kept.method, kept.ratio
        loaded.handle.detach()  # dense and pruned texts take turns
    request = Request(
        loaded,
        method,
        ratio,
        kept=kept,
        inputs=encode(loaded, prompt_texts, chat=prompts.chat),
        prepared=None if kept else _prepare(loaded, method, ratio, text, calibration.seed),
        max_new_tokens=decoding.max_new_tokens,
        decoding=sampling,
    )
    stream = len(prompt_texts) == 1 and not as_json
    generated, removed = _generate(request, method, show=_print_piece if stream else None)
    speed = _compare(request) if compare else None
    if as_json:
        _print_json(request, prompt_texts, generated, removed, speed)
        return
    if not stream:
        _print_texts(prompt_texts, generated)
    print_line(_summary(request, generated, removed, speed))
    if not is_dense(method):
        warn(filter(None, [missed(method.name, method.record(), request.ratio, removed)]))


def _check_compared(method: Method, compare: bool) -> None:
    if compare and is_dense(method):
        raise UsageError("--compare measures a method beside the dense model; choose another than dense.")


def _prepare(loaded: LoadedModel, method: Method, ratio: float, text: Text, seed: int) -> Prepared | None:
    """Everything that the method must know of the model, from the cache where possible."""
    from probeprune.model.machine import cache_dir
    from probeprune.plan import may_need
    from probeprune.prepare import prepare

    if not may_need(method):
        return None
    source = text.source(loaded.tokenizer, seed)
    with progress_bar() as show:
        return prepare(loaded.model, method, ratio, source, cache=cache_dir() / "statistics", progress=show)


def _generate(
    request: Request,
    method: Method,
    *,
    show: Callable[[str], None] | None = None,
    ignore_end: bool = False,
) -> tuple[Generated, float]:
    """Text under a method, which may be another than the request's; and the share of parameters left out."""
    from probeprune import attach
    from probeprune.jobs.generate import generate as run
    from probeprune.runtime.attaching import attach_again

    model = request.loaded.model
    if request.kept is not None and method is request.method:
        attached = attach_again(model, request.kept)
    else:
        attached = attach(model, method, request.ratio, calibration=request.prepared)
    with attached as handle:
        generated = run(
            request.loaded,
            request.inputs,
            max_new_tokens=request.max_new_tokens,
            decoding=request.decoding,
            show=show,
            ignore_end=ignore_end,
        )
        return generated, handle.removed_share


def _compare(request: Request) -> dict[str, Any]:
    """Median rates of the dense and the pruned model, which generate in turn to equal length."""
    methods = (METHODS["dense"], request.method)
    rates: dict[str, list[tuple[float, float]]] = {method.name: [] for method in methods}
    with err.status("measuring speed"):
        for _ in range(ROUNDS):
            for method in methods:
                generated, _removed = _generate(request, method, ignore_end=True)
                rates[method.name].append((generated.prefill_rate, generated.decode_rate))
    medians = {
        name: {
            "prefill": statistics.median(prefill for prefill, _ in rounds),
            "decode": statistics.median(decode for _, decode in rounds),
        }
        for name, rounds in rates.items()
    }
    return {"rounds": ROUNDS, "tokens_per_second": medians}


def _print_json(
    request: Request,
    prompts: Sequence[str],
    generated: Generated,
    removed: float,
    speed: dict[str, Any] | None,
) -> None:
    """One line per prompt on standard output."""
    from probeprune.provenance import dtype_name

    shared = {
        "model": request.loaded.name,
        "method": request.method.record(),
        "ratio": 0.0 if is_dense(request.method) else request.ratio,
        "removed_share": removed,
        "prompts_in_batch": len(prompts),
        "prefill_tokens_per_second": generated.prefill_rate,
        "decode_tokens_per_second": generated.decode_rate,
        "compared": speed,
        "seed": request.decoding.seed,
        "dtype": dtype_name(request.loaded.dtype),
        "device": str(request.loaded.device),
    }
    for prompt, text in zip(prompts, generated.texts, strict=True):
        print(json.dumps({"prompt": prompt, "text": text, **shared}))


def _print_piece(piece: str) -> None:
    """The next piece of a text on standard output."""
    print_text(piece, end="")


def _print_texts(prompts: Sequence[str], generated: Generated) -> None:
    """The texts on standard output, the first line of each prompt above it on standard error."""
    for prompt, text in zip(prompts, generated.texts, strict=True):
        opening = prompt.strip().splitlines()[0][:80]
        print_line(opening, "bold")
        print_text(f"{text.strip()}\n")


def _summary(request: Request, generated: Generated, removed: float, speed: dict[str, Any] | None) -> str:
    """The method and its speed, beside the dense model's where that was measured."""
    name = request.method.name
    method = "dense" if is_dense(request.method) else f"{name}, {removed:.1%} of the blocks left out"
    gone = request.loaded.cut
    if gone is not None:
        cut = f"{gone['removed_share']:.1%} of the blocks cut for good"
        method = cut if is_dense(request.method) else f"{cut}, then {method}"
    if speed is None:
        rates = f"prefill {generated.prefill_rate:.1f} tokens/s, decode {generated.decode_rate:.1f} tokens/s"
        return f"{method}: {rates}"
    pruned, dense = speed["tokens_per_second"][name], speed["tokens_per_second"]["dense"]
    rates = ", ".join(
        f"{stage} {pruned[stage]:.1f} tokens/s, dense {dense[stage]:.1f} "
        f"({pruned[stage] / dense[stage]:.2f}x)"
        for stage in pruned
        if dense[stage]
    )
    return f"{method}: {rates}; medians of {speed['rounds']} rounds in turn"
