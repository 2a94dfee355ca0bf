"""What a result depends on besides its settings."""

import hashlib
import importlib.metadata
import json

import torch
from torch import nn


def versions(*more: str) -> dict[str, str]:
    """The versions of this package, torch and transformers, and of these packages."""
    return {p: importlib.metadata.version(p) for p in ("probeprune", "torch", "transformers", *more)}


def dtype_name(dtype: torch.dtype) -> str:
    """As it is written in results and on the command line: `float32`."""
    return str(dtype).removeprefix("torch.")


def content_key(model: nn.Module, windows: torch.Tensor, *settings: object) -> str:
    """A name for what these settings give on this model and these windows."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([*settings, list(windows.shape)]).encode())
    digest.update(windows.contiguous().numpy().tobytes())
    digest.update(model_fingerprint(model).encode())
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """A hash of all weights (names, types and bytes) and of the config fields that change the function."""
    digest = hashlib.blake2b(digest_size=16)
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}  # type: ignore[operator,union-attr]
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, p in model.named_parameters():
        digest.update(f"{name}{p.dtype}{tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
