"""What cutting experts, or channels of experts, takes from a large mixture of experts: parameters and FLOPs.

    python benchmarks/experts.py

The model is Qwen3-30B-A3B's shape on device `meta`: nothing is downloaded, and no weight is computed. Printed
is the table in docs/models.md. Counted are all parameters; those that one token is multiplied with; and the
FLOPs of a token in the decoder and the output head, in windows of 512 tokens.
"""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from probeprune.model.cost import blocks_flops
from probeprune.model.experts import ExpertUnit, Stack, find_parts

LENGTH = 512
SHARES = (0.25, 0.5)


def shape() -> Qwen3MoeConfig:
    """Qwen3-30B-A3B."""
    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=40960,
    )


def figures(model: Qwen3MoeForCausalLM, unit: ExpertUnit, share: float) -> tuple[float, float, float]:
    """Billions of parameters, of parameters that a token meets, and of FLOPs a token, behind a cut."""
    parts = find_parts(model, unit=unit)
    kept = [p.units - round(p.units * share) if isinstance(p, Stack) else p.units for p in parts]
    total = sum(p.numel() for p in model.parameters())
    total -= sum((p.units - k) * p.unit_parameters for p, k in zip(parts, kept, strict=True))
    idle = model.config.vocab_size * model.config.hidden_size  # the embedding is looked up
    for part, keep in zip(parts, kept, strict=True):
        if isinstance(part, Stack):
            experts, width = (keep, part.width) if unit == "expert" else (part.experts, keep)
            idle += (experts - part.per_token) * width * 3 * part.hidden_size
    head = 2 * model.config.vocab_size * model.config.hidden_size
    flops = blocks_flops(parts, kept, 1, LENGTH) / LENGTH + head
    return total / 1e9, (total - idle) / 1e9, flops / 1e9


def main() -> None:
    """Print the table."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(shape(), dtype=torch.bfloat16)
    dense = figures(model, "expert", 0.0)
    print("| cut of the experts | kept | parameters | met by a token | FLOPs a token |")
    print("| --- | --- | --- | --- | --- |")
    print(f"| none | 128 of 128 experts, 768 channels | {' | '.join(f'{n:.2f} G' for n in dense)} |")
    for share in SHARES:
        for unit, of in (("expert", 128), ("channel", 768)):
            found = figures(model, unit, share)
            cells = (f"{n:.2f} G ({n / d - 1:+.0%})" for n, d in zip(found, dense, strict=True))
            noun = "experts" if unit == "expert" else "channels of each"
            print(
                f"| {share:.0%}, by {unit} | {of - round(of * share)} of {of} {noun} | {' | '.join(cells)} |"
            )


if __name__ == "__main__":
    main()
