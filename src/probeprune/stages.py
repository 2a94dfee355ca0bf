"""The stages of a dynamic method: the work it does besides the pruned model's own arithmetic.

One record a stage. The runtime labels its work with these names, the profiler measures by them, result lines
keep them, and tables, charts and the report's style sheet take words and colours from here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One part of a forward pass.

    Attributes:
        name: the label in a profile (`probeprune::NAME`), the key in result lines and the CSS class.
        label: a few words for readers.
        light, dark: the colour on a white and on a black background, as `#rrggbb`.
    """

    name: str
    label: str
    light: str
    dark: str


PROBE = Stage("run_ahead", "probe runs ahead", "#0072B2", "#4BA6E0")
"""The only stage whose FLOPs are counted as the probe's."""

OVERHEAD: tuple[Stage, ...] = (
    Stage("choose", "choosing the probe", "#00875F", "#1FB889"),
    Stage("score", "scoring units", "#D55E00", "#E8792B"),
    Stage("swap", "swapping weights", "#C0539A", "#E87FC0"),
    Stage("refit", "refitting consumers", "#998000", "#E6B800"),
    Stage("history", "updating history", "#1c1d1f", "#e9e7e2"),
)
"""Stages that are arithmetic of neither the probe nor the pruned blocks."""

STAGES: tuple[Stage, ...] = (PROBE, *OVERHEAD)

MODEL = Stage("rest", "the model itself", "#c9c5ba", "#4a4f57")
"""The remainder of a pass in charts: the pruned blocks, norms and residuals."""
