"""Find the model inside wrappers that other libraries put around it."""

from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside `torch.compile`, (distributed) data parallelism and PEFT, in any order.

    The model inside computes the same function: wrappers share its modules, and adapters live in them.
    """
    inside: Any = model
    while True:
        if isinstance(inside, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = inside.module
        elif "_orig_mod" in getattr(inside, "_modules", {}):  # torch.compile
            inside = inside._orig_mod
        elif hasattr(inside, "peft_config") and hasattr(inside, "get_base_model"):
            inside = inside.get_base_model()
        else:
            found: nn.Module = inside
            return found
