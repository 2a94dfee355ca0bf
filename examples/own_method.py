"""Two methods of your own: one composed of strategies that are there, one with a new importance."""

import torch

import probeprune
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows
from probeprune.strategies.importance import IMPORTANCES, Evidence, Importance


def deviation(evidence: Evidence) -> torch.Tensor:
    """`sqrt(Var(z_j)) sum_i |W_ij|`, summed over the channels of a unit."""
    assert evidence.variance is not None
    channels = evidence.variance.sqrt() * evidence.norms.absolute
    return channels.view(evidence.block.units, evidence.block.unit_width).sum(1)


IMPORTANCES["deviation"] = Importance(deviation, "sqrt(Var(z_j)) sum_i |W_ij|", needs=frozenset({"moments"}))

loaded = probeprune.load_model("smollm2-135m")
windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=16, length=256, seed=0)
for method in (
    probeprune.compose("wanda-sp", name="wanda-sp with a bias", compensation="bias"),
    probeprune.compose("wanda-sp", name="by deviation", importance="deviation"),
):
    with probeprune.attach(loaded.model, method, ratio=0.2, calibration=windows) as handle:
        loss = loaded.model(windows[:4], labels=windows[:4]).loss
        print(f"{method.name:<22} {handle.removed_share:.1%} removed, {loss:.3f} nats a token")
