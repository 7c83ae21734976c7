"""Decoders as GPT-2 is: layer norms, MLPs without gates, often one tensor for all of attention. Data only."""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.families.parts import (
    ALIBI,
    ATTENDED,
    CLIPPED,
    DERIVED_SIZES,
    EMBEDDING,
    HIDDEN_AND_HEADS,
    KEY,
    QUERY,
    SCALED_ALIBI,
    SIZES,
    SQUARE_SIZES,
    VALUE,
    attention,
    gated,
    gpt_norms,
    ungated,
)
from surgeon.anatomy.families.table import ALL_OR_NONE, Family, linear, norm, one

MOST_HEADS = 128  # of a StableLM whose heads have norms of their own

GPT2 = Family(
    base="transformer.",
    layers="transformer.h.",
    embedding=one("transformer.wte.weight", "vocab hidden", "embedding")
    | one("transformer.wpe.weight", "positions hidden", "embedding")
    | one("lm_head.weight", "vocab hidden", "head"),
    final_norm=norm("transformer.ln_f", shift=True),
    attention=linear("attn.c_attn", f"hidden ({QUERY} + {KEY} + {VALUE})", bias=True, kind="conv1d")
    | linear("attn.c_proj", f"({ATTENDED}) hidden", bias=True, kind="conv1d")
    | one("attn.bias", "1 1 positions positions", "buffer")
    | one("attn.masked_bias", "", "buffer"),
    norm=norm("ln_1", shift=True) | norm("ln_2", shift=True),
    mlp=(
        linear("mlp.c_fc", "hidden ffn", bias=True, kind="conv1d")
        | linear("mlp.c_proj", "ffn hidden", bias=True, kind="conv1d"),
    ),
    sizes={
        "vocab": ("vocab_size",),
        "hidden": ("n_embd",),
        "heads": ("n_head",),
        "ffn": ("n_inner",),
        "positions": ("n_positions", "n_ctx"),
    },
    default_sizes={"kv_heads": (1, "heads"), "ffn": (4, "hidden")},
    residual_init=("attn.c_proj.weight", "mlp.c_proj.weight"),
    inverse_layer_scale="scale_attn_by_inverse_layer_idx",
    query_scale_flag="scale_attn_weights",
    norm_kind="layer",
    rotary=None,
)

GPT_NEOX = Family(
    base="gpt_neox.",
    layers="gpt_neox.layers.",
    embedding=one("gpt_neox.embed_in.weight", "vocab hidden", "embedding")
    | one("embed_out.weight", "vocab hidden", "head"),
    final_norm=norm("gpt_neox.final_layer_norm", shift=True),
    attention=linear(
        "attention.query_key_value", "(kv_heads (group q_dim + k_dim + v_dim)) hidden", bias="attention_bias"
    )
    | linear("attention.dense", f"hidden ({ATTENDED})", bias="attention_bias")
    | one("attention.bias", "1 1 positions positions", "buffer")
    | one("attention.masked_bias", "", "buffer")
    | one("attention.rotary_emb.inv_freq", "rotary", "buffer"),
    norm=norm("input_layernorm", shift=True) | norm("post_attention_layernorm", shift=True),
    mlp=(linear("mlp.dense_h_to_4h", "ffn hidden", bias=True) | linear("mlp.dense_4h_to_h", "hidden ffn", bias=True),),
    sizes=HIDDEN_AND_HEADS,
    default_sizes=DERIVED_SIZES,
    norm_kind="layer",
    hidden_divisible=True,
    rotary_share=0.25,
    parallel_flags={"use_parallel_residual": True},
)

OPT = Family(
    base="model.",
    layers="model.decoder.layers.",
    embedding=one("model.decoder.embed_tokens.weight", "vocab embed", "embedding")
    | one("model.decoder.embed_positions.weight", "(positions + 2) hidden", "embedding")
    | one("model.decoder.project_in.weight", "hidden embed", "linear", when="embed != hidden")
    | one("model.decoder.project_out.weight", "embed hidden", "linear", when="embed != hidden")
    | one("lm_head.weight", "vocab embed", "head")
    | one("model.decoder.version", "1", "buffer"),
    final_norm={
        name: replace(row, when="do_layer_norm_before")
        for name, row in norm("model.decoder.final_layer_norm", shift=True).items()
    },
    attention=linear("self_attn.q_proj", f"({QUERY}) hidden", bias="enable_bias")
    | linear("self_attn.k_proj", f"({KEY}) hidden", bias="enable_bias")
    | linear("self_attn.v_proj", f"({VALUE}) hidden", bias="enable_bias")
    | linear("self_attn.out_proj", f"hidden ({ATTENDED})", bias="enable_bias"),
    norm=norm("self_attn_layer_norm", shift=True) | norm("final_layer_norm", shift=True),
    mlp=(linear("fc1", "ffn hidden", bias="enable_bias") | linear("fc2", "hidden ffn", bias="enable_bias"),),
    sizes=HIDDEN_AND_HEADS | {"ffn": ("ffn_dim",), "embed": ("word_embed_proj_dim",)},
    default_sizes={"kv_heads": (1, "heads"), "embed": (1, "hidden")},
    init_std="init_std",
    norm_kind="layer",
    pre_norm_flag="do_layer_norm_before",
    rotary=None,
)

