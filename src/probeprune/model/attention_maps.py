"""Where the heads of one attention module are: its linear maps, and the rows of them that each head owns.

Knows no blocks.
"""

from dataclasses import dataclass

from torch import nn

from probeprune.model.family_records import AttentionRecord
from probeprune.model.layer_records import attribute, first_of
from probeprune.model.linear_maps import LinearMap, sizes
from probeprune.model.permutable import permutable


@dataclass(frozen=True)
class Rows:
    """The rows of one linear map that heads own: head `h` has `width` consecutive ones from `start + h *
    width`."""

    path: str
    """Path of the map in the module."""
    linear: LinearMap
    width: int
    start: int = 0


@dataclass(frozen=True)
class AttentionMaps:
    """The linear maps of one attention module, and its heads."""

    query: Rows
    """By query head."""
    key_value: tuple[Rows, ...]
    """By key-value head; empty where a module has no maps of its own for them."""
    gate: Rows | None
    """By query head; None where the map of queries makes it too, or there is none."""
    output: LinearMap
    latents: tuple[LinearMap, ...]
    """Maps that all heads read."""
    query_heads: int
    kv_heads: int
    head_dim: int
    """Size of a head's queries and keys."""
    value_dim: int
    """Size of its values, and columns of the output map that a query head owns."""
    by_group: bool
    """Whether one map makes queries, keys and values group by group."""
    cached: int | None
    """Numbers that a token leaves in a KV cache where no head has a part in them, else None."""

    @property
    def group_size(self) -> int:
        """Query heads per key-value head."""
        return self.query_heads // self.kv_heads

    @property
    def producers(self) -> tuple[LinearMap, ...]:
        """All maps in front of the heads' outputs, each once."""
        made = (rows.linear for rows in (self.query, *self.key_value, self.gate) if rows is not None)
        return tuple(dict.fromkeys((*self.latents, *made)))

    def rows(self, group: bool) -> tuple[Rows, ...]:
        """The rows that go with a unit: a key-value head with its query heads (`group`), or a query head."""
        by_query = [rows for rows in (self.query, self.gate) if rows is not None]
        if not group:
            return tuple(by_query)
        if self.by_group:
            return (Rows(self.query.path, self.query.linear, (self.group_size + 2) * self.head_dim),)
        grouped = (Rows(rows.path, rows.linear, self.group_size * rows.width) for rows in by_query)
        return (*grouped, *self.key_value)


def attention_maps(module: nn.Module, record: AttentionRecord, name: str) -> AttentionMaps:
    """The maps and heads of an attention module of this path in the model.

    Raises `UsageError` for weights that cannot be permuted.
    """
    head_dim = int(attribute(module, record.head_dim))
    value_dim = head_dim if record.value_dim is None else int(attribute(module, record.value_dim))
    query, key, value = (first_of(module, paths) for paths in (record.query, record.key, record.value))
    output = permutable(module, record.output, name)
    q = permutable(module, query, name)
    query_heads = sizes(output)[1] // value_dim
    latents = tuple(
        permutable(module, path, name) for path in record.latents if attribute(module, path) is not None
    )
    cached = None
    own = query_heads * head_dim * (2 if record.gated else 1)
    if record.fused in ("stacked", "by group"):
        kv_heads = (sizes(q)[0] // head_dim - query_heads) // 2
        before = query_heads if record.fused == "stacked" else query_heads // kv_heads
        between = kv_heads if record.fused == "stacked" else 1
        starts = (before * head_dim, (before + between) * head_dim)
        key_value = tuple(Rows(query, q, head_dim, start) for start in starts)
    elif attribute(module, key) is None:  # it reads those of another layer
        kv_heads, key_value, cached = query_heads // int(attribute(module, "num_key_value_groups")), (), 0
    else:
        made = {path: permutable(module, path, name) for path in dict.fromkeys((key, value))}
        kv_heads = query_heads if record.fused == "by head" else sizes(made[key])[0] // head_dim
        key_value = tuple(Rows(path, m, sizes(m)[0] // kv_heads) for path, m in made.items())
    if record.expands is not None and hasattr(module, record.expands):
        cached = sizes(latents[-1])[0]
    gate = None
    if record.gate is not None:
        gate = Rows(record.gate, permutable(module, record.gate, name), value_dim)
    return AttentionMaps(
        query=Rows(query, q, own // query_heads),
        key_value=key_value,
        gate=gate,
        output=output,
        latents=latents,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        by_group=record.fused == "by group",
        cached=cached,
    )
