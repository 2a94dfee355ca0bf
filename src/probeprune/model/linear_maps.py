"""Linear maps as matrices (out, in), however their modules store them.

`nn.Linear` stores its weight as (out, in), GPT-2's `Conv1D` as (in, out). All other code reads weights
through `matrix`, whose rows are outputs and whose columns are inputs, and writes through the same view.
"""

from typing import TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

LinearMap: TypeAlias = nn.Linear | Conv1D
"""A module that multiplies by its weight and adds its bias, if it has one."""

_SAME_FORWARD = {("transformers.models.falcon.modeling_falcon", "FalconLinear")}
"""Subclasses of `nn.Linear` (module, name) that compute the same and store their weight alike."""


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module is a plain linear map: quantised and adapter-wrapped ones subclass or replace it."""
    kind = type(module)
    return kind in (nn.Linear, Conv1D) or (
        (kind.__module__, kind.__name__) in _SAME_FORWARD and isinstance(module, nn.Linear)
    )


def oriented(linear: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """View (out, in) of a tensor that lies as the map's weight does, and back: it is its own inverse.

    A bias stays as it is.
    """
    return tensor.T if isinstance(linear, Conv1D) and tensor.ndim == 2 else tensor


def matrix(linear: LinearMap) -> torch.Tensor:
    """The weight that the map's forward reads, as (out, in), without gradients: a view."""
    return oriented(linear, linear.weight.detach())


def sizes(linear: LinearMap) -> tuple[int, int]:
    """The map's (out, in) as it says itself: a view of it may show a narrower weight."""
    if isinstance(linear, Conv1D):
        return vars(linear)["nf"], vars(linear)["nx"]  # not a view's property
    return linear.out_features, linear.in_features


def replace_weight(linear: LinearMap, weight: torch.Tensor) -> None:
    """Put a weight (out, in) in place of the map's own, and let the map say its sizes."""
    old = linear._parameters["weight"]
    assert old is not None
    stored = oriented(linear, weight).contiguous()
    linear._parameters["weight"] = nn.Parameter(stored, requires_grad=old.requires_grad)
    if isinstance(linear, Conv1D):
        linear.nf, linear.nx = weight.shape
    else:
        linear.out_features, linear.in_features = weight.shape
