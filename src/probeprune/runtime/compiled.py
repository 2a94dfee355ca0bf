"""Decoder layers of an attached model, compiled one by one with `torch.compile`.

What a block shows of its weights is a view of fixed shape in fixed storage, so code that was compiled once
stays right while units swap. Stages of a dynamic method run in Python: where a pass has any, the two blocks
of a layer are compiled and what is around them is not. Knows nothing of what the stages do.
"""

import sysconfig
import uuid
from collections.abc import Callable, Sequence
from functools import update_wrapper
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from probeprune.errors import UsageError, first_line
from probeprune.model.blocks import Block, find_layers
from probeprune.model.forwards import replace_forward
from probeprune.model.narrow_linear import refuse_to_copy
from probeprune.model.offloading import is_offloaded
from probeprune.model.wrappers import unwrapped
from probeprune.strategies.widths import Prunable

BACKEND = "inductor"
"""What `torch.compile` compiles with; its own default."""


def check_compilable(model: nn.Module) -> None:
    """Raise `UsageError` for a model, as it was given to `attach`, whose layers cannot be compiled here."""
    inside = unwrapped(model)
    if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()):
        raise UsageError(
            "this model is compiled already, and compile would compile its layers again; give the model as "
            "it was before torch.compile, or leave compile out."
        )
    if is_offloaded(inside):
        raise UsageError(
            "layers of this model are offloaded, and compiled code cannot fetch their weights; load it "
            "without offloading, or leave compile out."
        )
    devices = sorted({str(p.device) for p in inside.parameters()})
    if len(devices) > 1:
        raise UsageError(
            f"compile takes a model on one device, and this one is on {' and '.join(devices)}; load it "
            "without device_map, or leave compile out."
        )
    missing = missing_compiler(torch.device(devices[0]))
    if missing:
        raise UsageError(f"compile {missing}; or leave compile out.")


def missing_compiler(device: torch.device) -> str | None:
    """What `torch.compile` lacks here for models on this device, and what to do, in words that follow a
    subject; None where nothing is missing. Compiles nothing."""
    if not torch._dynamo.is_dynamo_supported():
        return "does not work with this Python and PyTorch; use a Python that torch.compile supports"
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:  # torch raises different ones on different systems
            return f"needs a C++ compiler, and PyTorch finds none ({first_line(error)}); install g++"
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return "needs the headers of Python, and Python.h is missing; install python3-dev"
        return None
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "needs Triton, and finds none for this GPU; install triton"
    return f"works on the CPU and on CUDA, not on {device.type}; load the model there"


class Region:
    """The forward of one module, compiled by itself while it is `on`; hooks on the module stay outside.

    Attributes:
        on: whether calls run compiled; as they are otherwise.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        forward = module.forward
        update_wrapper(self, forward)
        self.forward, self.on = forward, True
        self._compiled: Any = torch.compile(_under_own_name(forward, name), backend=BACKEND)
        self._restore = replace_forward(module, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs) if self.on else self.forward(*args, **kwargs)

    def remove(self) -> None:
        """Put back the forward that was there; where others have wrapped this one, it runs as it is."""
        self.on, self._compiled = False, None
        self._restore()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._compiled is not None:
            refuse_to_copy()
        return super().__reduce_ex__(protocol)


def _under_own_name(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function as a piece of code of its own.

    torch keeps what it has compiled by piece of code, a few versions of each. All layers share the code of
    their class, and differ in width and index: from the ninth on, they would run uncompiled. By name torch
    remembers which sizes have changed, to leave them open: widths are not to be among these, whatever was
    attached before.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    name = f"{name}_{uuid.uuid4().hex}"
    code = call.__code__.replace(co_name=name)
    return FunctionType(code, call.__globals__, name, None, call.__closure__)


class CompiledLayers:
    """The compiled regions of a model.

    A layer is one region where nothing runs in Python inside it. Else its blocks are regions: in a layer with
    blocks that follow the batch, while followers are shown a pass; in one with experts or another mixer of
    tokens, always.

    Args:
        model: the model.
        blocks: its blocks.
        followed: those of them that follow the batch.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Prunable], followed: Sequence[Block]) -> None:
        self._seen: list[Region] = []
        self._unseen: list[Region] = []
        self._always: list[Region] = []
        for i, layer in enumerate(find_layers(model)):
            here = [b for b in blocks if b.layer == i]
            follows = any(b in followed for b in here)
            whole = all(b.kind in ("attention", "mlp") for b in here)
            if whole:
                (self._unseen if follows else self._always).append(Region(layer, f"layer_{i}"))
            if follows or not whole:
                parts = [Region(b.entry, f"{b.kind}_{i}") for b in here if compiles_alone(b)]
                (self._seen if whole else self._always).extend(parts)

    def switch(self, shown: bool) -> None:
        """Say whether the next pass is shown to followers."""
        for region in self._seen:
            region.on = shown
        for region in self._unseen:
            region.on = not shown

    def guarded(self, forward: Callable[[], Any]) -> Callable[[], Any]:
        """The same pass, in which hooks that others put on modules inside a region are noticed: torch would
        run what it compiled without them."""

        def run() -> Any:
            with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
                return forward()

        return run

    def remove(self) -> None:
        """Put all forwards back."""
        for region in (*self._unseen, *self._always, *self._seen):
            region.remove()


def compiles_alone(block: Prunable) -> bool:
    """Whether a block is a module of its own that can be compiled: an attention, or an MLP that is not
    written out in its layer."""
    return isinstance(block, Block) and block.kind in ("attention", "mlp") and block.activation is None
