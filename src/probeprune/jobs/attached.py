"""Save a model with a method attached, and open it again as it was: `probeprune.save` and `load_model`.

Weights beside the method are the dense ones, bit for bit. What batches have taught a dynamic method is not
kept: an opened model begins where `attach` began.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedModel

from probeprune.errors import UsageError, unknown
from probeprune.foreign.quiet import quiet_libraries
from probeprune.jobs.attached_cards import attached_card
from probeprune.jobs.share import push
from probeprune.model import checkpoint, loading
from probeprune.model.described import Layout, without_views
from probeprune.model.gguf_files import embedded_copy
from probeprune.model.hub import with_files
from probeprune.model.loading import EMBEDDED_MODEL, LoadedModel
from probeprune.model.machine import check_dtype, choose_dtype
from probeprune.model.making_records import ATTACHED, HoldsAttached
from probeprune.model.offloading import cast
from probeprune.model.placing import Work
from probeprune.model.wrappers import unwrapped
from probeprune.places import check_free, resolved, writing
from probeprune.provenance import dtype_name
from probeprune.runtime.attached_folder import (
    STATISTICS,
    Stored,
    Weights,
    check_base,
    read_attachment,
    read_record,
    write_attachment,
)
from probeprune.runtime.attaching import attach_again, attached_to
from probeprune.runtime.handle import Handle


def save(
    model: nn.Module | Handle,
    path: str | Path,
    *,
    tokenizer: Any = None,
    layout: Layout | None = None,
    card: str | None = None,
    record: dict[str, Any] | None = None,
    weights: Weights = "copy",
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> PreTrainedModel:
    """Write a model as a checkpoint directory: pruned, dense, or with the method that is attached to it.

    Under a method, the folder holds the dense weights (or their name), the method, its ratio and everything
    it knows of the model; `load_model` opens it with the method attached.

    Example:
        >>> with probeprune.attach(model, "probe", ratio=0.4, calibration=windows) as handle:
        ...     probeprune.save(handle, "probe-40", tokenizer=tokenizer)
        >>> loaded = probeprune.load_model("probe-40")

    Args:
        model: a causal LM of a supported family, after `prune`, loaded from a checkpoint, or with a method
            attached; or the method's handle.
        path: a directory that does not exist or is empty.
        tokenizer: saved next to the weights.
        layout: see `described.Layout`; None for `uniform` if the model's widths allow it, otherwise
            `per-layer`. A layout given by name is required: it is an error if it cannot hold the model. Not
            for an attached method.
        card: the model card in Markdown, written as README.md; None for a card of what is known where a
            method is attached, and for none otherwise.
        record: a description as JSON values, written as pruning.json, or into attached.json.
        weights: for an attached method, `copy` writes the dense weights too, which takes memory for a copy
            of the pruned blocks; `reference` writes the name of the dense model, whose tokenizer then serves.
        base_model: name or path by which `load_model` opens the dense model; None for the one that
            transformers remembers.
        push_to_hub: upload the folder to this repository (`owner/name`) of the hub too, as `push` does.
        private: whether a new repository is private.

    Returns:
        The model as the checkpoint describes it.

    Raises:
        UsageError: a directory in use, too little disk space, a model that the layout cannot hold, a
            reference to a model without a name.
    """
    handle = model if isinstance(model, Handle) else attached_to(model)
    if handle is None:
        assert isinstance(model, nn.Module)
        if weights != "copy":
            raise UsageError(
                "no method is attached to this model, so there is nothing to save but its weights."
            )
        saved = checkpoint.save(model, path, tokenizer=tokenizer, layout=layout, card=card, record=record)
        _push(path, push_to_hub, private)
        return saved
    if layout is not None:
        raise UsageError("a layout is for models that were cut; leave it out where a method is attached.")
    saved = save_attached(
        handle,
        Path(path),
        tokenizer=tokenizer,
        card=None if card is None else lambda _: card,
        more=record or {},
        weights=weights,
        base_model=base_model,
    )
    _push(path, push_to_hub, private)
    return saved


def _push(path: str | Path, repo: str | None, private: bool) -> None:
    if repo is not None:
        push(path, repo, private=private)


Card = Callable[[Mapping[str, Any]], str]
"""Makes the model card from the content of attached.json."""


def save_attached(
    handle: Handle,
    target: Path,
    *,
    tokenizer: Any = None,
    card: Card | None = None,
    more: Mapping[str, Any],
    weights: Weights = "copy",
    base_model: str | None = None,
) -> PreTrainedModel:
    """As `save`, for a handle. `more` goes into attached.json."""
    kept, model = handle.kept, unwrapped(handle.model)
    if kept is None:
        raise UsageError("this handle is detached, so its method is gone; save it while it is attached.")
    if any(b.kind == "experts" and k < b.units for b, k in zip(handle.blocks, handle.widths, strict=True)):
        raise UsageError(
            "an attached method that cuts experts cannot be saved with its model; prune the model instead, "
            "and save that."
        )
    if weights not in get_args(Weights):
        raise UsageError(unknown("place of weights", weights, get_args(Weights)))
    check_dtype(dtype_name(model.dtype))  # type: ignore[arg-type]
    base = _base_name(model) if base_model is None else base_model
    if weights == "reference" and not base:
        raise UsageError("nobody knows by which name this model opens; give base_model, or copy the weights.")
    card = card or (lambda stored: attached_card(stored, resolved(target).name))

    def write(folder: Path) -> None:
        write_attachment(
            folder,
            model,
            handle.blocks,
            kept,
            weights=weights,
            base_model=base,
            removed_share=handle.removed_share,
            more=more,
        )
        (folder / "README.md").write_text(card(read_record(folder).record), encoding="utf-8")

    if weights == "copy":
        return checkpoint.save(without_views(model), target, tokenizer=tokenizer, write_extra=write)
    check_free(target)
    with writing(target) as folder:
        write(folder)
    dense: Any = model
    return dense


def _base_name(model: Any) -> str | None:
    """The name by which `load_model` opens what a model was opened from; None where that is not known."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    path = Path(name)
    if name and path.is_dir():
        path = path.resolve()
        return EMBEDDED_MODEL if path == embedded_copy() else str(path)
    return name or None


