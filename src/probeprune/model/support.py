"""What can be done with each model family, read from the records: nothing here is known of a family by name.

The records are those of `families.py` and `gguf_architectures.py`. Knows no model.
"""

from dataclasses import dataclass, replace

from transformers import CONFIG_MAPPING

from probeprune.model.experts import EXPERT_UNITS
from probeprune.model.families import FAMILIES, family_of
from probeprune.model.family_records import Family
from probeprune.model.gguf_architectures import ARCHITECTURES
from probeprune.model.multimodal import MULTIMODAL, Multimodal
from probeprune.model.nemotron_nas import COMPUTE_LIKE_LLAMA


@dataclass(frozen=True)
class Support:
    """What can be done with one family."""

    family: str
    """Its name for readers."""
    model_types: tuple[str, ...]
    """`model_type` of its configs."""
    heads: tuple[str, ...]
    """Kinds of attention units that can go (`blocks.UnitKind`); empty where heads stay."""
    heads_stay_if: str | None
    """Config flag under which heads stay after all; None for a family without one."""
    why: str | None
    """Why heads stay, or would under that flag, in words that follow a model's name."""
    groups_stay_if: str | None
    """Config field under which layers share keys and values, and groups of heads stay in these; query
    heads can go. None for a family without one."""
    mlp: bool
    """Whether MLP channels can go: those of dense layers, and of the MLP beside experts."""
    experts: tuple[str, ...]
    """Kinds of units of experts that can go (`experts.ExpertUnit`); empty for a dense family."""
    dynamic: tuple[str, ...]
    """Kinds of blocks whose units a batch can choose."""
    uniform: tuple[str, ...]
    """Kinds of blocks that a plain config can describe when they are smaller (layout `uniform`)."""
    nemotron_nas: bool
    """Whether layout `nemotron-nas` can hold its models, where they have no sliding window."""
    gguf: tuple[str, ...]
    """Architectures of GGUF files that carry its models, with one width for all layers."""
    gguf_per_layer: tuple[str, ...]
    """Those that carry layers of different widths."""
    text_types: tuple[str, ...] = ()
    """`model_type` of the language models inside a multimodal class; empty for models of text alone."""


def support(family: Family) -> Support:
    """What can be done with the models of one family."""
    attention = family.attention
    stay = attention.whole is not None and attention.whole_if is None
    carried = [a for a in ARCHITECTURES if set(a.model_types) & set(family.model_types)]
    experts = family.experts
    mlps = experts is None or experts.shared is not None or not experts.everywhere
    plain = [] if stay or not attention.plain_heads else ["attention"]
    plain += ["mlp"] if mlps and family.mlp.width_field is not None else []
    plain += [] if experts is None else ["experts"]
    kinds = (["attention"] if not stay else []) + (["mlp"] if mlps else [])
    return Support(
        family=family.name,
        model_types=family.model_types,
        heads=() if stay else _units(family),
        heads_stay_if=attention.whole_if,
        why=attention.whole,
        groups_stay_if=None if attention.shared_kv is None else attention.shared_kv.layers,
        mlp=mlps,
        experts=() if experts is None else EXPERT_UNITS,
        dynamic=tuple(kinds),
        uniform=tuple(plain),
        nemotron_nas=bool(set(family.model_types) & set(COMPUTE_LIKE_LLAMA)),
        gguf=tuple(a.name for a in carried),
        gguf_per_layer=tuple(a.name for a in carried if a.per_layer),
    )


def all_support() -> list[Support]:
    """What can be done with each family and each multimodal class, in the order of the records."""
    return [*map(support, FAMILIES), *map(inside, MULTIMODAL)]


def inside(multimodal: Multimodal) -> Support:
    """What can be done with a multimodal class: what all language models that it may hold allow."""
    known = [family for family in map(family_of, multimodal.text_types) if family is not None]
    each = [support(family) for family in known]
    return replace(
        each[0],
        family=multimodal.name,
        model_types=multimodal.model_types,
        uniform=tuple(kind for kind in each[0].uniform if all(kind in own.uniform for own in each)),
        nemotron_nas=False,
        gguf=(),
        gguf_per_layer=(),
        text_types=multimodal.text_types,
    )


def _units(family: Family) -> tuple[str, ...]:
    """Kinds of attention units of a family whose heads can go.

    Of a single key-value head, query heads go; of several in one map that makes them by group, whole groups;
    where a config can have fewer key-value heads in a map of their own, query heads of each group too.
    """
    if family.attention.multi_query is not None:
        return ("group", "query")
    if family.attention.latents:  # every query head has a key and a value of its own
        return ("group",)
    fields = [vars(CONFIG_MAPPING[t]).get("__dataclass_fields__", {}) for t in family.model_types]
    grouped = any("num_key_value_heads" in f for f in fields)
    return ("group", "balanced") if grouped else ("group",)
