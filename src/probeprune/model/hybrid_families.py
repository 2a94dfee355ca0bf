"""The records of hybrid families, whose layers are not all attention and MLP.

What mixes tokens in another way (a state-space model, a gated delta rule, a short convolution) stays whole,
and counts in ratios as such.
"""

from dataclasses import replace

from probeprune.model.family_records import AttentionRecord, Family, MixerRecord, MlpRecord

_MAMBA = MixerRecord("mamba", maps=("in_proj",), output="out_proj")
"""A Mamba mixer with one map in front; the second release of Mamba has no other."""
_FEED_FORWARD = MlpRecord(
    norm="pre_ff_layernorm",
    producers=("feed_forward.gate_proj", "feed_forward.up_proj"),
    consumer="feed_forward.down_proj",
    module="feed_forward",
)

HYBRID: tuple[Family, ...] = (
    Family(
        "Qwen3.5 (text)",
        ("qwen3_5_text",),
        attention=AttentionRecord(gated=True),
        mixers=(
            MixerRecord(
                "linear_attn",
                maps=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
                output="out_proj",
            ),
        ),
    ),
    Family(
        "LFM2",
        ("lfm2",),
        attention=AttentionRecord(norm="operator_norm", output="out_proj"),
        mlp=MlpRecord(
            module="feed_forward",
            norm="ffn_norm",
            producers=("feed_forward.w1", "feed_forward.w3"),
            consumer="feed_forward.w2",
            said_with={"block_auto_adjust_ff_dim": False},
        ),
        mixers=(MixerRecord("conv", norm="operator_norm", maps=("in_proj",), output="out_proj"),),
    ),
    Family(
        "Falcon-H1",
        ("falcon_h1",),
        attention=AttentionRecord(input_factor="attention_in_multiplier"),
        mlp=_FEED_FORWARD,
        mixers=(_MAMBA,),
        norm_last=True,
        layers_give_tuples=True,
        logits_times="lm_head_multiplier",
    ),
    Family("Bamba", ("bamba",), mlp=_FEED_FORWARD, mixers=(_MAMBA,), layers_give_tuples=True),
    Family(
        "Granite 4.0 (dense)",
        ("granitemoehybrid",),
        mlp=MlpRecord(
            module="shared_mlp",
            producers=("shared_mlp.input_linear", "shared_mlp.input_linear"),
            consumer="shared_mlp.output_linear",
            width_field="shared_intermediate_size",
        ),
        mixers=(_MAMBA,),
        norm_last=True,
        logits_over="logits_scaling",
        refused_experts="block_sparse_moe",
    ),
    Family(
        "Nemotron-H (dense)",
        ("nemotron_h",),
        attention=AttentionRecord(module="mixer", norm="norm", only_in="full_attention"),
        mlp=MlpRecord(
            module="mixer",
            norm="norm",
            producers=("mixer.up_proj",),
            consumer="mixer.down_proj",
            only_in="mlp",
        ),
        mixers=(replace(_MAMBA, module="mixer", norm="norm", only_in="linear_attention"),),
        refused_experts="mixer.experts",
    ),
    Family(
        "Jamba (dense)",
        ("jamba",),
        mlp=_FEED_FORWARD,
        mixers=(replace(_MAMBA, maps=("in_proj", "x_proj", "dt_proj")),),
        refused_experts="feed_forward.experts",
    ),
)
"""In the order of the table of families."""
