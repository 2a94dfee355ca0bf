"""probeprune: structured pruning of causal language models, dynamic and static, compared on one engine."""

from probeprune.data.windows import WindowSource
from probeprune.engines.gguf_write import export_gguf
from probeprune.errors import UsageError
from probeprune.jobs.attached import load_model, save
from probeprune.jobs.share import push
from probeprune.methods import METHODS, Method, compose, with_equal_heads, with_equal_widths, with_pays
from probeprune.model.blocks import find_blocks
from probeprune.prepare import Prepared, load_prepared, prepare
from probeprune.runtime.attaching import attach, detach
from probeprune.runtime.handle import Handle
from probeprune.strategies.account import Costs
from probeprune.strategies.compensation import Bias, Compensation, Refit
from probeprune.strategies.criteria import Gradients
from probeprune.strategies.gates import Gates
from probeprune.strategies.probe import Probe
from probeprune.strategies.probe_every_batch import ProbeEveryBatch
from probeprune.strategies.refit_every_batch import RefitEveryBatch
from probeprune.strategies.schedule import Distilled, DuringTraining, Never, Once
from probeprune.surgery import Pruning, prune

__version__ = "0.2.0"

__all__ = [
    "METHODS",
    "Bias",
    "Compensation",
    "Costs",
    "Distilled",
    "DuringTraining",
    "Gates",
    "Gradients",
    "Handle",
    "Method",
    "Never",
    "Once",
    "Prepared",
    "Probe",
    "ProbeEveryBatch",
    "Pruning",
    "Refit",
    "RefitEveryBatch",
    "UsageError",
    "WindowSource",
    "attach",
    "compose",
    "detach",
    "export_gguf",
    "find_blocks",
    "load_model",
    "load_prepared",
    "prepare",
    "prune",
    "push",
    "save",
    "with_equal_heads",
    "with_equal_widths",
    "with_pays",
]
