"""The records of the older decoder families: OPT, GPT-NeoX, GPT-2, BLOOM and their kin.

One map makes queries, keys and values in most of them, and none has a plain config for fewer heads.
"""

from dataclasses import replace

from probeprune.model.family_records import AttentionRecord, Family, MlpRecord

_ALIBI = (
    "has ALiBi, whose slopes its code gives to the heads of all layers by their place, so the heads left "
    "would get others"
)
_FOUR_PARTS = "has code that deals heads out to four parts of equal size"

# Of the OPT kind: the layer itself computes the MLP.
_OPT_ATTENTION = AttentionRecord(
    norm="self_attn_layer_norm", output="out_proj", query_count="num_heads", plain_heads=False
)
_OPT_MLP = MlpRecord(
    module=None,
    norm="final_layer_norm",
    producers=("fc1",),
    consumer="fc2",
    activation="activation_fn",
    width_field="ffn_dim",
)
ONE_MAP = AttentionRecord(
    query="query_key_value",
    key="query_key_value",
    value="query_key_value",
    output="dense",
    fused="by group",
    plain_heads=False,
)
"""Attention of the GPT-NeoX kind."""
NEOX_MLP = MlpRecord(producers=("mlp.dense_h_to_4h",), consumer="mlp.dense_4h_to_h")
"""The MLP of the GPT-NeoX kind."""
# Of the GPT-2 kind, and of the GPT-J kind, where both blocks read one norm.
_GPT2_ATTENTION = AttentionRecord(
    module="attn",
    norm="ln_1",
    query="c_attn",
    key="c_attn",
    value="c_attn",
    output="c_proj",
    fused="stacked",
    query_width="split_size",
    plain_heads=False,
)
_GPT2_MLP = MlpRecord(norm="ln_2", producers=("mlp.c_fc",), consumer="mlp.c_proj", width_field="n_inner")
_GPTJ_ATTENTION = AttentionRecord(
    module="attn", norm="ln_1", output="out_proj", query_count="num_attention_heads", plain_heads=False
)
_GPTJ_MLP = MlpRecord(norm="ln_1", producers=("mlp.fc_in",), consumer="mlp.fc_out", width_field="n_inner")

OLDER: tuple[Family, ...] = (
    Family(
        "OPT",
        ("opt",),
        layers="model.decoder.layers",
        attention=_OPT_ATTENTION,
        mlp=_OPT_MLP,
        norm_first="do_layer_norm_before",
    ),
    Family(
        "GPT-NeoX, Pythia",
        ("gpt_neox",),
        layers="gpt_neox.layers",
        attention=replace(ONE_MAP, module="attention", head_dim="head_size"),
        mlp=NEOX_MLP,
    ),
    Family("GPT-2", ("gpt2",), layers="transformer.h", attention=_GPT2_ATTENTION, mlp=_GPT2_MLP),
    Family(
        "GPT-BigCode (StarCoder 1)",
        ("gpt_bigcode",),
        layers="transformer.h",
        # With `multi_query`, one group of all heads; without, one of each head.
        attention=replace(
            _GPT2_ATTENTION,
            fused="by group",
            query_count="num_heads",
            query_width="embed_dim",
            multi_query="multi_query",
        ),
        mlp=_GPT2_MLP,
    ),
    Family(
        "GPT-Neo",
        ("gpt_neo",),
        layers="transformer.h",
        attention=replace(_GPTJ_ATTENTION, module="attn.attention", query_count="num_heads"),
        mlp=replace(_GPT2_MLP, width_field="intermediate_size"),
        layers_give_tuples=True,
    ),
    Family(
        "GPT-J",
        ("gptj",),
        layers="transformer.h",
        attention=_GPTJ_ATTENTION,
        mlp=_GPTJ_MLP,
        layers_give_tuples=True,
    ),
    Family(
        "CodeGen",
        ("codegen",),
        layers="transformer.h",
        # The map has an order of its own, which does not matter where all heads stay.
        attention=replace(
            _GPTJ_ATTENTION,
            query="qkv_proj",
            key="qkv_proj",
            value="qkv_proj",
            fused="stacked",
            whole=_FOUR_PARTS,
        ),
        mlp=_GPTJ_MLP,
        layers_give_tuples=True,
    ),
    Family(
        "BLOOM",
        ("bloom",),
        layers="transformer.h",
        attention=replace(ONE_MAP, module="self_attention", whole=_ALIBI),
        # The module's forward takes the residual stream too.
        mlp=replace(NEOX_MLP, module=None, activation="mlp.gelu_impl", width_field=None),
        layers_give_tuples=True,
    ),
    Family(
        "Falcon",
        ("falcon",),
        layers="transformer.h",
        attention=replace(
            ONE_MAP,
            module="self_attention",
            norm=("ln_attn", "input_layernorm"),
            query_count="num_heads",
            kv_count="num_kv_heads",
            multi_query="multi_query",
            repeats_kv="new_decoder_architecture",
            whole=_ALIBI,
            whole_if="alibi",
        ),
        mlp=replace(
            NEOX_MLP,
            norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
            width_field="ffn_hidden_size",
        ),
        layers_give_tuples=True,
    ),
    Family(
        "MPT",
        ("mpt",),
        layers="transformer.blocks",
        attention=AttentionRecord(
            module="attn",
            norm="norm_1",
            query="Wqkv",
            key="Wqkv",
            value="Wqkv",
            output="out_proj",
            fused="stacked",
            plain_heads=False,
            whole=_ALIBI,
        ),
        mlp=MlpRecord(
            module=None,  # as in BLOOM
            norm="norm_2",
            producers=("ffn.up_proj",),
            consumer="ffn.down_proj",
            activation="ffn.act",
            width_field=None,
        ),
        layers_give_tuples=True,
    ),
    Family("XGLM", ("xglm",), attention=replace(_OPT_ATTENTION, query_width="embed_dim"), mlp=_OPT_MLP),
    Family(
        "BioGPT",
        ("biogpt",),
        layers="biogpt.layers",
        attention=replace(_OPT_ATTENTION, query_count=None),
        mlp=replace(_OPT_MLP, width_field="intermediate_size"),
    ),
)
"""In the order of the table of families."""
