"""The types in which a GGUF file can hold weights: what each is called, how it is stored, what it needs."""

from dataclasses import dataclass
from typing import Literal, get_args

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from probeprune.errors import UsageError, unknown

FileType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


@dataclass(frozen=True)
class Storage:
    """How a file of one type holds matrices. Vectors and norms are always float32."""

    label: LlamaFileType
    """The value of `general.file_type`."""
    matrices: GGMLQuantizationType
    head: GGMLQuantizationType
    """For the output matrix, and for embeddings that serve as one: it suffers most from few bits."""


_Q, _L = GGMLQuantizationType, LlamaFileType

STORAGES: dict[FileType, Storage] = {
    "f32": Storage(_L.ALL_F32, _Q.F32, _Q.F32),
    "f16": Storage(_L.MOSTLY_F16, _Q.F16, _Q.F16),
    "bf16": Storage(_L.MOSTLY_BF16, _Q.BF16, _Q.BF16),
    "q8_0": Storage(_L.MOSTLY_Q8_0, _Q.Q8_0, _Q.Q8_0),
    "q5_1": Storage(_L.MOSTLY_Q5_1, _Q.Q5_1, _Q.Q8_0),
    "q5_0": Storage(_L.MOSTLY_Q5_0, _Q.Q5_0, _Q.Q8_0),
    "q4_1": Storage(_L.MOSTLY_Q4_1, _Q.Q4_1, _Q.Q8_0),
    "q4_0": Storage(_L.MOSTLY_Q4_0, _Q.Q4_0, _Q.Q8_0),
}


def storage(name: str) -> Storage:
    """The storage of that name. Raises `UsageError` for an unknown one."""
    if name not in STORAGES:
        raise UsageError(unknown("GGUF type", name, get_args(FileType)))
    return STORAGES[name]


def block_length(kind: GGMLQuantizationType) -> int:
    """How many numbers of a row share their scale: it must divide the row."""
    return GGML_QUANT_SIZES[kind][0]


def stored_bytes(kind: GGMLQuantizationType, numbers: int) -> int:
    """The size of that many numbers in a file."""
    length, size = GGML_QUANT_SIZES[kind]
    return numbers // length * size
