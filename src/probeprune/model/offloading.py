"""Models whose weights are not all in memory: accelerate keeps some on disk, or in slower memory.

By itself accelerate fetches the weights of one module for every call of it and drops them behind. Here a
whole layer is fetched once, worked on, and put back; where the work changed it, what it has become is written
to a folder. The model stays an ordinary one: accelerate finds the new weights there.
"""

import shutil
import sys
import tempfile
import uuid
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import SafetensorError
from torch import nn

from probeprune.errors import UsageError, first_line
from probeprune.files import save_tensors
from probeprune.model.hidden_states import Room
from probeprune.model.joined import JoinedWeights, places
from probeprune.model.machine import release_freed
from probeprune.model.scratch import Scratch
from probeprune.provenance import dtype_name

_ROOM = "_probeprune_room"
"""Attribute of an offloaded model: where hidden states of many batches go."""
_CHANGES = "_probeprune_changes"
"""Attribute of an offloaded model: the folder of its changed layers."""


def fetching_hook(module: nn.Module) -> AlignDevicesHook | None:
    """What accelerate fetches a module's own weights by; None where they are in place."""
    return _fetching(module.__dict__.get("_hf_hook"))


def _fetching(hook: object) -> AlignDevicesHook | None:
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload), None)


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weights of a module, or of one inside it, are out of place until they are called."""
    return any(fetching_hook(module) is not None for module in model.modules())


def device_of(model: nn.Module) -> torch.device:
    """The device that takes the token ids of a model."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    hook = fetching_hook(embedding)
    return embedding.weight.device if hook is None else torch.device(hook.execution_device)


