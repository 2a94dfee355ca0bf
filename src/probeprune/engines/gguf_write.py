"""Write a model as a GGUF file, which llama.cpp and all that is built on it open without any code of ours.

A plan is made first (`gguf_plan`), from shapes alone: whatever cannot be written is refused then. Numbers are
converted and written one tensor at a time, so an export needs little memory beside the model.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, GGUFWriter, size_label
from gguf.quants import quantize

from probeprune.engines.gguf_plan import Entry, Plan, factor_tensors, plan
from probeprune.engines.gguf_tokenizer import tokenizer_keys
from probeprune.engines.gguf_types import FileType
from probeprune.errors import Notice, UsageError
from probeprune.model.checkpoint import check_space
from probeprune.model.gguf_keys import Key
from probeprune.model.gguf_tensors import written
from probeprune.model.loading import load_model, open_shape
from probeprune.model.offloading import in_memory
from probeprune.model.wrappers import unwrapped
from probeprune.places import check_file, replacing
from probeprune.progress import Progress, silent
from probeprune.provenance import dtype_name

_HALF = 65504.0
"""The largest number of float16."""
_ROWS = 1024
"""Rows of a matrix that are converted at a time."""


@dataclass(frozen=True)
class Export:
    """An export that was checked: nothing is left but to write it."""

    plan: Plan
    tokenizer: dict[str, Key]
    """The keys of the tokenizer, and of `general.*` that came with the model."""
    name: str
    """The name of the model in the file, unless one came with it."""


def export_gguf(
    model: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    type: FileType = "f16",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write a model, pruned or not, as a GGUF file for llama.cpp, ollama, LM Studio and the like.

    A model whose layers have the same widths becomes a file of its family's architecture; widths of their own
    go under `deci` (LLaMA, Mistral, Qwen2) or `openelm` (Qwen3 with tied embeddings).

        probeprune.export_gguf("pruned", "pruned.gguf", type="q8_0")

    Args:
        model: a causal LM, or what `load_model` opens: a checkpoint, `smollm2-135m`, a GGUF file, a hub id.
        path: the file. It is replaced if it is there, and only when the new one is complete.
        tokenizer: the model's, if `model` is no name; the one beside the weights otherwise.
        type: how matrices are stored: `f32`, `f16`, `bf16`, `q8_0`, `q5_1`, `q5_0`, `q4_1` or `q4_0`. Vectors
            are float32, and the output matrix at least `q8_0`.
        trust_remote_code: run code that comes with a model given by name. Only for sources you trust.
        progress: called with (name of the work, parts done, parts in total).

    Returns:
        The file.

    Raises:
        UsageError: a model that no architecture holds, rows that the type's blocks do not divide, a tokenizer
            that llama.cpp does not know, too little space, a file that cannot be written. Nothing has been
            written or, for a model given by name, read then.
    """
    target = Path(path)
    check_file(target)
    if isinstance(model, str | Path):
        opened = open_shape(str(model), trust_remote_code=trust_remote_code)
        checked = check_export(opened.model, tokenizer or opened.tokenizer, type, name=Path(opened.name).name)
        check_space(target, checked.plan.bytes)
        model = load_model(
            str(model), dtype=dtype_name(opened.dtype), device="cpu", trust_remote_code=trust_remote_code
        ).model
    else:
        if tokenizer is None:
            raise UsageError("a GGUF file needs the model's tokenizer; give tokenizer=.")
        checked = check_export(model, tokenizer, type, name=target.stem)
        check_space(target, checked.plan.bytes)
    write_export(model, checked, target, progress)
    return target


def check_export(model: Any, tokenizer: Any, type: str, *, name: str = "model") -> Export:
    """Everything about an export that can be decided without the model's numbers.

    Args:
        model: the model, or one of the same shape on device `meta`.
        tokenizer: its tokenizer.
        type: as in `export_gguf`.
        name: the name of the model in the file.

    Raises `UsageError` for an export that cannot be made.
    """
    made = plan(model, type)
    return Export(made, tokenizer_keys(tokenizer, made.vocabulary), name)


def write_export(model: Any, export: Export, path: Path, progress: Progress = silent) -> None:
    """Write the file of an export that was checked, from a model of the shape that was checked.

    Raises `UsageError` for numbers that the type cannot hold, a full disk, a file that cannot be written; the
    file is as it was then.
    """
    model = unwrapped(model)
    if export.plan.shorter_context is not None:
        warnings.warn(
            f"llama.cpp gives '{export.plan.architecture.name}' no sliding window, so the file says "
            f"that texts have at most {export.plan.shorter_context} tokens: as many as the model's window.",
            Notice,
            stacklevel=3,
        )
    factors = factor_tensors(export.plan, model.config)
    with replacing(path) as partial:
        writer = GGUFWriter(partial, export.plan.architecture.name)
        try:
            _add_keys(writer, export)
            for name, tensor in factors.items():
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.numel() * 4)
            for entry in export.plan.entries:
                writer.add_tensor_info(
                    entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.type
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            (file,) = writer.fout
            writer.write_padding(file, file.tell())
            for tensor in factors.values():
                _append(file, [tensor.numpy()], writer)
            for done, entry in enumerate(export.plan.entries):
                progress("writing the file", done, len(export.plan.entries))
                _append(file, _stored(model, entry), writer)
            progress("writing the file", len(export.plan.entries), len(export.plan.entries))
        finally:
            writer.close()


def _add_keys(writer: GGUFWriter, export: Export) -> None:
    made = export.plan
    total = sum(int(np.prod(entry.shape)) for entry in made.entries)
    kept = export.tokenizer
    writer.add_type("model")
    if "general.name" not in kept:
        writer.add_name(export.name)
    writer.add_size_label(size_label(total, 0, 0, 0))
    writer.add_file_type(made.storage.label)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for name, value in made.keys.items():
        key = f"{made.architecture.name}.{name}"
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.UINT32)
    for name, (value, kind, item) in kept.items():
        if value != []:  # an array of nothing cannot be written
            writer.add_key_value(name, value, kind, item)


def _append(file: IO[bytes], parts: Iterable[np.ndarray[Any, Any]], writer: GGUFWriter) -> None:
    """Write the numbers of the next tensor. Not by the writer: its errors do not say that a disk is full."""
    size = 0
    for numbers in parts:
        file.write(numbers.data.cast("B"))
        size += numbers.nbytes
    writer.write_padding(file, size)


def _stored(model: Any, entry: Entry) -> Iterator[np.ndarray[Any, Any]]:
    """The numbers of an entry as the file holds them, some rows at a time."""
    with ExitStack() as stack:
        for path in entry.place.part.modules:
            stack.enter_context(in_memory(model.get_submodule(path)))
        numbers = written(entry.place, model, entry.kind, entry.heads)
    assert numbers is not None
    size = 0
    for values in numbers.split(_ROWS):
        values = values.cpu().contiguous()
        if entry.type == GGMLQuantizationType.F16 and values.abs().max() > _HALF:
            raise UsageError(
                f"{entry.name} holds numbers beyond {_HALF:.0f}, the largest of float16; choose type bf16."
            )
        stored: np.ndarray[Any, Any] = np.ascontiguousarray(quantize(values.numpy(), entry.type))
        size += stored.nbytes
        yield stored
    assert size == entry.bytes
