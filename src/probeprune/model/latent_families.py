"""The records of families with latent attention (MLA): keys and values of all heads are made from one latent.

A unit is a query head with its own key and value; the latents, their norms and the key that all heads share
stay. Written as `families.py` says; knows no model.
"""

from dataclasses import replace

from probeprune.model.family_records import AttentionRecord, Family
from probeprune.model.sparse_families import ROUTED_BY_GROUP

_LATENT = AttentionRecord(
    query=("q_b_proj", "q_proj"),
    key="kv_b_proj",
    value="kv_b_proj",
    fused="by head",
    latents=("q_a_proj", "kv_a_proj_with_mqa"),
    expands="expand_kv",
    head_dim="qk_head_dim",
    value_dim="v_head_dim",
)
_DIVIDES = replace(_LATENT, plain_heads=False)
"""Its config wants heads that divide the hidden size."""
_UNCORRECTED = replace(ROUTED_BY_GROUP, router=("mlp.gate.weight",))

LATENT: tuple[Family, ...] = (
    Family("MiniCPM 3", ("minicpm3",), attention=_DIVIDES, norm_last=True, logits_over="logits_scaling"),
    Family("Youtu-LLM", ("youtu",), attention=_LATENT),
    Family("DeepSeek-V2", ("deepseek_v2",), attention=_DIVIDES, experts=_UNCORRECTED),
    Family("DeepSeek-V3, R1", ("deepseek_v3",), attention=_LATENT, experts=ROUTED_BY_GROUP),
    Family("GLM-4.7-Flash", ("glm4_moe_lite",), attention=_LATENT, experts=ROUTED_BY_GROUP),
)
"""In the order of the table of families."""
