"""What a family's record says of one decoder layer: which blocks it has, and where. Knows no blocks."""

from typing import Any

from torch import nn

from probeprune.model.family_records import AttentionRecord, Family, MixerRecord, MlpRecord


def attribute(module: Any, path: str) -> Any:
    """What a module has at a dotted path, such as `config.num_attention_heads`; None if there is none."""
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def first_of(module: nn.Module, paths: str | tuple[str, ...]) -> str:
    """The path, of several the first where the module has something, else the first."""
    names = (paths,) if isinstance(paths, str) else paths
    return next((n for n in names if attribute(module, n) is not None), names[0])


def has_block(layer: nn.Module, family: Family, record: AttentionRecord | MlpRecord | MixerRecord) -> bool:
    """Whether a layer has a block; layers of families that are no hybrids have all blocks."""
    if record.only_in is not None:
        return bool(attribute(layer, "block_type") == record.only_in)
    path = record.output if isinstance(record, MixerRecord) and record.module is None else record.module
    return not family.mixers or path is None or attribute(layer, path) is not None


def whole_heads(record: AttentionRecord, config: Any) -> str | None:
    """Why no head of a model with this config can go; None where heads can go."""
    return record.whole if record.whole_if is None or getattr(config, record.whole_if) else None


def shares_kv(record: AttentionRecord, module: nn.Module) -> bool:
    """Whether an attention module reads keys and values of another layer, or others read its own."""
    shared = record.shared_kv
    return shared is not None and any(attribute(module, flag) for flag in (shared.stores, shared.reads))


def times_wider(record: MlpRecord, layer: nn.Module, config: Any) -> int:
    """How many times the width that the config has for all MLPs that of this layer is."""
    twice = record.twice_if
    return 2 if twice is not None and getattr(config, twice[0]) and attribute(layer, twice[1]) else 1


def mlp_record(family: Family, layer: nn.Module, config: Any) -> tuple[MlpRecord | None, int]:
    """Where a layer has its MLP, None for one that has experts alone, and `Block.follows`."""
    experts = family.experts
    if experts is None:
        return family.mlp, 0
    if attribute(layer, experts.module) is None:
        return family.mlp, int(experts.width_field == family.mlp.width_field)
    shared, times = experts.shared, experts.shared_times
    if shared is None or attribute(layer, str(shared.module)) is None:
        return None, 0
    return shared, int(getattr(config, times)) if isinstance(times, str) else times


def norm_at(layer: nn.Module, paths: str | tuple[str, ...] | None) -> nn.Module | None:
    """The norm at a path; of several paths, the first where the layer has one; None for no path."""
    return None if paths is None else layer.get_submodule(first_of(layer, paths))
