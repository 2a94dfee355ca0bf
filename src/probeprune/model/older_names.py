"""What a checkpoint says again under the names that transformers 4 wrote, for tools that still read those.

transformers 5 keeps all of RoPE in `rope_parameters` and calls a tokenizer without a class of its own
`TokenizersBackend`. Tools that know neither do not complain of the first: they compute with the family's
default base, and the model speaks nonsense. transformers 5 reads the older names as well and takes both.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probeprune.model import gguf_rope

_OWN = ("rope_theta", "partial_rotary_factor")
"""Of `rope_parameters`, what used to be fields of the config and no part of `rope_scaling`."""

_PHI3_SCALING = {"rope_type", "short_factor", "long_factor"}
"""All that `rope_scaling` could hold in Phi-3, where the original length is a field of the config."""


def rope_fields(config: Any) -> dict[str, Any]:
    """The fields of RoPE as transformers 4 named them; none for a model without RoPE.

    Args:
        config: a plain config of transformers 5.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return {}
    full, sliding = gguf_rope.parts(parameters)
    if full.get("rope_type") == "proportional":  # no release before 5 has it
        return {}
    share = full.get("partial_rotary_factor")
    if config.model_type == "gpt_neox":
        found = {"rotary_emb_base": full["rope_theta"], "rotary_pct": share}
    else:
        found = {"rope_theta": full["rope_theta"], "partial_rotary_factor": share}
    if sliding is not None:
        found["rope_local_base_freq"] = sliding["rope_theta"]
    return {k: v for k, v in found.items() if v is not None} | _scaling(config.model_type, full)


def _scaling(model_type: str, full: Mapping[str, Any]) -> dict[str, Any]:
    """The field `rope_scaling`, if there is a scaling.

    transformers 5 prefers it to `rope_parameters`, so it is left out where it could not say the same.
    """
    kind = full.get("rope_type", "default")
    if kind == "default":
        return {}
    scaling = {k: v for k, v in full.items() if k not in _OWN}
    if model_type == "phi3":
        for name in ("type", "original_max_position_embeddings"):
            scaling.pop(name, None)
        if scaling.keys() != _PHI3_SCALING:
            return {}
        del scaling["rope_type"]
        return {"rope_scaling": {"type": kind, **scaling}}
    return {"rope_scaling": scaling}


def add_rope_fields(folder: Path, config: Any) -> None:
    """Write the older names of RoPE's fields into the `config.json` of a folder."""
    _change(folder / "config.json", rope_fields(config))


def rename_tokenizer(folder: Path) -> None:
    """Write the older name of a tokenizer's class, if it has none of its own; transformers 5 knows both."""
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return
    if json.loads(file.read_text("utf-8")).get("tokenizer_class") == "TokenizersBackend":
        _change(file, {"tokenizer_class": "PreTrainedTokenizerFast"})


def _change(file: Path, fields: Mapping[str, Any]) -> None:
    """Put fields into a file of JSON, sorted as transformers sorts them."""
    content = {**json.loads(file.read_text("utf-8")), **fields}
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
