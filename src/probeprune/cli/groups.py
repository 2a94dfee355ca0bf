"""Option groups that several commands share, each declared once.

A group whose options become a record of the library has a method that makes it. What such a method refuses
is refused with a `UsageError` that names the option.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, cast, get_args

import typer

from probeprune.cli.terminal import err
from probeprune.cli.values import names, one_of
from probeprune.data.windows import CALIBRATION, Text
from probeprune.engines.wishes import Engine, get_engine
from probeprune.errors import UsageError
from probeprune.experiment.cells import TextMeasure
from probeprune.model.described import Layout
from probeprune.ranges import RANGES

if TYPE_CHECKING:
    import torch

    from probeprune.model.loading import LoadedModel
    from probeprune.model.placing import Work

Model = Annotated[
    str,
    typer.Argument(
        help="Model: smollm2-135m (embedded), a local directory, a GGUF file or a Hugging Face hub id."
    ),
]
RATIO = "Pruning ratio: share of the parameters of all blocks (attention, MLPs, experts) to prune."
Ratio = Annotated[float, typer.Option(help=RATIO), RANGES["ratio"]]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory for this process, or its part of an accelerator, such as 6GiB; a model that needs more "
        "is read a layer at a time, from disk.",
        show_default="most of what is free",
    ),
]
GGUF_TYPE = typer.Option(
    help="How a GGUF file holds matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0. The last five need "
    "rows of a multiple of 32 (prune with --round-to 32).",
    show_default="f16",
)
TEXT = (
    "c4, c4-held-out, wikitext2 or wikitext2-valid (embedded), a .txt, .jsonl or .parquet file, or a hub id"
)
"""What a text can be, for the help of options that take one."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of text and tables.")]
Device = Annotated[
    str,
    typer.Option(help="Device to run on: cpu, cuda, mps or auto (CUDA if available, else CPU)."),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread the layers over all GPUs, then memory, then disk: auto, balanced or sequential; in "
        "place of --device.",
        show_default="one device",
    ),
]
PaysRule = Annotated[
    str | None,
    typer.Option(
        help="Batches that a dynamic method probes: always (all, as published) or auto (those for which the "
        "time that pruning saves on this machine pays).",
        show_default="each method's own: auto for best-dynamic",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the code that comes with the model; only for sources you trust."
    ),
]
KeepTrained = Annotated[
    bool, typer.Option(help="Keep the checkpoints of trained models, in trained/ inside the --out folder.")
]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is opened."""

    panel: ClassVar[str] = "Model loading"
    dtype: Annotated[
        str,
        typer.Option(
            help="Data type to compute in: bfloat16, float16, float32 or auto (the fastest on the device)."
        ),
    ] = "auto"
    device: Device = "auto"
    trust_remote_code: TrustRemoteCode = False

    def open(
        self,
        model: str,
        memory: int | None = None,
        device_map: str | None = None,
        work: Work | None = None,
        attached: bool = False,
    ) -> LoadedModel:
        """The model, opened while the terminal shows that it is loading. Takes and raises what `load_model`
        does; with `attached`, that of the package, which attaches a method that is kept with the model."""
        if attached:
            from probeprune.jobs.attached import load_model
        else:
            from probeprune.model.loading import load_model

        with err.status("loading the model"):
            return load_model(
                model,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                memory=memory,
                device_map=device_map,
                work=work,
            )

    def open_everywhere(
        self,
        model: str,
        memory: int | None = None,
        device_map: str | None = None,
        work: Work | None = None,
    ) -> LoadedModel:
        """As `open`, in each of several processes, on a device of its own and all in one dtype.

        A model that has to be converted or downloaded first is opened by the first process before the others.
        """
        from probeprune import processes
        from probeprune.model.machine import choose_device, choose_dtype
        from probeprune.processes import shares
        from probeprune.provenance import dtype_name

        if processes.count() == 1:
            return self.open(model, memory, device_map, work)
        if device_map is not None:
            raise UsageError(
                "--device-map spreads one model over all devices, and each of several processes has a model "
                "on one; leave it out, or start without torchrun."
            )
        with shares.alike():
            dtype = dtype_name(choose_dtype(self.dtype, choose_device(self.device)))
        same = replace(self, dtype=processes.agreed(dtype))  # auto measures, so processes could differ
        if Path(model).is_dir():
            with shares.alike():
                return same.open(model, memory, work=work)
        loaded: list[LoadedModel] = []
        for turn in (True, False):
            with shares.alike():
                if processes.is_first() == turn:
                    loaded.append(same.open(model, memory, work=work))
        return loaded[0]

    def dtype_to_save(self, loaded: LoadedModel) -> torch.dtype:
        """The dtype of weights on disk: as they were where `auto` chose one to compute in, else as given."""
        return loaded.stored_dtype if self.dtype == "auto" else loaded.dtype


@dataclass(frozen=True)
class CalibrationOptions:
    """The text that statistics are collected on, and the seed of what is random."""

    panel: ClassVar[str] = "Calibration"
    calibration: Annotated[
        str,
        typer.Option(
            help=f"Calibration text: {TEXT}. Several, separated by commas, take "
            "turns; one that is named twice has two turns."
        ),
    ] = CALIBRATION.corpus
    calibration_windows: Annotated[
        int, typer.Option(help="Number of calibration windows."), RANGES["windows"]
    ] = CALIBRATION.windows
    length: Annotated[
        int, typer.Option(help="Tokens per window, for calibration and for any evaluation."), RANGES["length"]
    ] = CALIBRATION.length
    seed: Annotated[
        int,
        typer.Option(help="Random seed for calibration windows and everything else that is random."),
        RANGES["seed"],
    ] = 0

    def text(self) -> Text:
        """The windows to calibrate on."""
        first, *beside = names(self.calibration, "calibration", repeated=True)
        return Text(first, self.calibration_windows, self.length, tuple(beside))


@dataclass(frozen=True)
class EvaluationOptions:
    """The text that perplexity is measured on, before and after a command changes the model."""

    panel: ClassVar[str] = "Evaluation"
    corpus: Annotated[
        str,
        typer.Option(help=f"Text to measure perplexity on, before and after: {TEXT}."),
    ] = TextMeasure.corpus
    windows: Annotated[
        int,
        typer.Option(
            help="Number of evaluation windows, taken from the start of the text; 0 skips the evaluation."
        ),
        RANGES["Text.windows"],
    ] = 16

    def text(self, length: int = Text.length) -> Text:
        """The windows to measure on, each of `length` tokens."""
        return Text(self.corpus, self.windows, length)


@dataclass(frozen=True)
class WidthOptions:
    """How the widths of the layers relate to each other."""

    panel: ClassVar[str] = "Widths"
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Engine that will run the model, such as transformers, llama.cpp or vllm: sets --layout and "
            "--round-to to what it likes (`probeprune engines` lists all).",
        ),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(
            help="Layout of the checkpoint: uniform (one width for all layers; opens with plain "
            "transformers), per-layer (a width for each layer; opens with trust_remote_code=True) or "
            "nemotron-nas (the same heads in all layers and a width for each MLP; opens with vLLM).",
            show_default="uniform, or the engine's",
        ),
    ] = None
    round_to: Annotated[
        int | None,
        typer.Option(
            help="Make MLP widths multiples of this number of channels, for speed.",
            show_default="64, or the engine's",
        ),
        RANGES["round_to"],
    ] = None
    skip_layers: Annotated[
        int | None,
        typer.Option(
            help="Number of leading layers to leave dense; needs --layout per-layer.",
            show_default="the method's own",
        ),
        RANGES["skip_layers"],
    ] = None

    def checked_layout(self, per_layer: Mapping[str, object] | None = None) -> Layout:
        """The layout. Raises `UsageError` for an unknown one, and for options it cannot honour.

        Args:
            per_layer: values of more options, by name, that need layout `per-layer`; None where not given.
        """
        layout = self._engine().layout if self.layout is None else self.layout
        one_of("layout", layout, get_args(Layout))
        options = {"skip-layers": self.skip_layers, **(per_layer or {})}
        given = [f"--{name}" for name, value in options.items() if value]
        if layout != "per-layer" and given:
            alike = "one width" if layout == "uniform" else "the same heads"
            raise UsageError(
                f"--layout {layout} gives all layers {alike}: leave {' and '.join(given)} out, or use "
                "--layout per-layer."
            )
        return cast(Layout, layout)

    def rounding(self) -> int:
        """MLP widths are multiples of this. Raises `UsageError` for an unknown engine."""
        return self._engine().round_to if self.round_to is None else self.round_to

    def _engine(self) -> Engine:
        return get_engine(self.engine or "transformers")


@dataclass(frozen=True)
class ResultOptions:
    """Where a command that measures puts its results."""

    out_dir: Annotated[
        Path, typer.Option("--out", help="Folder for the results: JSON lines, tables and plots.")
    ]
    as_json: Json = False


@dataclass(frozen=True)
class CheckpointOptions:
    """Where a command that makes a model puts it."""

    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the result; it must be new or empty.")]
    as_json: Json = False
