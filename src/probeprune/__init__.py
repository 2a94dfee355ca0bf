"""probeprune: structured pruning of causal language models, dynamic and static, measured alike."""

from probeprune.blocks import find_blocks
from probeprune.calibration import Statistics, calibrate
from probeprune.dynamic import Handle, attach
from probeprune.errors import UsageError
from probeprune.methods import METHODS, Method, compose
from probeprune.models import load_model
from probeprune.probe import Probe

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Handle",
    "Method",
    "Probe",
    "Statistics",
    "UsageError",
    "attach",
    "calibrate",
    "compose",
    "find_blocks",
    "load_model",
]
