"""probeprune: structured pruning of causal language models, dynamic and static, measured alike."""

from probeprune.calibration.collecting import calibrate
from probeprune.calibration.gradients import Gradients, saliences
from probeprune.calibration.statistics import Statistics
from probeprune.errors import UsageError
from probeprune.methods import METHODS, Method, compose, with_equal_widths
from probeprune.model.blocks import find_blocks
from probeprune.model.checkpoint import save
from probeprune.model.loading import load_model
from probeprune.runtime.handle import Handle, attach
from probeprune.strategies.compensation import Refit
from probeprune.strategies.probe import Probe
from probeprune.surgery import Pruning, prune

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Gradients",
    "Handle",
    "Method",
    "Probe",
    "Pruning",
    "Refit",
    "Statistics",
    "UsageError",
    "attach",
    "calibrate",
    "compose",
    "find_blocks",
    "load_model",
    "prune",
    "saliences",
    "save",
    "with_equal_widths",
]
