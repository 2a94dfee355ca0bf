"""What an export will write, decided from a model's shape alone, so that it is refused before any work.

Neither reads nor writes numbers: a model on device `meta` will do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGMLQuantizationType

from probeprune.engines.gguf_types import Storage, block_length, storage, stored_bytes
from probeprune.errors import UsageError
from probeprune.model import gguf_rope
from probeprune.model.blocks import Block, find_blocks
from probeprune.model.families import find_family
from probeprune.model.family_records import Family
from probeprune.model.gguf_architectures import ARCHITECTURES, Architecture
from probeprune.model.gguf_config import Value, keys, rotated, unfit, window
from probeprune.model.gguf_tensors import Heads, Place, places
from probeprune.model.multimodal import multimodal_of
from probeprune.model.wrappers import unwrapped


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    name: str
    place: Place
    """Where its numbers come from."""
    kind: str
    """`weight` or `bias`."""
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    heads: Heads
    """Of its layer; of the first outside of the layers."""

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        numbers = 1
        for size in self.shape:
            numbers *= size
        return stored_bytes(self.type, numbers)


@dataclass(frozen=True)
class Plan:
    """A GGUF file, but for its numbers and the tokenizer."""

    architecture: Architecture
    storage: Storage
    keys: dict[str, Value]
    """The architecture's keys, without its name."""
    entries: tuple[Entry, ...]
    rotated: int
    """How much of each head RoPE turns."""
    vocabulary: int
    """Rows of the embeddings: the number of tokens that the file must list."""
    shorter_context: int | None
    """The context length of the file where it is less than the model's, for want of a sliding window."""

    @property
    def bytes(self) -> int:
        """The size of all tensors in the file."""
        return sum(entry.bytes for entry in self.entries)


def plan(model: Any, type: str) -> Plan:
    """How a model goes into a GGUF file.

    Args:
        model: a causal LM of a supported family, pruned or not; only its shape matters.
        type: the type of the file, such as `f16`.

    Raises:
        UsageError: an unknown type, a model that no architecture carries, a row that the type's blocks do not
            divide.
    """
    model, chosen = unwrapped(model), storage(type)
    if multimodal_of(model.config.model_type) is not None:
        raise UsageError(
            f"a GGUF file holds a language model alone, and {model.__class__.__name__} reads images too; "
            "keep the checkpoint, which transformers opens."
        )
    blocks = find_blocks(model)
    family = find_family(model)
    architecture = _carrier(model, family, blocks)
    config = model.config
    attention = [b for b in blocks if b.kind == "attention"]
    heads = [Heads(b.query_heads, b.kv_heads, b.head_dim) for b in attention]
    entries = []
    for place in places(architecture, family.layers, len(heads)):
        if place.name == "output" and config.tie_word_embeddings:
            continue
        entries += _entries(model, place, heads[place.layer or 0], chosen)
    made = keys(architecture, config, blocks)
    _check_rows(entries, type)
    back = window(config)
    shorter = back if architecture.window is None and back and back < config.max_position_embeddings else None
    return Plan(
        architecture,
        chosen,
        made,
        tuple(entries),
        rotated(config, heads[0].size),
        int(model.get_input_embeddings().weight.shape[0]),
        shorter,
    )


def _carrier(model: Any, family: Family, blocks: Sequence[Block]) -> Architecture:
    """The first architecture that carries a model. Raises `UsageError` if there is none."""
    candidates = [a for a in ARCHITECTURES if set(family.model_types) & set(a.model_types)]
    if not candidates:
        raise UsageError(
            f"the export to GGUF has no architecture for {family.name}, so no file can hold this model; keep "
            "the checkpoint, which transformers opens."
        )
    reasons = []
    for candidate in candidates:
        reason = unfit(candidate, model.config, blocks) or _unfit_biases(candidate, model, family, blocks)
        if reason is None:
            return candidate
        reasons.append(f"of '{candidate.name}', {reason}")
    raise UsageError(
        f"no GGUF architecture holds this {type(model).__name__} ({'; '.join(reasons)}); "
        f"{_advice(candidates, blocks)}."
    )


def _unfit_biases(
    architecture: Architecture, model: Any, family: Family, blocks: Sequence[Block]
) -> str | None:
    """The bias that an architecture cannot hold, as a reason; None if there is none."""
    for place in places(architecture, family.layers, len(blocks) // 2):
        for path in place.part.modules:
            if place.part.bias == "no" and getattr(model.get_submodule(path), "bias", None) is not None:
                return f"{path.rpartition('.')[2]} has no bias"
    return None


def _advice(candidates: Sequence[Architecture], blocks: Sequence[Block]) -> str:
    """What to do so that the model fits."""
    attention = [b for b in blocks if b.kind == "attention"]
    several = len({(b.query_heads, b.kv_heads) for b in attention}) > 1
    several |= len({b.units for b in blocks if b.kind == "mlp"}) > 1
    advice = "prune with one width for all layers (layout uniform)" if several else "prune it"
    if all(a.full_heads for a in candidates):
        return f"{advice}, MLPs alone (blocks mlp) and without compensation".replace("prune it, ", "prune ")
    if several:
        return f"{advice} and without compensation"
    return "keep the checkpoint, which transformers opens, or prune without compensation"


def _entries(model: Any, place: Place, heads: Heads, chosen: Storage) -> list[Entry]:
    """The weight at a place, and the bias that the file has beside it."""
    modules = [model.get_submodule(path) for path in place.part.modules]
    rows = sum(int(module.weight.shape[0]) for module in modules)
    shape = (rows, *map(int, modules[0].weight.shape[1:]))
    tied = bool(model.config.tie_word_embeddings)
    is_head = place.name == ("token_embd" if tied else "output")
    kind = chosen.head if is_head else chosen.matrices
    if len(shape) == 1:
        kind = GGMLQuantizationType.F32
    found = [Entry(f"{place.name}.weight", place, "weight", shape, kind, heads)]
    if place.part.bias == "always" or any(getattr(m, "bias", None) is not None for m in modules):
        found.append(Entry(f"{place.name}.bias", place, "bias", shape[:1], GGMLQuantizationType.F32, heads))
    return found


def _check_rows(entries: Sequence[Entry], type: str) -> None:
    """Raise `UsageError` for the first row that the type's blocks do not divide."""
    for entry in entries:
        length, row = block_length(entry.type), entry.shape[-1]
        if row % length:
            mlp = entry.name.endswith("ffn_down.weight")
            advice = (
                f"prune with --round-to {length} (and no allocation global)"
                if mlp
                else "keep other numbers of heads"
            )
            raise UsageError(
                f"type {type} stores {length} numbers of a row together, and the rows of {entry.name} have "
                f"{row}; {advice}, or choose type f16 or bf16."
            )


def factor_tensors(made: Plan, config: Any) -> dict[str, Any]:
    """The tensors of RoPE factors that the file needs, by name."""
    tensors = gguf_rope.tensors(config.rope_parameters, made.rotated)
    return {f"{name}.weight": tensor for name, tensor in tensors.items()}
