"""The versions that a result depends on, and the name of a dtype in it."""

import importlib.metadata

import torch


def versions(*more: str) -> dict[str, str]:
    """The versions of this package, torch, transformers and the packages named in `more`."""
    return {p: importlib.metadata.version(p) for p in ("probeprune", "torch", "transformers", *more)}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in results and on the command line, such as `float32`."""
    return str(dtype).removeprefix("torch.")
