"""What inference engines like in a checkpoint, one record each.

Knows nothing of models or methods: a layout and a rounding are all that pruning must know of an engine.
"""

from dataclasses import dataclass

from probeprune.errors import UsageError, unknown
from probeprune.model.described import Layout


@dataclass(frozen=True)
class Engine:
    """The checkpoint that an engine runs best."""

    name: str
    layout: Layout
    round_to: int
    """MLP widths are multiples of this."""
    why: str
    """The reason for both, one sentence."""


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine("transformers", "uniform", 64, "A plain config opens everywhere; fast kernels like 64."),
        Engine(
            "llama.cpp",
            "per-layer",
            32,
            "A GGUF file holds a width for each layer; rows of quantised weights come in blocks of 32.",
        ),
        Engine(
            "vllm",
            "nemotron-nas",
            128,
            "Its model code reads a width for each MLP; tensor parallelism and GPTQ groups want 128.",
        ),
        Engine("sglang", "uniform", 128, "It reads one width for all layers; GPTQ groups want 128."),
        Engine("tensorrt-llm", "uniform", 128, "It reads one width for all layers."),
        Engine("openvino", "uniform", 64, "Its exporter takes no transformers with widths per layer."),
        Engine("onnx", "uniform", 64, "Its exporter takes no transformers with widths per layer."),
        Engine("mistral.rs", "uniform", 64, "It reads one width for all layers, also from a GGUF file."),
        Engine("mlx", "uniform", 64, "It reads one width for all layers; quantised groups are 64 wide."),
    )
}
"""Engines by name. Programs on top of llama.cpp (ollama, LM Studio) like what it likes."""


def get_engine(name: str) -> Engine:
    """An engine's record. Raises `UsageError` for an unknown name."""
    if name not in ENGINES:
        raise UsageError(unknown("engine", name, ENGINES))
    return ENGINES[name]
