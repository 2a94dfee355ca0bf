"""One block that follows the batch while its model runs: when it is probed, and the inputs of its follower.

A batch is probed in front of the block; small batches reuse the previous choice. A pass that continues a
cache keeps the prompt's choice, and a refresh runs an MLP dense as its own probe. The handle decides which of
these a pass is (`handle.py`); the follower decides how to use a probe (`strategies/`). Nothing here waits for
the device: numbers stay on it, and sizes come from shapes.
"""

from typing import Any

import torch
from torch import nn
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from probeprune.model.blocks import Block
from probeprune.model.shadow import Shadow
from probeprune.runtime.current_pass import CurrentPass
from probeprune.runtime.side_stream import SideStream
from probeprune.strategies.probe import choose, run_ahead
from probeprune.strategies.pruned_block import PrunedBlock
from probeprune.strategies.schedule import EveryBatch, Follower


class BlockRuntime:
    """One block of a model with a dynamic method attached.

    Attributes:
        pruned: the block under its cut.
        follower: the method's state for it.
        when: how batches are probed.
        current: the current pass.
        beside: the previous block, if the probe runs in parallel with it.
        side_stream: the stream on which the probe then runs.
        passed: whether the current pass has gone through the consumer.
    """

    def __init__(
        self,
        pruned: PrunedBlock,
        follower: Follower,
        when: EveryBatch,
        current: CurrentPass,
        beside: Block | None,
    ) -> None:
        self.pruned, self.follower, self.when = pruned, follower, when
        self.current, self.beside = current, beside
        self.block = pruned.block
        self.side_stream = SideStream(pruned.partition.order.device)
        self._shadow = Shadow(pruned.block, pruned.partition)
        pruned.partition.narrow()  # a shadow sees all units, and shows them
        self.passed = False
        self._residual: torch.Tensor | None = None
        self._z: torch.Tensor | None = None
        # Heads never refresh: the cache holds those of the prompt.
        self._refreshes = when.refresh > 0 and self.block.kind == "mlp"

    def hooks(self, compiled: bool = False) -> list[RemovableHandle]:
        """Register hooks that run the stages in the passes of the model, and return them.

        Args:
            compiled: whether the block's entry is compiled: no stage runs inside it then.
        """
        block = self.block
        hooks = [block.entry.register_forward_pre_hook(self._before_block, with_kwargs=True)]
        if compiled:
            hooks.append(block.consumer.register_forward_hook(self._note))
            hooks.append(block.entry.register_forward_hook(self._after_block))
        else:
            hooks.append(block.consumer.register_forward_hook(self._after_consumer))
        if block.norm is not None:
            hooks.append(block.norm.register_forward_pre_hook(self._before_norm))
        if self.beside is not None:
            # After that block's own hooks, so that its turn begins before this one's probe.
            hooks.append(self.beside.entry.register_forward_pre_hook(self._before_beside, with_kwargs=True))
            if self.beside.norm is not None:
                hooks.append(self.beside.norm.register_forward_pre_hook(self._before_norm))
        return hooks

    def _before_norm(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self.current.stage == "choose":
            self._residual = args[0]

    @torch.no_grad()
    def _before_block(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> None:
        self._z = None
        if self.current.stage == "refresh" and self._refreshes:
            self.pruned.partition.widen()
        if self.current.stage != "choose":
            return
        x, residual, kwargs = self._read_call(args, kwargs)
        if self.block.kind == "attention":
            self.current.attention[self.current.layer_type(self.block)] = kwargs
        if self.current.ahead == self.block.name:
            self.side_stream.join()
        else:
            self._probe(residual, x, kwargs)

    @torch.no_grad()
    def _before_beside(
        self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> None:
        """Probe this block in parallel with the previous one, from that one's residual, if all arguments are
        known."""
        if self.current.stage != "choose":
            return
        assert self.beside is not None
        _, residual, given = self._read_call(args, kwargs)
        if self.beside.kind == "attention":
            self.current.attention[self.current.layer_type(self.beside)] = given
        is_mlp = self.block.kind == "mlp"
        arguments = {} if is_mlp else self.current.attention.get(self.current.layer_type(self.block))
        if arguments is None or residual.device != self.block.consumer.weight.device:
            return
        self.current.ahead = self.block.name
        with self.side_stream.run(residual):
            self._probe(residual, residual, arguments, self.block.norm)

    def _read_call(
        self, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """A block's normalised input, the residual in front of it, and its other arguments."""
        kwargs = dict(kwargs)
        x = self._shaped(args[0] if args else kwargs.pop("hidden_states"))
        residual = x if self._residual is None else self._shaped(self._residual)
        self._residual = None
        return x, residual, kwargs

    def _probe(
        self, residual: torch.Tensor, x: torch.Tensor, kwargs: dict[str, Any], norm: nn.Module | None = None
    ) -> None:
        """Choose a probe, run it ahead through the dense block, and hand the result to the follower."""
        tokens = self.current.tokens
        with record_function("probeprune::choose"):
            selection = choose(residual, tokens, self.when.probe)
        with record_function("probeprune::run_ahead"):
            z = run_ahead(self._shadow, x, selection, kwargs, norm, self.block.input_factor)
        self.follower.on_probe(z, selection, tokens)

    @torch.no_grad()
    def _after_consumer(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        if self.current.stage is None:
            return
        self.passed = True
        # A block that does not refresh treats a refresh like any other step.
        stage = "keep" if self.current.stage == "refresh" and not self._refreshes else self.current.stage
        self.follower.on_pass(self._shaped(args[0]), self.current.tokens, stage)

    def _note(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        self._z = args[0]  # torch.compile makes it an output of the compiled code

    def _after_block(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._z is not None:
            z, self._z = self._z, None
            self._after_consumer(module, (z,), output)

    def _shaped(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape to (batch, sequence, width); some layers flatten the first two before their MLP."""
        return x.view(self.current.tokens.batch, self.current.tokens.length, x.shape[-1])
