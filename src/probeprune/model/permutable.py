"""Which linear maps can have their weights permuted in place: others are refused, with the reason."""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from probeprune.errors import UsageError
from probeprune.model.linear_maps import LinearMap, is_linear_map
from probeprune.model.narrow_linear import Narrow


def permutable(root: nn.Module, path: str, name: str) -> LinearMap:
    """The linear map at `path`. Raises `UsageError` unless its weight can be permuted in place."""
    module = root.get_submodule(path)
    where = f"{name}.{path}"
    if isinstance(module, Narrow):
        raise UsageError(f"a method is attached to this model ({where} shows a part only); detach it first.")
    weight = module._parameters.get("weight")
    plain = weight is None or (type(weight.data) is torch.Tensor and weight.is_floating_point())
    if not is_linear_map(module) or not plain:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        made_of = "" if weight is None else f" with a weight of {type(weight.data).__name__} {weight.dtype}"
        raise UsageError(
            f"{where} is a {kind}{made_of}, not a plain floating-point linear layer; quantised and wrapped "
            "weights cannot be permuted: load the model unquantised and merge adapters first."
        )
    if weight is None:
        raise UsageError(
            f"the weight of {where} is computed at every pass (torch.nn.utils.prune, weight_norm); make it a "
            "parameter first, for example with torch.nn.utils.prune.remove."
        )
    if weight.is_inference():
        raise UsageError(
            f"{where} was made under torch.inference_mode(), and its weight cannot be permuted in place; "
            "load the model outside."
        )
    assert isinstance(module, LinearMap)
    return module


def refuse_shared(model: nn.Module, maps: Mapping[str, Iterable[nn.Module]]) -> None:
    """Raise `UsageError` for a weight used by two modules: permuting it would change both.

    Args:
        model: the whole model.
        maps: the modules with the weights of each block, by the block's name.
    """
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), id(p))
        for p in model.parameters()
        if not p.is_meta and p.numel()
    )
    overlapping: set[int] = set()
    end, furthest = 0, 0  # the end of the spans so far, and the owner of the one that reaches it
    for first, last, owner in spans:
        if first < end:
            overlapping |= {furthest, owner}
        if last > end:
            end, furthest = last, owner
    for block, modules in maps.items():
        for module in modules:
            if any(owners[id(p)] > 1 or id(p) in overlapping for p in module.parameters()):
                raise UsageError(
                    f"a weight of {block} is tied to another module or shares its memory; "
                    "give each module its own copy before pruning."
                )
