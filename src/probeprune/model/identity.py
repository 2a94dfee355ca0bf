"""A hash of a model's weights as they are, and keys for what is computed from them."""

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from probeprune.model.offloading import named_weights, origin

_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()
"""By model: its state when it was hashed, and the hash."""

_SAMPLE = 64
"""Values of a weight that are compared before its hash is used again."""


def content_key(model: nn.Module, windows: torch.Tensor, *settings: object) -> str:
    """A key for caching what is computed from a model and windows with these settings."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([*settings, list(windows.shape)]).encode())
    digest.update(windows.contiguous().numpy().tobytes())
    digest.update(model_fingerprint(model).encode())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """A hash of all weights (names, dtypes and bytes) and of the config fields that change the function.

    All weights are hashed only on the first call and after a change, so repeated calls are cheap.
    """
    state = _state(model)
    if model in _FINGERPRINTS and _FINGERPRINTS[model][0] == state:
        return _FINGERPRINTS[model][1]
    fingerprint = _hash(model)
    _FINGERPRINTS[model] = state, fingerprint
    return fingerprint


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
    return _config(model), weights


def _config(model: Any) -> str:
    fields = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    return json.dumps(fields, sort_keys=True, default=str)


def _hash(model: nn.Module) -> str:
    """The fingerprint, from all weights."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_config(model).encode())
    for name, p in named_weights(model):
        digest.update(f"{name}{p.dtype}{tuple(p.shape)}".encode())
        digest.update(p.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
