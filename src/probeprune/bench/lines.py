"""The lines of `bench.jsonl`: one method in one phase at one point of the grid."""

from typing import Literal, TypedDict

PhaseName = Literal["prefill", "decode"]


class Measured(TypedDict):
    """The measurements of a line.

    Times and speeds are medians over rounds; "over dense" is the ratio to the dense model.
    """

    seconds: float
    """Time of the prefill, or of decoding one token."""
    tokens_per_second: float
    speedup: float
    """Dense time over the method's, in the same round."""
    speedup_range: list[float]
    """Lowest and highest round."""
    work_share: float
    """Over dense. Prefill: FLOPs. Decode: bytes of weights and KV cache that a step reads."""
    efficiency: float
    """`speedup * work_share`; 1 where all work saved is time saved."""
    overhead_share: float
    """Share of the pass spent in `stages.OVERHEAD`."""
    profile_ms: dict[str, float]
    """Milliseconds of one pass by part, from `profiling.PARTS`."""
    peak_memory: int
    """Bytes."""
    memory_over_dense: float
    cache_bytes: int
    """Bytes of the KV cache after the prompt."""
    cache_over_dense: float


class BenchLine(Measured):
    """One line: the settings and the measurements."""

    model: str
    ratio: float
    """Pruning ratio, as a share."""
    batch_size: int
    """Prompts a batch."""
    length: int
    """Tokens of a prompt."""
    new_tokens: int
    """Tokens decoded after the prompt."""
    rounds: int
    dtype: str
    device: str
    threads: int
    """CPU threads."""
    compiled: bool
    """Whether the timed passes ran compiled layers."""
    method: str
    phase: PhaseName
