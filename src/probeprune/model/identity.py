"""A hash of a model's weights as they are, and files for what is computed from them."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from probeprune.model.narrow_linear import dense_parameter, is_view
from probeprune.model.offloading import fetched, named_weights, origin

_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()
"""By model: its state when it was hashed, and the hash."""

_SAMPLE = 64
"""Values of a weight that are compared before its hash is used again."""


def content_file(
    cache: Path | None, model: nn.Module, windows: torch.Tensor, *settings: object
) -> Path | None:
    """The file in a cache for what is computed from a model and windows with these settings; None without a
    cache."""
    if cache is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([*settings, list(windows.shape)]).encode())
    digest.update(windows.contiguous().numpy().tobytes())
    digest.update(model_fingerprint(model).encode())
    return cache / f"{digest.hexdigest()}.safetensors"


def model_fingerprint(model: nn.Module) -> str:
    """A hash of all weights (names, dtypes and bytes; saved buffers among them) and of the config fields that
    change the function.

    All weights are hashed only on the first call and after a change, so repeated calls are cheap.
    """
    state = _state(model)
    if model in _FINGERPRINTS and _FINGERPRINTS[model][0] == state:
        return _FINGERPRINTS[model][1]
    fingerprint = _hash(model)
    _FINGERPRINTS[model] = state, fingerprint
    return fingerprint


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of all weights alone (names, dtypes and bytes; saved buffers among them), whichever library's
    release reads their config.

    A method may be attached: the hash is that of the dense model.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, _ in model.named_parameters():
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        # A view's parameter has its units in another order.
        own = dense_parameter(owner, key) if is_view(owner) else fetched(model, name)
        _add(digest, name, own)
    for name, buffer in _saved_buffers(model):
        _add(digest, name, buffer)
    return digest.hexdigest()


def config_fields(model: Any) -> dict[str, Any]:
    """The fields of a model's config that may change its function, as JSON values."""
    fields: dict[str, Any] = json.loads(_config(model))
    return {k: v for k, v in fields.items() if k not in _NO_FUNCTION}


_NO_FUNCTION = ("transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")
"""Config fields that change no logit of the weights as they are, or that every release writes differently."""


def _state(model: nn.Module) -> object:
    """A value that differs after a change to the model, without reading all weights.

    Torch counts writes to a tensor in `_version`, but not those through `.data`, by which adapters are
    merged. A few values of each weight show those too.
    """
    weights: list[object] = []
    for name, p in model.named_parameters():
        elsewhere = origin(model, name)
        if elsewhere:
            weights.append((name, *elsewhere, p.dtype, p.shape))
            continue
        few = p.detach().flatten()[:: max(p.numel() // _SAMPLE, 1)].cpu().contiguous()
        version = None if p.is_inference() else p._version
        facts = (name, p.data_ptr(), version, p.dtype, p.shape, p.device)
        weights.append((*facts, few.view(torch.uint8).numpy().tobytes()))
    for name, b in _saved_buffers(model):  # small: corrections of a router's scores, scales
        weights.append((name, b.dtype, b.shape, bytes(_bytes(b))))
    return _config(model), weights


def _config(model: Any) -> str:
    fields = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    return json.dumps(fields, sort_keys=True, default=str)


def _hash(model: nn.Module) -> str:
    """The fingerprint, from all weights."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_config(model).encode())
    for name, p in named_weights(model):
        _add(digest, name, p)
    for name, buffer in _saved_buffers(model):
        _add(digest, name, buffer)
    return digest.hexdigest()


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that a checkpoint holds, such as the correction of a router's scores."""
    for path, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set and not buffer.is_meta:
                yield f"{path}.{key}", buffer


def _add(digest: Any, name: str, p: torch.Tensor) -> None:
    digest.update(f"{name}{p.dtype}{tuple(p.shape)}".encode())
    digest.update(_bytes(p))


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
