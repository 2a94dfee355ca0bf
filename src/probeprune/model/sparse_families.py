"""The families of mixtures of experts that can be pruned, one record each.

Written as `families.py` says; knows no model.
"""

from dataclasses import replace

from probeprune.model.family_records import (
    AttentionRecord,
    ExpertsRecord,
    Family,
    MixerRecord,
    MlpRecord,
    SharedKV,
)

NORMS_OVER_HEADS = "normalises queries and keys over all heads together, so none can go without the others"
SINKS = "has a learned sink for each head beside its linear maps"

MIXTRAL = ExpertsRecord(count_field="num_local_experts", width_field="intermediate_size", everywhere=True)
"""Experts alone, as wide as the config says of MLPs."""
_ROUTED = ("mlp.experts.num_experts", "mlp.router.num_experts")


def shared_mlp(path: str, width_field: str | None = None) -> MlpRecord:
    """A gated MLP beside the experts, at a path in the layer."""
    return MlpRecord(
        module=path,
        producers=(f"{path}.gate_proj", f"{path}.up_proj"),
        consumer=f"{path}.down_proj",
        width_field=width_field,
    )


ROUTED_BY_GROUP = ExpertsRecord(
    router=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    count_field="n_routed_experts",
    group_fields=("n_group", "topk_group"),
    shared=shared_mlp("mlp.shared_experts"),
    shared_times="n_shared_experts",
)
"""Experts of the DeepSeek-V3 kind: in groups, with a correction of their scores and shared ones beside."""
GRANITE_MLP = MlpRecord(
    module="shared_mlp",
    producers=("shared_mlp.input_linear", "shared_mlp.input_linear"),
    consumer="shared_mlp.output_linear",
    width_field="shared_intermediate_size",
)
GRANITE_MOE = replace(
    MIXTRAL,
    module="block_sparse_moe.experts",
    entry="block_sparse_moe",
    router=("block_sparse_moe.router.weight",),
    counts=("block_sparse_moe.experts.num_experts", "block_sparse_moe.router.num_experts"),
    widths=("block_sparse_moe.experts.intermediate_dim",),
)
QWEN_MOE = ExpertsRecord(
    beside=("mlp.shared_expert_gate.weight",),
    shared=shared_mlp("mlp.shared_expert", "shared_expert_intermediate_size"),
)
"""Experts beside a shared MLP with a gate and a width of its own."""


_GEMMA4_MLP = MlpRecord(
    norm="pre_feedforward_layernorm", twice_if=("use_double_wide_mlp", "self_attn.is_kv_shared_layer")
)

