"""Text from a model that Probe Pruning has made 20 % smaller, beside the dense model's."""

import probeprune
from probeprune.data.corpora import load_corpus
from probeprune.data.windows import calibration_windows

loaded = probeprune.load_model("smollm2-135m")
model, tokenizer = loaded.model, loaded.tokenizer
windows = calibration_windows(load_corpus("c4"), tokenizer, count=16, length=256, seed=0)
inputs = tokenizer("The three primary colours are", return_tensors="pt").to(model.device)


def written() -> str:
    """What the model goes on with, as it is at the moment."""
    return str(tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]))


print("dense: ", written())
with probeprune.attach(model, "probe", ratio=0.2, calibration=windows) as handle:
    print(f"pruned ({handle.removed_share:.0%} of all blocks):", written())
print("again: ", written())  # the same text as before: every bit is restored
