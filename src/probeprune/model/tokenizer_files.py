"""Open the tokenizer of a checkpoint's folder."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from probeprune.errors import UsageError, refusing

PATTERNS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
"""Any tokenizer has a file with such a name."""


def open_tokenizer(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """The tokenizer beside the weights; `config` is the model's.

    Raises `UsageError` for a folder without one, and for one that cannot be opened.
    """
    if not any(any(folder.glob(pattern)) for pattern in PATTERNS):
        raise UsageError(
            f"'{folder}' has no tokenizer; write that of the dense model into it, with "
            "tokenizer.save_pretrained, or give save(..., tokenizer=...) when the model is saved."
        )
    with refusing(f"the tokenizer (tokenizer.json, tokenizer_config.json) of '{folder}' could not be loaded"):
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