SPARSE: tuple[Family, ...] = (
    Family(
        "Qwen1.5-MoE, Qwen2-MoE",
        ("qwen2_moe",),
        experts=QWEN_MOE,
    ),
    Family("Qwen3-MoE", ("qwen3_moe",), experts=ExpertsRecord()),
    Family("Mixtral", ("mixtral",), experts=MIXTRAL),
    Family(
        "OLMoE",
        ("olmoe",),
        attention=AttentionRecord(whole=NORMS_OVER_HEADS),
        experts=replace(MIXTRAL, count_field="num_experts"),
    ),
    Family(
        "Phi-3.5-MoE",
        ("phimoe",),
        experts=replace(
            MIXTRAL,
            router=("mlp.router.weight",),
            counts=(*_ROUTED, "mlp.router.out_features", "mlp.num_experts"),
            widths=("mlp.experts.intermediate_dim", "mlp.ffn_dim"),
        ),
    ),
    Family(
        "gpt-oss",
        ("gpt_oss",),
        attention=AttentionRecord(whole=SINKS),
        experts=replace(
            MIXTRAL,
            transposed=True,
            interleaved=True,
            biases=True,
            router=("mlp.router.weight", "mlp.router.bias"),
            counts=_ROUTED,
            widths=("mlp.experts.intermediate_size",),
        ),
    ),
    Family(
        "Granite MoE",
        ("granitemoe",),
        experts=GRANITE_MOE,
        norm_last=True,
        logits_over="logits_scaling",
    ),
    Family(
        "Granite MoE with a shared MLP",
        ("granitemoeshared",),
        experts=replace(GRANITE_MOE, shared=GRANITE_MLP),
        norm_last=True,
        logits_over="logits_scaling",
    ),
    Family(
        "GLM-4.5, GLM-4.6",
        ("glm4_moe",),
        experts=ROUTED_BY_GROUP,
    ),
    Family("dots.llm1", ("dots1",), experts=ROUTED_BY_GROUP),
    Family("Solar Open", ("solar_open",), experts=replace(ROUTED_BY_GROUP, everywhere=True)),
    Family(
        "K-EXAONE",
        ("exaone_moe",),
        experts=replace(ROUTED_BY_GROUP, count_field="num_experts", shared_times="num_shared_experts"),
    ),
    Family(
        "MiniMax M2",
        ("minimax_m2",),
        attention=AttentionRecord(whole=NORMS_OVER_HEADS),
        experts=replace(MIXTRAL, router=("mlp.gate.weight", "mlp.e_score_correction_bias")),
    ),
    Family(
        "Hunyuan 3",
        ("hy_v3",),
        experts=ExpertsRecord(
            router=("mlp.gate.weight", "mlp.e_score_correction_bias"),
            shared=shared_mlp("mlp.shared_experts"),
            shared_times="num_shared_experts",
        ),
    ),
    Family("Mellum 2", ("mellum",), experts=ExpertsRecord()),
    Family(
        "FlexOlmo",
        ("flex_olmo",),
        attention=AttentionRecord(norm=None, whole=NORMS_OVER_HEADS),
        experts=replace(MIXTRAL, count_field="num_experts"),
        norm_last=True,
    ),
    Family(
        "ERNIE 4.5 MoE",
        ("ernie4_5_moe",),
        experts=ExpertsRecord(
            router=("mlp.gate.weight", "mlp.gate.moe_statics.e_score_correction_bias"),
            counts=("mlp.experts.num_experts", "mlp.gate.num_experts", "mlp.num_experts"),
            count_field="moe_num_experts",
            per_token_field="moe_k",
            shared=shared_mlp("mlp.shared_experts"),
            shared_times="moe_num_shared_experts",
        ),
    ),
    Family(
        "Hunyuan (MoE)",
        ("hunyuan_v1_moe",),
        experts=replace(
            MIXTRAL,
            router=("mlp.gate.wg.weight",),
            counts=("mlp.experts.num_experts", "mlp.gate.num_experts", "mlp.gate.wg.out_features"),
            count_field="num_experts",
            per_token_field="moe_topk",
            shared=shared_mlp("mlp.shared_mlp"),
            shared_times=1,
        ),
    ),
    Family(
        "AFMoE (Trinity)",
        ("afmoe",),
        attention=AttentionRecord(gate="gate_proj"),
        mlp=MlpRecord(norm="pre_mlp_layernorm"),
        experts=ExpertsRecord(
            router=("mlp.router.gate.weight", "mlp.expert_bias"),
            counts=("mlp.experts.num_experts", "mlp.router.num_experts", "mlp.router.gate.out_features"),
            shared=replace(shared_mlp("mlp.shared_experts"), norm="pre_mlp_layernorm"),
            shared_times="num_shared_experts",
        ),
        norm_last=True,
    ),
    Family(
        "Command A MoE",
        ("cohere2_moe",),
        mlp=MlpRecord(norm="input_layernorm", width_field="prefix_dense_intermediate_size"),
        experts=ExpertsRecord(
            width_field="intermediate_size",
            shared=replace(shared_mlp("mlp.shared_experts"), norm="input_layernorm"),
            shared_times="num_shared_experts",
        ),
        norm_last=True,
        logits_times="logit_scale",
    ),
    Family(
        "Aria (text)",
        ("aria_text",),
        experts=ExpertsRecord(
            transposed=True,
            router=("mlp.router.weight",),
            counts=_ROUTED,
            count_field="moe_num_experts",
            width_field="intermediate_size",
            per_token_field="moe_topk",
            shared=shared_mlp("mlp.shared_experts"),
            shared_times="moe_num_shared_experts",
            everywhere=True,
        ),
    ),
    Family(
        "Granite MoE with sliding windows",
        ("granitemoe_swa",),
        attention=AttentionRecord(whole=SINKS),
        experts=replace(GRANITE_MOE, shared=GRANITE_MLP),
        norm_last=True,
        logits_over="logits_scaling",
    ),
    Family(
        "Gemma 4 (text)",
        ("gemma4_text",),
        # Layers of global attention may have no map for values: they are the keys before their norm.
        attention=AttentionRecord(value=("v_proj", "k_proj"), plain_heads=False, shared_kv=SharedKV()),
        mlp=_GEMMA4_MLP,
        experts=ExpertsRecord(
            module="experts",
            entry="experts",
            router=("router.proj.weight", "router.per_expert_scale"),
            counts=("experts.num_experts", "router.proj.out_features"),
            widths=("experts.intermediate_dim",),
            per_token_field="top_k_experts",
            shared=_GEMMA4_MLP,
        ),
        mixers=(MixerRecord(None, norm=None, maps=("per_layer_input_gate",), output="per_layer_projection"),),
        by_token=("per_layer_input",),
        norm_last=True,
    ),
    Family(
        "LLaMA 4 (text)",
        ("llama4_text",),
        mlp=MlpRecord(
            module="feed_forward",
            producers=("feed_forward.gate_proj", "feed_forward.up_proj"),
            consumer="feed_forward.down_proj",
            width_field="intermediate_size_mlp",
        ),
        experts=replace(
            MIXTRAL,
            module="feed_forward.experts",
            entry="feed_forward",
            everywhere=False,
            transposed=True,
            router=("feed_forward.router.weight",),
            counts=(
                "feed_forward.num_experts",
                "feed_forward.experts.num_experts",
                "feed_forward.router.num_experts",
                "feed_forward.router.out_features",
            ),
            widths=("feed_forward.experts.intermediate_size", "feed_forward.experts.expert_dim"),
            shared=shared_mlp("feed_forward.shared_expert"),
            shared_times=1,
            scales_input=True,
        ),
    ),
)
"""In the order of the table."""
