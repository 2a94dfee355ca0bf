"""Linear maps that show a part of their weight while a method is attached.

`_parameters` of such a map always hold the whole weight, so whatever walks over parameters (`.to()`,
optimizers, state dicts, checks for shared storage) sees the model as it is. Only `weight` and `bias`, which a
forward reads, show the part in view. A map becomes a `Narrow` in place and a plain one again, so it stays the
same object in everybody's hands.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.functional import linear as multiply
from transformers.pytorch_utils import Conv1D

from probeprune.errors import UsageError
from probeprune.model.linear_maps import LinearMap, oriented

_STATE = "_view"


class View:
    """The part of a linear map in view.

    Attributes:
        narrow: whether the part is shown; the whole otherwise.
        axis: 0 for rows (a producer), 1 for columns (the consumer).
        ranges: (start, length) of the rows or columns that are shown; several for a fused map.
        replacement: a weight to show instead of the part, shaped like it; None for the part itself.
        added_bias: a bias (out,) to show instead of the map's own; None for its own.
        original: gives a parameter, by name, as it was before its units were permuted.
        kind: the map's own class.
        plain: weight and bias in view, for passes without gradients; None for all, or several ranges.

    Weights are (out, in) here, whatever the map stores.
    """

    def __init__(self, linear: LinearMap, axis: int, original: Callable[[str], torch.Tensor]) -> None:
        self.linear, self.axis, self.original = linear, axis, original
        self.kind: type[LinearMap] = type(linear)
        self.narrow = False
        self.ranges: list[tuple[int, int]] = []
        self.replacement: torch.Tensor | None = None
        self.added_bias: torch.Tensor | None = None
        self._weights: list[torch.Tensor] = []
        self._biases: list[torch.Tensor] = []
        self._stamp: list[tuple[object, ...]] = []
        self.plain: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.stamp()

    def settle(self, narrow: bool) -> None:
        """Show the part or the whole; to be called after any change of what there is to show."""
        self.narrow, self.plain = narrow, None
        if self.narrow and len(self.ranges) == 1:
            with torch.no_grad():
                self.plain = self.weights()[0], self.biases()[0]

    def show(self, ranges: list[tuple[int, int]]) -> None:
        """Show these ranges, and no replacement."""
        self.ranges, self.replacement, self.added_bias = ranges, None, None
        self.refresh()

    def refresh(self) -> None:
        """Make the views anew, after the parameters have changed place or type."""
        weight, bias = self.linear._parameters["weight"], self.linear._parameters["bias"]
        assert weight is not None
        with torch.inference_mode(False), torch.no_grad():
            if self.replacement is not None:
                self.replacement = self.replacement.to(weight)
            if self.added_bias is not None:
                self.added_bias = self.added_bias.to(weight)
            self._weights = self._parts(oriented(self.linear, weight.detach()), self.axis)
            # A consumer's bias belongs to no unit.
            self._biases = self._parts(bias.detach(), 0) if bias is not None and self.axis == 0 else []
        self.settle(self.narrow)

    def stamp(self) -> None:
        """Take the parameters for unchanged as they are now."""
        self._stamp = self._state()

    @property
    def changed(self) -> bool:
        """Whether somebody else has written to the parameters, or put others in their place, since
        `stamp`."""
        return self._state() != self._stamp

    def _state(self) -> list[tuple[object, ...]]:
        # Read at every pass, for every map: a step of decoding has no time for more.
        weight, bias = self.linear._parameters["weight"], self.linear._parameters["bias"]
        assert weight is not None
        if weight.is_meta:
            return [(weight.dtype,)]
        state: list[tuple[object, ...]] = [(weight.data_ptr(), weight._version, weight.dtype)]
        return state if bias is None else [*state, (bias.data_ptr(), bias._version, bias.dtype)]

    def _parts(self, whole: torch.Tensor, axis: int) -> list[torch.Tensor]:
        return [whole.narrow(axis, *r) for r in self.ranges]

    def weights(self) -> list[torch.Tensor]:
        """The weight's parts in view, one per range."""
        if self.replacement is not None:
            return [self.replacement]
        whole = self.linear._parameters["weight"]
        assert whole is not None
        if torch.is_grad_enabled() and whole.requires_grad:  # views that lead gradients to the parameter
            return self._parts(oriented(self.linear, whole), self.axis)
        return self._weights

    def shown(self) -> torch.Tensor:
        """The weight in view, in one piece."""
        weights = self.weights()
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def biases(self) -> list[torch.Tensor | None]:
        """The bias' parts in view, one per range."""
        own = self.linear._parameters["bias"]
        if self.added_bias is not None:
            total = self.added_bias
            if self.replacement is None and torch.is_grad_enabled() and own is not None and own.requires_grad:
                total = total + (own - own.detach())  # the same bits, and the own bias' gradient
            return [total]
        if own is None or self.axis == 1:
            return [own] * len(self.ranges)
        if torch.is_grad_enabled() and own.requires_grad:
            return [*self._parts(own, 0)]
        return [*self._biases]


