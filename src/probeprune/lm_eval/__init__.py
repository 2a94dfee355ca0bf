"""The package as a model type of the LM evaluation harness: `--model probeprune`.

The harness has no entry points for model types, so importing this package is what registers it. Its own
command line with the type in place is `python -m probeprune.lm_eval`:

    python -m probeprune.lm_eval --model probeprune --tasks piqa --batch_size 16 \
        --model_args pretrained=smollm2-135m,method=probe,ratio=0.4,calibration=c4

Where the extra `eval` is not installed there is nothing to register with: `PrunedLM` then raises
`MissingExtra`, and the command line ends with that sentence. Python imports a package before it runs its
`__main__`, so the import itself must not fail.
"""

from typing import Any

from probeprune.foreign.extras import missing, need

__all__ = ["PrunedLM"]

if not missing("eval"):
    from probeprune.lm_eval.model_type import PrunedLM


def __getattr__(name: str) -> Any:
    """Raise `MissingExtra` for `PrunedLM` where the harness is not installed."""
    if name == "PrunedLM":
        need("eval")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
