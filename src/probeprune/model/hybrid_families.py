"""The records of hybrid families, whose layers are not all attention and MLP.

What mixes tokens in another way (a state-space model, a gated delta rule, a short convolution) stays whole,
and counts in ratios as such.
"""

from dataclasses import replace

from probeprune.model.family_records import AttentionRecord, ExpertsRecord, Family, MixerRecord, MlpRecord
from probeprune.model.sparse_families import GRANITE_MOE, MIXTRAL, QWEN_MOE

_MAMBA = MixerRecord("mamba", maps=("in_proj",), output="out_proj")
"""A Mamba mixer with one map in front; the second release of Mamba has no other."""
_FEED_FORWARD = MlpRecord(
    norm="pre_ff_layernorm",
    producers=("feed_forward.gate_proj", "feed_forward.up_proj"),
    consumer="feed_forward.down_proj",
    module="feed_forward",
)

_DELTA = MixerRecord(
    "linear_attn", maps=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), output="out_proj"
)
_GRANITE_MLP = MlpRecord(
    module="shared_mlp",
    producers=("shared_mlp.input_linear", "shared_mlp.input_linear"),
    consumer="shared_mlp.output_linear",
    width_field="shared_intermediate_size",
)

HYBRID: tuple[Family, ...] = (
    Family(
        "Qwen3.5 (text)",
        ("qwen3_5_text",),
        attention=AttentionRecord(gated=True),
        mixers=(_DELTA,),
    ),
    Family(
        "Qwen3.5 MoE (text)",
        ("qwen3_5_moe_text",),
        attention=AttentionRecord(gated=True),
        mixers=(_DELTA,),
        experts=replace(QWEN_MOE, everywhere=True),
    ),
    Family(
        "Qwen3-Next",
        ("qwen3_next",),
        attention=AttentionRecord(gated=True),
        mixers=(replace(_DELTA, maps=("in_proj_qkvz", "in_proj_ba")),),
        experts=QWEN_MOE,
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
        "Granite 4.0",
        ("granitemoehybrid",),
        mlp=_GRANITE_MLP,
        mixers=(_MAMBA,),
        experts=replace(GRANITE_MOE, shared=_GRANITE_MLP),
        norm_last=True,
        logits_over="logits_scaling",
    ),
    Family(
        "Nemotron-H, Nemotron 3",
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
        experts=ExpertsRecord(
            module="mixer.experts",
            entry="mixer",
            gated=False,
            router=("mixer.gate.weight", "mixer.gate.e_score_correction_bias"),
            beside=tuple(f"mixer.fc{i}_latent_proj.{key}" for i in (1, 2) for key in ("weight", "bias")),
            counts=("mixer.experts.num_experts", "mixer.gate.num_experts"),
            widths=("mixer.experts.intermediate_dim",),
            count_field="n_routed_experts",
            group_fields=("n_group", "topk_group"),
            shared=MlpRecord(
                module="mixer.shared_experts",
                norm="norm",
                producers=("mixer.shared_experts.up_proj",),
                consumer="mixer.shared_experts.down_proj",
                width_field="moe_shared_expert_intermediate_size",
            ),
        ),
    ),
    Family(
        "Jamba",
        ("jamba",),
        mlp=_FEED_FORWARD,
        mixers=(replace(_MAMBA, maps=("in_proj", "x_proj", "dt_proj")),),
        experts=replace(
            MIXTRAL,
            module="feed_forward.experts",
            entry="feed_forward",
            everywhere=False,
            router=("feed_forward.router.weight",),
            counts=tuple(f"feed_forward.{path}num_experts" for path in ("", "experts.", "router.")),
            widths=("feed_forward.experts.intermediate_dim", "feed_forward.ffn_dim"),
            count_field="num_experts",
        ),
    ),
)
"""In the order of the table of families."""