# Head by head, or where keys and values are shared group by group: queries, then their key and value.
PER_GROUP = "(kv_heads (group q_dim + k_dim + v_dim)) hidden"
GPT_BIGCODE = replace(
    GPT2,
    attention=linear("attn.c_attn", PER_GROUP, bias=True) | linear("attn.c_proj", f"hidden ({ATTENDED})", bias=True),
    mlp=(ungated(bias=True, up="mlp.c_fc", down="mlp.c_proj"),),
    sizes={**GPT2.sizes, "kv_heads": ("num_key_value_heads",)},
    inverse_layer_scale=None,
    kv_heads_flag=False,
    multi_query_flag="multi_query",
)
GPT_NEO = replace(
    GPT2,
    attention=linear("attn.attention.q_proj", f"({QUERY}) hidden")
    | linear("attn.attention.k_proj", f"({KEY}) hidden")
    | linear("attn.attention.v_proj", f"({VALUE}) hidden")
    | linear("attn.attention.out_proj", f"hidden ({ATTENDED})", bias=True)
    | one("attn.attention.bias", "1 1 positions positions", "buffer")
    | one("attn.attention.masked_bias", "", "buffer"),
    mlp=GPT_BIGCODE.mlp,
    sizes={
        "vocab": ("vocab_size",),
        "hidden": ("hidden_size",),
        "heads": ("num_heads",),
        "ffn": ("intermediate_size",),
        "positions": ("max_position_embeddings",),
    },
    residual_init=(),
    inverse_layer_scale=None,
    query_scale_flag=None,
    fixed_query_scale=True,  # logits are not divided at all
)
GPTJ = replace(
    GPT2,
    embedding=one("transformer.wte.weight", "vocab hidden", "embedding")
    | one("lm_head.weight", "vocab hidden", "head")
    | one("lm_head.bias", "vocab", "bias"),
    attention=linear("attn.q_proj", f"({QUERY}) hidden")
    | linear("attn.k_proj", f"({KEY}) hidden")
    | linear("attn.v_proj", f"({VALUE}) hidden")
    | linear("attn.out_proj", f"hidden ({ATTENDED})")
    | one("attn.bias", "1 1 positions positions", "buffer")
    | one("attn.masked_bias", "", "buffer"),
    norm=gpt_norms("ln_1"),
    mlp=(ungated(bias=True, up="mlp.fc_in", down="mlp.fc_out"),),
    sizes={**GPT2.sizes, "rotary": ("rotary_dim",)},
    residual_init=(),
    inverse_layer_scale=None,
    query_scale_flag=None,
    rotary="pairs",
)
CODEGEN = replace(
    GPTJ,
    attention=linear("attn.qkv_proj", "(4 (blocked q_dim + blocked v_dim + blocked k_dim)) hidden")
    | linear("attn.out_proj", f"hidden ({ATTENDED})")
    | one("attn.causal_mask", "1 1 positions positions", "buffer"),
    default_sizes={**GPT2.default_sizes, "blocked": (1 / 4, "heads")},
    frozen={"heads": "their queries, values and keys lie in four blocks, each with a quarter of the heads"},
)
BLOOM = replace(
    GPT_NEOX,
    base="transformer.",
    layers="transformer.h.",
    embedding=one("transformer.word_embeddings.weight", "vocab hidden", "embedding")
    | gpt_norms("transformer.word_embeddings_layernorm")
    | one("lm_head.weight", "vocab hidden", "head"),
    final_norm=gpt_norms("transformer.ln_f"),
    attention=linear("self_attention.query_key_value", PER_GROUP, bias=True)
    | linear("self_attention.dense", f"hidden ({ATTENDED})", bias=True),
    mlp=(ungated(bias=True, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),),
    sizes={"vocab": ("vocab_size",), "hidden": ("hidden_size", "n_embed"), "heads": ("n_head", "num_attention_heads")},
    default_sizes={**DERIVED_SIZES, "ffn": (4, "hidden")},
    frozen=ALIBI,
    post_norm_flag="apply_residual_connection_post_layernorm",
    rotary=None,
    hidden_divisible=False,
    parallel_flags={},
)
FALCON = replace(
    BLOOM,
    embedding=one("transformer.word_embeddings.weight", "vocab hidden", "embedding")
    | one("lm_head.weight", "vocab hidden", "head"),
    attention=linear("self_attention.query_key_value", PER_GROUP, bias="bias")
    | linear("self_attention.dense", f"hidden ({ATTENDED})", bias="bias"),
    norm={
        row: replace(value, when=ALL_OR_NONE)
        for row, value in gpt_norms("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp").items()
    },
    mlp=(ungated(bias="bias", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),),
    sizes={
        **HIDDEN_AND_HEADS,
        "heads": ("num_attention_heads", "n_head"),
        "ffn": ("ffn_hidden_size",),
        "kv_heads": ("num_kv_heads", "n_head_kv"),
    },
    frozen={},
    post_norm_flag=None,
    frozen_by={"alibi": SCALED_ALIBI},
    kv_heads_flag="new_decoder_architecture",
    multi_query_flag="multi_query",
    rotary="halves",
    rotary_off_flag="alibi",
    rotary_share=1.0,
    parallel_flags={"parallel_attn": True, "new_decoder_architecture": False},
)
MPT = replace(
    BLOOM,
    layers="transformer.blocks.",
    embedding=one("transformer.wte.weight", "vocab hidden", "embedding")
    | one("lm_head.weight", "vocab hidden", "head"),
    final_norm=norm("transformer.norm_f"),
    attention=linear("attn.Wqkv", f"({QUERY} + {KEY} + {VALUE}) hidden")
    | linear("attn.out_proj", f"hidden ({ATTENDED})"),
    norm=norm("norm_1") | norm("norm_2"),
    mlp=(ungated(up="ffn.up_proj", down="ffn.down_proj"),),
    sizes={
        "vocab": ("vocab_size",),
        "hidden": ("d_model",),
        "heads": ("n_heads",),
        "positions": ("max_seq_len",),
    },
    post_norm_flag=None,
    frozen_by={
        "attn_config.clip_qkv": CLIPPED,
        "attn_config.softmax_scale": {"head_dim": "the config fixes by what attention logits are multiplied"},
    },
)
PERSIMMON = replace(
    GPT_NEOX,
    base="model.",
    layers="model.layers.",
    embedding=EMBEDDING,
    final_norm=gpt_norms("model.final_layernorm"),
    attention=linear("self_attn.query_key_value", PER_GROUP, bias=True)
    | linear("self_attn.dense", f"hidden ({ATTENDED})", bias=True),
    norm=GPT_NEOX.norm
    | norm("self_attn.q_layernorm", "q_dim", shift=True, when="qk_layernorm")
    | norm("self_attn.k_layernorm", "k_dim", shift=True, when="qk_layernorm"),
    hidden_divisible=False,
    rotary_share=0.5,
    parallel_flags={},
)
PHI = replace(
    PERSIMMON,
    embedding=EMBEDDING | one("lm_head.bias", "vocab", "bias"),
    attention=linear("self_attn.q_proj", f"({QUERY}) hidden", bias=True)
    | linear("self_attn.k_proj", f"({KEY}) hidden", bias=True)
    | linear("self_attn.v_proj", f"({VALUE}) hidden", bias=True)
    | linear("self_attn.dense", f"hidden ({ATTENDED})", bias=True),
    norm=gpt_norms("input_layernorm")
    | norm("self_attn.q_layernorm", "q_dim", shift=True, when="qk_layernorm")
    | norm("self_attn.k_layernorm", "k_dim", shift=True, when="qk_layernorm"),
    mlp=(ungated(bias=True, up="mlp.fc1", down="mlp.fc2"),),
    sizes=SIZES,
    square_heads="qk_layernorm",
)
STARCODER2 = replace(
    PHI,
    embedding=EMBEDDING,
    final_norm=gpt_norms("model.norm"),
    attention=attention(bias="use_bias", output_bias="use_bias"),
    norm=gpt_norms("input_layernorm", "post_attention_layernorm"),
    mlp=(ungated(bias="use_bias", up="mlp.c_fc", down="mlp.c_proj"),),
    square_heads=False,
    rotary_share=1.0,
)
STABLELM = replace(
    STARCODER2,
    attention=attention(bias="use_qkv_bias"),
    norm=gpt_norms("input_layernorm")
    | {row: replace(value, when=ALL_OR_NONE) for row, value in gpt_norms("post_attention_layernorm").items()}
    | {
        f"self_attn.{of}_layernorm.norms.{head}.weight": replace(row, when=ALL_OR_NONE)
        for of in ("q", "k")
        for head in range(MOST_HEADS)
        for row in norm("", f"{of}_dim").values()
    },
    mlp=(gated(),),
    sizes=SQUARE_SIZES,
    frozen_by={"qk_layernorm": {"heads": "each head has a norm of its own under the head's number"}},
    rotary_share=0.25,
    parallel_flags={"use_parallel_residual": False},
)

CLASSICS: Mapping[str, Family] = {
    "bloom": BLOOM,
    "codegen": CODEGEN,
    "falcon": FALCON,
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "gpt_neo": GPT_NEO,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "mpt": MPT,
    "opt": OPT,
    "persimmon": PERSIMMON,
    "phi": PHI,
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
}
