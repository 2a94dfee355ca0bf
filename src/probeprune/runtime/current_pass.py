"""The current forward pass, shared by all blocks of an attached model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from probeprune.algebra.moments import Tokens
from probeprune.model.blocks import Block
from probeprune.strategies.schedule import Stage

NO_TOKENS = Tokens(0, 0)


@dataclass
class CurrentPass:
    """State of one forward pass that all blocks of a model share."""

    stage: Stage | None = None
    """See `Stage`; None between passes."""
    tokens: Tokens = NO_TOKENS
    ahead: str = ""
    """Name of the block whose probe ran in parallel with the previous block, until its turn comes."""
    layer_types: Sequence[str] = ()
    """Type of every layer, for a model with several types (sliding attention, for example)."""
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments of attention in this pass besides hidden states, by layer type, for the types seen so far."""

    def layer_type(self, block: Block) -> str:
        """The type of the block's layer."""
        return self.layer_types[block.layer] if self.layer_types else ""

    def end(self) -> None:
        """Reset after the pass."""
        self.stage, self.ahead, self.attention = None, "", {}