def room_of(model: nn.Module) -> Room:
    """Where hidden states go that many batches have between two layers.

    In memory, but for an offloaded model: there as much as `set_scratch` said, or a quarter of what is free.
    """
    room = model.__dict__.get(_ROOM)
    if isinstance(room, Room):
        return room
    return Room(psutil.virtual_memory().available // 4 if is_offloaded(model) else sys.maxsize)


def set_scratch(model: nn.Module, folder: Scratch, room: Room) -> None:
    """Say where the changed layers of an offloaded model go, and its hidden states."""
    model.__dict__[_CHANGES], model.__dict__[_ROOM] = folder, room


def changes_of(model: nn.Module) -> Path | None:
    """The folder of the layers of an offloaded model that work has changed; it lives as long as the model.

    None for a model in memory.
    """
    if not is_offloaded(model):
        return None
    if not isinstance(model.__dict__.get(_CHANGES), Scratch):
        model.__dict__[_CHANGES] = Scratch("probeprune-layers")
    path: Path = model.__dict__[_CHANGES].path
    return path


def check_changes(model: nn.Module, size: int) -> None:
    """Raise `UsageError` unless the disk takes `size` bytes of changed layers of an offloaded model."""
    folder = changes_of(model)
    free = sys.maxsize if folder is None else shutil.disk_usage(folder).free
    if free < size:
        raise UsageError(
            f"the layers that are cut take {size / 2**30:.2f} GiB, and the disk of {tempfile.gettempdir()} "
            f"has {free / 2**30:.2f} GiB left; free some space, or set TMPDIR to a folder on another disk."
        )


def share_offloading(model: nn.Module, other: nn.Module, zeros: Collection[str] = ()) -> None:
    """Let another model with the same weights, by name, fetch them from where an offloaded one does.

    Args:
        model: the offloaded model; where it is none, nothing happens.
        other: the model that holds its weights.
        zeros: parameters of `other` alone, which are zero.
    """
    if not is_offloaded(model):
        return
    for path, module in model.named_modules():
        hook = fetching_hook(module)
        if hook is None:
            continue
        target = other.get_submodule(path)
        new = {
            key: torch.zeros(own.shape, dtype=own.dtype)
            for key, own in target._parameters.items()
            if own is not None and f"{path}.{key}" in zeros
        }
        weights = ChainMap(new, hook.weights_map) if new else hook.weights_map
        add_hook_to_module(target, AlignDevicesHook(hook.execution_device, offload=True, weights_map=weights))
    for name in (_ROOM, _CHANGES):
        if name in model.__dict__:
            other.__dict__[name] = model.__dict__[name]


@contextmanager
def in_memory(
    module: nn.Module, name: str = "", changes: Path | None = None, *, wide: bool = False
) -> Iterator[None]:
    """Keep the weights of a module, and of all modules inside it, in place inside the context.

    They are on the device where accelerate runs them. Weights that are in place anyway are left as they are.
    Where the context ends by an exception nothing is written, and the module is as before.

    Args:
        module: a decoder layer, for example.
        name: its path in the model, which begins the names of its weights in a file.
        changes: a folder to write the weights to when the context ends, for work that changes them; from then
            on they are read from there. None drops every change.
        wide: put float32 copies of narrower weights and buffers in their place, which are dropped.

    Raises:
        UsageError: a file that weights are read from has gone, or was changed.
    """
    hooks = {m: m._hf_hook for m in module.modules() if fetching_hook(m) is not None}
    before = {m: dict(m._parameters) for m in (module.modules() if wide else hooks)}
    buffers = {m: dict(m._buffers) for m in before} if wide else {}
    try:
        with torch.inference_mode(False):  # inference tensors could not be written outside
            for m in before:
                if m in hooks:
                    _fetch(m)
                if wide:
                    _widen(m)
        yield
        if hooks and changes is not None:
            _write(module, name, hooks, changes)
            before = {m: _without_numbers(m) for m in hooks}
    finally:
        for m, own in before.items():
            m._parameters.clear()
            m._parameters.update(own)
            m._buffers.update(buffers.get(m, {}))
        for m, hook in hooks.items():
            add_hook_to_module(m, hook)
        release_freed()


def widened(value: Any) -> Any:
    """A tensor in float32 where it has a narrower floating dtype; all those in tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() and value.itemsize < 4 else value
    if isinstance(value, dict):
        return {key: widened(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [widened(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _widen(module: nn.Module) -> None:
    """Put float32 copies in the place of a module's own narrower weights and buffers."""
    for key, own in module._parameters.items():
        if own is None:
            continue
        wide = widened(own.detach())
        if wide.dtype != own.dtype:
            module._parameters[key] = nn.Parameter(wide, requires_grad=own.requires_grad)
    module._buffers.update(widened(module._buffers))


def _fetch(module: nn.Module) -> None:
    """Put a module's own weights in place, as copies, and take accelerate's hook off."""
    hook = fetching_hook(module)
    assert hook is not None
    fetched = {
        key: nn.Parameter(
            _numbers(hook.weights_map, key, own.shape).to(hook.execution_device, copy=True),
            requires_grad=own.requires_grad,
        )
        for key, own in module._parameters.items()
        if own is not None
    }
    remove_hook_from_module(module)
    module._parameters.update(fetched)


def fetched(model: nn.Module, name: str) -> torch.Tensor:
    """The numbers of one parameter, given by its path, from wherever they are."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    hook = fetching_hook(module)
    own = module.get_parameter(key)
    return own.detach() if hook is None else _numbers(hook.weights_map, key, own.shape)


def _numbers(weights: Mapping[str, torch.Tensor], key: str, shape: torch.Size) -> torch.Tensor:
    """One parameter from where accelerate keeps it."""
    try:
        found = weights[key]
        if found.shape == shape:
            return found
        problem = f"it has shape {tuple(found.shape)}, and had {tuple(shape)}"
    except (OSError, SafetensorError) as error:
        problem = first_line(error)
    name, file = _described(weights, key)
    layer = next((f" of layer {part}" for part in name.split(".") if part.isdecimal()), "")
    raise UsageError(
        f"{name or key}{layer} cannot be read from {file or 'its file'} any more: {problem}; put the file "
        "back as it was, and start again."
    )


def _described(weights: object, key: str) -> tuple[str, str]:
    """The name of a parameter and the file it is read from (of several the first), as far as is known."""
    while isinstance(weights, _Cast | ChainMap):
        weights = weights.weights if isinstance(weights, _Cast) else weights.maps[-1]
    if not isinstance(weights, PrefixedDataset):
        return "", ""
    found = _places(weights, key)
    return f"{weights.prefix}{key}", str(found[0][0]) if found else ""


def _places(weights: object, key: str) -> tuple[tuple[Path, str], ...]:
    """The safetensors files that a parameter is read from, and the names there; none for one in memory."""
    if not isinstance(weights, PrefixedDataset) or not isinstance(weights.dataset, OffloadedWeightsLoader):
        return ()
    loader, name = weights.dataset, f"{weights.prefix}{key}"
    return loader.places(name) if isinstance(loader, JoinedWeights) else places(loader, name)


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters of a model by name, each fetched when its turn comes."""
    return ((name, fetched(model, name)) for name, _ in model.named_parameters())


def origin(model: nn.Module, name: str) -> tuple[object, ...]:
    """Where a parameter is fetched from: another value where its file is another, or has changed. Empty for a
    parameter in place."""
    path, _, key = name.rpartition(".")
    hook = fetching_hook(model.get_submodule(path))
    if hook is None:
        return ()
    stored = stored_in(model, name)
    if not stored:
        value = hook.weights_map[key]
        return value.data_ptr(), value._version
    states: list[object] = []
    for file in dict.fromkeys(file for file, _ in stored):
        try:
            state = file.stat()
        except OSError:  # it has gone, as whoever reads it will hear
            states.append(None)
        else:
            states.append((state.st_ino, state.st_size, state.st_mtime_ns))
    return stored, tuple(states)


def stored_in(model: nn.Module, name: str) -> tuple[tuple[Path, str], ...]:
    """The safetensors files that an offloaded parameter is read from, and its names there, one for each of
    its pieces; none for one that is in place, in memory, or cast by `cast`."""
    path, _, key = name.rpartition(".")
    hook = fetching_hook(model.get_submodule(path))
    return () if hook is None else _places(hook.weights_map, key)


class _Cast(Mapping[str, torch.Tensor]):
    """Weights in another dtype."""

    def __init__(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.weights, self._dtype = weights, dtype

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.weights[key].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of a model, those that are offloaded too."""
    if not is_offloaded(model):
        model.to(dtype)
        return
    for module in model.modules():
        hook = fetching_hook(module)
        if hook is not None:
            hook.weights_map = _Cast(hook.weights_map, dtype)
        for own in module._parameters.values():
            if own is not None:
                own.data = own.data.to(dtype)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.to(dtype)


def _without_numbers(module: nn.Module) -> dict[str, nn.Parameter | None]:
    return {
        key: None if own is None else nn.Parameter(own.detach().to("meta"), requires_grad=own.requires_grad)
        for key, own in module._parameters.items()
    }


def _write(module: nn.Module, name: str, hooks: Mapping[nn.Module, Any], folder: Path) -> None:
    """Write the weights of hooked modules to a file in `folder`, and let their hooks read them there."""
    paths = {m: f"{name}.{path}" if path else name for path, m in module.named_modules()}
    tensors = {
        f"{paths[m]}.{key}": own.detach()
        for m in hooks
        for key, own in m._parameters.items()
        if own is not None
    }
    file = folder / f"{name}-{uuid.uuid4().hex[:8]}.safetensors"
    save_tensors(file, tensors, {"format": "pt"})
    index = {
        key: {"safetensors_file": str(file), "weight_name": key, "dtype": dtype_name(t.dtype)}
        for key, t in tensors.items()
    }
    stored = OffloadedWeightsLoader(index=index)
    for m, hook in hooks.items():
        fetching = _fetching(hook)
        assert fetching is not None
        fetching.weights_map = PrefixedDataset(stored, f"{paths[m]}.")
