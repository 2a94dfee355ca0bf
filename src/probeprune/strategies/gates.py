"""Gates: how scales of units are learned while all weights stay frozen (`calibration/gates.py`)."""

from dataclasses import dataclass

from probeprune.errors import BadValue, UsageError, unknown
from probeprune.ranges import check_fields
from probeprune.strategies.importance import IMPORTANCES


@dataclass(frozen=True)
class Gates:
    """How gates are trained.

    Raises `UsageError` for a number out of range, and for a start without scores.
    """

    steps: int = 100
    """Steps of Adam. The budget is reached after the first 60 % of them, by a cubic schedule."""
    batch_size: int = 4
    """Windows per step."""
    length: int = 256
    """Tokens per window: calibration windows are cut into pieces of this length, which are read in a random
    order, again and again."""
    learning_rate: float = 0.1
    """Of Adam. Gates start as logits, a few units wide, so the rate is high."""
    start: str = "wanda-sp"
    """A key of `IMPORTANCES`: its ranks within every block are the gates' start."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.start not in IMPORTANCES:
            raise BadValue("start", unknown("importance", self.start, IMPORTANCES))
        importance = IMPORTANCES[self.start]
        if importance.learned or importance.ordered_by_refit:
            known = [n for n, i in IMPORTANCES.items() if not (i.learned or i.ordered_by_refit)]
            raise UsageError(
                f"gates start from scores, and importance {self.start!r} has none before they are trained; "
                f"choose start from {', '.join(known)}."
            )
