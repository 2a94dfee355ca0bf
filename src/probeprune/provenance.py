"""What a result depends on besides its settings."""

import importlib.metadata

import torch


def versions(*more: str) -> dict[str, str]:
    """The versions of this package, torch and transformers, and of these packages."""
    return {p: importlib.metadata.version(p) for p in ("probeprune", "torch", "transformers", *more)}


def dtype_name(dtype: torch.dtype) -> str:
    """As it is written in results and on the command line: `float32`."""
    return str(dtype).removeprefix("torch.")
