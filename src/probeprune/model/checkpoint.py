"""Save pruned models as safetensors checkpoints that open anywhere.

A model whose layers all have the same width is saved under a plain config of its own family, or of one that
computes the same function, and opens with transformers alone. A model whose layers differ in width is saved
with the small file `modeling_pruned.py` next to the weights, or under a config that engines read
(`nemotron_nas.py`). A checkpoint appears under its name only when it
is complete.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from probeprune.errors import UsageError
from probeprune.foreign.quiet import quiet_libraries
from probeprune.model.described import Layout, export
from probeprune.model.gguf_keys import take_along
from probeprune.model.making_records import PRUNING
from probeprune.model.multimodal import multimodal_of
from probeprune.model.nemotron_nas import nemotron_config
from probeprune.model.offloading import is_offloaded
from probeprune.model.older_names import add_rope_fields, rename_tokenizer
from probeprune.model.processor_files import take_processor_along
from probeprune.model.shards import bytes_to_write, save_by_layer
from probeprune.places import check_free, resolved, writing

MODELLING_FILE = "modeling_pruned.py"

_HEADROOM = 64 << 20
"""Bytes that a save may need besides the weights: tokenizer, configs, the file system's own."""


def save(
    model: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    layout: Layout | None = None,
    card: str | None = None,
    record: dict[str, Any] | None = None,
    write_extra: Callable[[Path], None] | None = None,
) -> PreTrainedModel:
    """Write a pruned (or dense) model as a checkpoint directory.

    Args:
        model: a causal LM of a supported family, after `prune` or loaded from a checkpoint.
        path: a directory that does not exist or is empty.
        tokenizer: saved next to the model, with the processor's files beside it where the model reads images.
        layout: see `described.Layout`; None for `uniform` if the model's widths allow it, otherwise
            `per-layer`. A layout given by name is required: it is an error if it cannot hold the model.
        card: the model card in Markdown, written as README.md.
        record: a description of the pruning, written as pruning.json.
        write_extra: called with the directory before it gets its final name, to write further files.

    Returns:
        The model as the checkpoint describes it. It shares the weights of `model`.

    Raises:
        UsageError: a directory in use, too little disk space, a model that the layout cannot hold.
    """
    target = Path(path)
    check_free(target)
    exported = export(model, layout)
    if is_offloaded(exported):
        check_space(target, bytes_to_write(exported, _existing(target)))
    else:
        tensors = {id(t): t for t in exported.state_dict().values()}.values()
        check_space(target, sum(t.nbytes for t in tensors))
    with writing(target) as folder:
        with quiet_libraries(bars=False):
            _save_model(exported, folder)
            if layout == "nemotron-nas":
                (folder / MODELLING_FILE).unlink()
                nemotron_config(exported.config).save_pretrained(folder)
            if not (folder / MODELLING_FILE).exists():
                add_rope_fields(folder, exported.config)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
                rename_tokenizer(folder)
                take_along(tokenizer, folder)
                if multimodal_of(exported.config.model_type) is not None:
                    take_processor_along(tokenizer, folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        if record is not None:
            (folder / PRUNING).write_text(json.dumps(record) + "\n", encoding="utf-8")
        if write_extra is not None:
            write_extra(folder)
    return exported


def check_space(target: Path, size: int) -> None:
    """Raise `UsageError` unless the disk of `target` has room for `size` bytes of weights."""
    free = shutil.disk_usage(_existing(target)).free
    if free < size + _HEADROOM:
        raise UsageError(
            f"{target} needs {(size + _HEADROOM) / 2**30:.2f} GiB and its disk has {free / 2**30:.2f} GiB "
            "left; free some space or choose another directory."
        )


def _existing(target: Path) -> Path:
    """The folder that there is where `target` is to be made."""
    real = resolved(target)
    return next(p for p in (real, *real.parents) if p.exists())


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write config and weights, and the generation config as it is.

    transformers opens generation configs that it refuses to write, such as a temperature without sampling.
    """
    generation: Any = model.generation_config
    model.generation_config = generation and GenerationConfig()
    try:
        if is_offloaded(model):
            save_by_layer(model, folder)
        else:
            model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json", use_diff=True)
