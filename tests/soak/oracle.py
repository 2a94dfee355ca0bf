"""What an attached method must compute, from a dense twin and the units that the handle reports.

The twin is a model that was never attached. Its consumers are replaced by the formulas written out in
`all_methods.py`; the hooks that do so stand in front of the users', which see the result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from all_methods import BY_HAND, CutBlock
from torch import nn

from probeprune.model.blocks import find_blocks
from probeprune.runtime.handle import Handle


class Oracle:
    """A twin under the cut that `handle` reports at present.

    Args:
        handle: an attached method.
        twin: the dense model.
        mask: (batch, sequence), 1 for the real tokens of the prompt.
        whole: whether MLPs that follow batches run whole, as in a refresh.
    """

    def __init__(self, handle: Handle, twin: nn.Module, mask: torch.Tensor, whole: bool = False) -> None:
        self.kind = handle.method.compensation.kind
        blocks = {b.name: b for b in find_blocks(twin, handle.method.unit_kind)}
        following = {r.block.name for r in handle.runtimes}
        units = {k.name: k.units for k in handle.kept_units()}
        self.cuts = []
        for pruned in handle.pruned:
            block = blocks[pruned.block.name]
            if whole and block.kind == "mlp" and block.name in following:
                continue
            kept = torch.zeros(block.units, dtype=torch.bool)
            kept[list(units[block.name])] = True
            kept = kept.repeat_interleave(block.unit_width)
            when = handle.method.when if block.name in following else None
            channels, lost = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
            cut = CutBlock(block, channels, lost, pruned.moments, pruned.consumer, when, mask)
            self.cuts.append(cut)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        hooks = []
        for cut in self.cuts:

            def replaced(_: nn.Module, args: tuple, output: torch.Tensor, cut: CutBlock = cut):
                return self._output(cut, args[0].flatten(0, -2)).view(output.shape)

            hooks.append(cut.block.consumer.register_forward_hook(replaced, prepend=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _output(self, cut: CutBlock, z: torch.Tensor) -> torch.Tensor:
        formula = BY_HAND[self.kind]
        if self.kind != "bias":
            if cut.when is not None and cut.fitted is None:
                with torch.no_grad():  # a refit to the batch is made once, and no gradient leads through it
                    formula(cut, z)
            return formula(cut, z)
        assert cut.moments is not None
        own = BY_HAND["none"](cut, z)
        lost = cut.block.consumer.weight.detach()[:, cut.lost].float() @ cut.moments.mean[cut.lost]
        return own + lost.to(own.dtype)


def permuted(handle: Handle, twin: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of the twin by name, with the units of attached blocks in their present order."""
    found = {name: p.detach() for name, p in twin.named_parameters()}
    orders = {p.block.name: p.partition.order for p in handle.pruned}
    for block in find_blocks(twin, handle.method.unit_kind):
        if block.name not in orders:
            continue
        order, done = orders[block.name], set()
        for member in block.members:
            entries = (order[:, None] * member.width + torch.arange(member.width)).flatten()
            for name, axis in (("weight", member.axis), ("bias", 0)):
                key = f"{member.name}.{name}"
                if key not in found or (name == "bias" and member.axis == 1):
                    continue
                if key not in done:
                    found[key] = found[key].clone()
                    done.add(key)
                part = replace(member, axis=axis).part(found[key], block.units)
                part.copy_(part.index_select(axis, entries))
    return found
