"""Two GPUs that are none: models whose layers lie on several devices, on a machine without any.

torch's fake tensors carry a device and compute shapes alone, and an operation on tensors of two devices fails
as it would on a real machine. What this torch cannot do with them, since it was built without CUDA, is done
here by other operations. Every `bool` of a fake tensor is true.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from probeprune.calibration.statistics import Statistics
from probeprune.model import attention_maps, blocks
from probeprune.model.families import find_family
from probeprune.prepare import Prepared
from probeprune.runtime.side_stream import SideStream

aten = torch.ops.aten


def _index(tensor: torch.Tensor, key: Any) -> tuple[torch.Tensor, list[Any]]:
    """A tensor with all integers, slices and Nones of a key applied, and what is left to index it by."""
    key = key if isinstance(key, tuple) else (key,)
    taken = sum(k is not None and k is not Ellipsis for k in key)
    places, axis = [], 0
    for k in key:
        for part in [slice(None)] * (tensor.ndim - taken) if k is Ellipsis else [k]:
            if part is None:
                tensor = aten.unsqueeze.default(tensor, axis)
            elif isinstance(part, int):
                tensor = aten.select.int(tensor, axis, part)
                continue
            elif isinstance(part, slice) and part != slice(None):
                tensor = aten.slice.Tensor(tensor, axis, part.start, part.stop, part.step or 1)
            places.append(part if isinstance(part, torch.Tensor) else None)
            axis += part.ndim if isinstance(part, torch.Tensor) and part.dtype == torch.bool else 1
    return tensor, places


def _get(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    part, places = _index(tensor, key)
    return aten.index.Tensor(part, places) if any(p is not None for p in places) else part


def _set(tensor: torch.Tensor, key: Any, value: Any) -> None:
    part, places = _index(tensor, key)
    value = value if isinstance(value, torch.Tensor) else torch.full((), value, device=tensor.device)
    if any(p is not None for p in places):
        aten.index_put_.default(part, places, value)
    else:
        aten.copy_.default(part, value)


STAND_INS = {
    "__getitem__": _get,
    "__setitem__": _set,
    "__invert__": lambda t: aten.bitwise_not.default(t),
    "__bool__": lambda t: True,
    "copy_": lambda t, source, *rest: aten.copy_.default(t, source),
    "contiguous": lambda t, **how: aten.clone.default(t, memory_format=torch.contiguous_format),
}
"""Operations of `FakeTensor` that would ask a CUDA driver first."""


@contextmanager
def two_gpus(model: nn.Module, prepared: Prepared) -> Iterator[None]:
    """Spread a model over two GPUs inside the context, layer by layer in turn, as accelerate does.

    Its weights lose their numbers. `prepared` is of the model as it is now.
    """
    layers = model.get_submodule(find_family(model).layers)
    inside = {m for layer in layers for m in layer.modules()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            if module not in inside:
                _move(module, "cuda:0")
        for i, layer in enumerate(layers):
            for module in layer.modules():
                _move(module, f"cuda:{i % 2}")
            add_hook_to_module(layer, AlignDevicesHook(execution_device=f"cuda:{i % 2}"))
        for module in model.modules():
            if module not in inside and not list(module.children()):
                add_hook_to_module(module, AlignDevicesHook(execution_device="cuda:0"))
        with (
            patch.multiple(FakeTensor, create=True, **STAND_INS),
            patch.object(blocks, "permutable", _found),
            patch.object(attention_maps, "permutable", _found),
            patch.object(blocks, "refuse_shared"),
            patch("probeprune.prepare.model_fingerprint", lambda model: prepared.model),
            patch.object(Statistics, "check"),
            patch.object(SideStream, "__init__", _no_stream),
        ):
            yield


def _found(root: nn.Module, path: str, name: str) -> nn.Module:
    """What stands in for `permutable`: a fake weight is none that it would let pass."""
    return root.get_submodule(path)


def _move(module: nn.Module, device: str) -> None:
    for store in (module._parameters, module._buffers):
        for name, own in store.items():
            if own is not None:
                moved = torch.empty(own.shape, dtype=own.dtype, device=device)
                store[name] = nn.Parameter(moved, False) if isinstance(own, nn.Parameter) else moved


def _no_stream(self: SideStream, device: torch.device) -> None:
    self._stream = None