def load_model(
    name: str = EMBEDDED_MODEL,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    memory: int | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    work: Work | None = None,
) -> LoadedModel:
    """Open a causal language model and its tokenizer, with the method attached that `save` kept with it.

    A model that does not fit into memory is opened with its decoder layers on disk: everything that works a
    layer at a time (`prepare`, `prune`, `save`, perplexity and scores, under a method too) works as usual.

    Args:
        name: `smollm2-135m` (embedded), a local directory, a `.gguf` file, or a hub id, tried in this order.
            GGUF weights are converted to float32 safetensors once and kept in `cache_dir()`.
        dtype: `bfloat16`, `float16`, `float32`, or `auto` for the device's `fastest_dtype`; with a method,
            `auto` for the dtype that its statistics were made in.
        device: `auto` (CUDA if available, otherwise CPU) or a name for `torch.device`.
        attn_implementation: as in transformers; None for its default (sdpa if the family supports it).
        trust_remote_code: run code that comes with the model. Only for sources you trust.
        memory: bytes that this process, or its part of an accelerator, may take in all; None for most that is
            free.
        device_map: spreads the layers over several devices, as in transformers: `auto`, `balanced`,
            `sequential`, or a device (`cpu` and `disk` too) for each module by name. In place of `device`
            and `memory`.
        work: what the model is opened for, which takes memory beside its weights (`footprint.Phase`); None
            for measuring perplexity on batches of 16 windows of 512 tokens.

    Returns:
        The model; `handle` is that of the attached method, None for a model without one.

    Raises:
        UsageError: no such model, a file in it that is damaged or leads out of its folder, no safetensors
            weights, quantised weights, tensors that are not those of the config, a model that is no causal
            language model, an unknown dtype, a device that this machine does not have, or less memory than
            a layer at a time takes; under a method, also dense weights that have changed, and statistics
            that are missing or torn.
    """

    def opened(what: str, dtype: str, attached: bool = False) -> LoadedModel:
        return loading.load_model(
            what,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            memory=memory,
            device_map=device_map,
            work=work,
            attached=attached,
        )

    try:
        return opened(name, dtype)
    except HoldsAttached as found:
        folder = found.folder
    if not Path(name).expanduser().is_dir():
        with quiet_libraries():
            folder = with_files(name, folder, [ATTACHED, STATISTICS])
    stored = read_record(folder)
    kept = read_attachment(stored)
    own = dtype_name(stored.dtype)
    loaded = (
        opened(name, own, attached=True) if stored.weights == "copy" else _opened_base(stored, own, opened)
    )
    check_base(loaded.model, stored)
    chosen = stored.dtype if dtype == "auto" else choose_dtype(dtype, loaded.device)
    if chosen != stored.dtype:
        cast(loaded.model, chosen)
    return replace(loaded, name=name, dtype=chosen, handle=attach_again(loaded.model, kept))


def _opened_base(stored: Stored, dtype: str, opened: Callable[[str, str], LoadedModel]) -> LoadedModel:
    """The dense model that a folder refers to."""
    try:
        return opened(stored.base_model or "", dtype)
    except UsageError as error:
        raise UsageError(
            f"'{stored.folder}' refers to the weights of {stored.base_model!r}, which do not open; if they "
            f"have moved, change base_model in its {ATTACHED}: {error}"
        ) from error
