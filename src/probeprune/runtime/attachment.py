"""Everything that attaching a method to a model takes, as a record that can be kept and attached again.

Calibration, scores and the choice of widths lie behind it. Knows nothing of files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from probeprune.calibration.statistics import Statistics
from probeprune.methods import Method
from probeprune.strategies.account import Costs
from probeprune.strategies.pruned_block import Cut


@dataclass(frozen=True, eq=False)
class Attachment:
    """A method at one ratio, with all that it knows of one model.

    Attributes:
        method, ratio: as in `attach`.
        cuts: the first cut of every block of the model, in order, including blocks that keep all units.
        statistics: as the method began with them: what batches have taught it since is not in here.
        costs: what batches cost, where it was given to `attach`; None to measure it on the machine that runs
            the method, where the method needs it.
        text: the calibration text as `Prepared.text` has it; empty where there was none, or it is not known.
    """

    method: Method
    ratio: float
    cuts: Sequence[Cut]
    statistics: Statistics = field(repr=False)
    text: Mapping[str, Any] = field(default_factory=dict)
    costs: Costs | None = None
