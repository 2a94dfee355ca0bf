"""A model from what describes it alone: nothing is converted, and of the hub no weights are downloaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from probeprune.errors import UsageError, refusing
from probeprune.foreign.quiet import quiet_libraries
from probeprune.model import hub
from probeprune.model.folder import check_files, stored_sizes, weight_names
from probeprune.model.gguf_architectures import find_architecture
from probeprune.model.gguf_files import embedded_gguf
from probeprune.model.gguf_keys import Reader
from probeprune.model.gguf_reading import read_outline
from probeprune.model.loading import (
    EMBEDDED_MODEL,
    auto_class,
    is_folder,
    load_config,
    open_shape,
    unknown_locally,
)


@dataclass(frozen=True)
class Outline:
    """A model without numbers, and what is known of its files."""

    name: str
    """The name it was opened by."""
    model: Any
    """All its modules, on device `meta`, in the dtype on disk."""
    stored: Sequence[tuple[torch.dtype, int]]
    """Dtype and bytes of each tensor on disk; those that its config asks for where no weights are there."""
    has_weights: bool
    """Whether its weights, or their headers, were seen."""
    has_tokenizer: bool = False
    """Whether its tokenizer was opened, as whoever opens the model will do."""


def open_outline(name: str, *, trust_remote_code: bool = False) -> Outline:
    """The model of that name (as in `load_model`) from its config and the headers of its weights.

    Where no weights are there, as in a folder with a config.json alone, the config is believed.

    Raises:
        UsageError: no such model, a file in it that is damaged, weights whose headers do not fit the config.
    """
    path = Path(name).expanduser()
    with refusing(f"model {name[:200]!r} could not be found"):
        if name == EMBEDDED_MODEL or path.suffix == ".gguf":
            return _of_gguf(name, embedded_gguf() if name == EMBEDDED_MODEL else path)
        if is_folder(name):
            folder = path
        else:
            unknown_locally(name)
            with quiet_libraries():
                folder = hub.described(name, code=trust_remote_code)
    check_files(folder)
    names = weight_names(folder)
    if names and all((folder / file).is_file() for file in names):
        shape = open_shape(name, trust_remote_code=trust_remote_code)
        stored = stored_sizes(folder)
        return Outline(name, shape.model, stored, True, True)
    config = load_config(name, folder, trust_remote_code)
    with (
        refusing(f"no model can be made from '{folder / 'config.json'}'"),
        quiet_libraries(bars=False),
        torch.device("meta"),
    ):
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return _outline(name, model.eval(), has_weights=False)


def _of_gguf(name: str, file: Path) -> Outline:
    """From the head of a GGUF file. Its weights are float32 once they are converted."""
    if not file.is_file():
        raise UsageError(f"there is no GGUF file '{name}'; check the path.")
    with refusing(f"GGUF file '{file}' could not be converted"), quiet_libraries(bars=False):
        reader = Reader(file)
        architecture = find_architecture(reader.fields["general.architecture"].contents())
        if architecture is not None:
            return _outline(name, read_outline(reader, architecture), has_weights=True)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return _outline(name, model.eval(), has_weights=True)


def _outline(name: str, model: Any, *, has_weights: bool) -> Outline:
    stored = [(p.dtype, p.numel() * p.element_size()) for p in model.parameters()]
    return Outline(name, model, stored, has_weights)
