"""The pass of the model that is under way, as all blocks of an attached model share it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from probeprune.algebra.moments import Tokens
from probeprune.model.blocks import Block
from probeprune.strategies.schedule import Stage

NO_TOKENS = Tokens(0, 0)


@dataclass
class CurrentPass:
    """What all blocks of a model share of one forward pass."""

    stage: Stage | None = None
    """See `Stage`; None between passes."""
    tokens: Tokens = NO_TOKENS
    ahead: str = ""
    """Name of the block whose probe ran beside the block before it, until its turn comes."""
    layer_types: Sequence[str] = ()
    """Type of every layer, where a model has several types (windowed attention, for example)."""
    attention: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments that this pass gives to attention besides hidden states, by type of layer, as far as seen."""

    def layer_type(self, block: Block) -> str:
        """The type of the block's layer."""
        return self.layer_types[block.layer] if self.layer_types else ""

    def end(self) -> None:
        """Forget the pass."""
        self.stage, self.ahead, self.attention = None, "", {}
