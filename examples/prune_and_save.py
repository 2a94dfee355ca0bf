"""A smaller checkpoint, which plain transformers opens without probeprune."""

import sys

from transformers import AutoModelForCausalLM

import probeprune
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows

out = sys.argv[1] if len(sys.argv) > 1 else "pruned"
loaded = probeprune.load_model("smollm2-135m")
windows = calibration_windows(load_corpus("c4"), loaded.tokenizer, count=16, length=256, seed=0)

method = probeprune.with_equal_widths("wanda-sp")  # one width for all layers, as a plain config has it
pruning = probeprune.prune(loaded.model, method, ratio=0.2, calibration=windows)
probeprune.save(loaded.model, out, tokenizer=loaded.tokenizer, layout="uniform")

reopened = AutoModelForCausalLM.from_pretrained(out)
print(f"{pruning.removed_share:.1%} of the blocks' parameters removed")
print(f"{sum(p.numel() for p in reopened.parameters()):,} parameters in {out}")