class Narrow(nn.Module):
    """A linear map with a `View`. Made and unmade by `open_view` and `close_view`."""

    @property
    def weight(self) -> torch.Tensor:
        view: View = self.__dict__[_STATE]
        if not view.narrow:
            return self._parameters["weight"]  # type: ignore[return-value]
        return oriented(self, view.shown())

    @property
    def bias(self) -> torch.Tensor | None:
        view: View = self.__dict__[_STATE]
        if not view.narrow:
            return self._parameters["bias"]
        biases = view.biases()
        if len(biases) == 1 or biases[0] is None:
            return biases[0]
        return torch.cat([b for b in biases if b is not None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # None where others have kept this method beyond the view, to call it from a forward of theirs.
        view: View | None = self.__dict__.get(_STATE)
        if view is not None and view.plain is not None and not torch.is_grad_enabled():
            return multiply(x, *view.plain)
        if view is not None and view.narrow and len(view.ranges) > 1:
            # The rows in view do not lie together: each range multiplies alone, without a copy of the weight.
            parts = zip(view.weights(), view.biases(), strict=True)
            return torch.cat([multiply(x, weight, bias) for weight, bias in parts], dim=-1)
        return multiply(x, oriented(self, self.weight), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "Narrow":
        view: View = self.__dict__[_STATE]
        changed = view.changed
        super()._apply(fn, recurse)
        view.refresh()
        if not changed:  # a change by others before this one is still theirs
            view.stamp()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not None:
                destination[prefix + name] = self.__dict__[_STATE].original(name)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        refuse_to_load()

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_to_copy()

    # A parameter put in place of another has its units in an order that nobody can know.

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._parameters:
            raise attached(f"replacing its {name}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._parameters:
            raise attached(f"replacing its {name}")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        raise attached("giving its modules other parameters")


class NarrowLinear(Narrow, nn.Linear):  # type: ignore[misc, override]
    """An `nn.Linear`, or a subclass with the same forward, with a `View`."""


class NarrowConv1D(Narrow, Conv1D):
    """A `Conv1D` with a `View`."""

    @property
    def nf(self) -> int:
        """Outputs in view: the forward of `Conv1D`, where others have kept it, shapes its result by this."""
        return int(self.weight.shape[1])


def attached(doing: str) -> UsageError:
    """The error for something that cannot be done to a map that shows a part of its weight."""
    return UsageError(f"a method is attached to this model; detach it before {doing}.")


def refuse_to_load(*_: object) -> NoReturn:
    """Raise `UsageError`; a hook in front of loading a state dict."""
    raise attached("loading weights into it")


def refuse_to_copy() -> NoReturn:
    """Raise `UsageError`: a copy of a view would show the weights of the original."""
    raise attached("copying or pickling it")


def open_view(linear: LinearMap, axis: int, original: Callable[[str], torch.Tensor]) -> View:
    """Turn a plain linear map into one with a view, showing the whole."""
    view = View(linear, axis, original)
    linear.__dict__[_STATE] = view
    linear.__class__ = NarrowConv1D if isinstance(linear, Conv1D) else NarrowLinear
    return view


def is_view(module: nn.Module) -> bool:
    """Whether a module has a view."""
    return isinstance(module, Narrow)


def dense_parameter(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter of a map with a view, whole, as it was before its units were permuted."""
    view: View = module.__dict__[_STATE]
    return view.original(name)


def plain_kind(module: nn.Module) -> type[nn.Module]:
    """The class of a module without its view."""
    return module.__dict__[_STATE].kind if isinstance(module, Narrow) else type(module)


def close_view(linear: LinearMap) -> None:
    """Turn a linear map with a view into a plain one again."""
    if isinstance(linear, Narrow):
        linear.__class__ = plain_kind(linear)  # type: ignore[assignment]
        del linear.__dict__[_STATE]
