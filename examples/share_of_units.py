"""How many heads and channels each layer keeps, as bars of text."""

import probeprune
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows

loaded = probeprune.load_model("smollm2-135m")
windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=16, length=256, seed=0)
method = probeprune.compose("wanda-sp", name="wanda-sp, one threshold", allocation="global")
with probeprune.attach(loaded.model, method, ratio=0.2, calibration=windows) as handle:
    for kept in handle.kept_units():
        share = len(kept.units) / kept.of
        print(f"{kept.name:<24} {'#' * round(40 * share):<40} {share:.0%}")
