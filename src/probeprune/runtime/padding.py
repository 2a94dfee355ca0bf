"""Padding without a mask: a dynamic method would take it for text. Knows nothing of methods."""

from typing import Any

import torch

CHECKED = 32
"""Prompts without a mask that are looked at: to look waits for the device."""


def looks_padded(ids: torch.Tensor, config: Any) -> bool:
    """Whether the rows of a prompt (batch, length) look padded, by the config's padding token at their ends.

    A padding token that also begins or ends texts counts only where some rows have it and others have not.
    """
    pad = getattr(config, "pad_token_id", None)
    if pad is None or ids.is_meta or not ids.numel():
        return False
    edges = (ids[:, [0, -1]] == pad).cpu()
    if pad not in _flat(getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)):
        return bool(edges.any())
    return bool((edges.any(0) & ~edges.all(0)).any())


def _flat(*ids: Any) -> list[int]:
    return [i for some in ids for i in (some if isinstance(some, list | tuple) else [some])]
