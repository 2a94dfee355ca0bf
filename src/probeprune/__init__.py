"""probeprune: structured pruning of causal language models, dynamic and static, measured alike."""

from probeprune.blocks import find_blocks
from probeprune.calibration import Statistics, calibrate
from probeprune.checkpoint import save
from probeprune.compensation import Refit
from probeprune.dynamic import Handle, attach
from probeprune.errors import UsageError
from probeprune.gradients import Gradients, saliences
from probeprune.methods import METHODS, Method, compose, evenly
from probeprune.models import load_model
from probeprune.probe import Probe
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
    "evenly",
    "find_blocks",
    "load_model",
    "prune",
    "saliences",
    "save",
]
