"""Plain decoders: one stack of layers, each with attention and an MLP. Data only."""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.families.parts import (
    ATTENDED,
    BRANCH_NORMS,
    DERIVED_SIZES,
    EMBEDDING,
    HEAD_NORMS,
    HIDDEN_AND_HEADS,
    KEY,
    POST_NORMS,
    PRE_NORMS,
    QUERY,
    SANDWICH_NORMS,
    SIZES,
    VALUE,
    WIDE_NORMS,
    attention,
    gated,
)
from surgeon.anatomy.families.table import Family, linear, norm, one

LLAMA = Family(
    base="model.",
    layers="model.layers.",
    embedding=EMBEDDING,
    final_norm=norm("model.norm"),
    attention=attention(bias="attention_bias", output_bias="attention_bias"),
    norm=PRE_NORMS,
    mlp=(gated(bias="mlp_bias"),),
    sizes=SIZES,
    default_sizes=DERIVED_SIZES,
    hidden_divisible=True,
)
PLAIN = replace(LLAMA, hidden_divisible=False)
GRANITE = replace(PLAIN, fixed_query_scale=True)
MISTRAL = replace(PLAIN, attention=attention(), mlp=(gated(),))
QWEN2 = replace(MISTRAL, attention=attention(bias=True))
QWEN3 = replace(PLAIN, norm=PRE_NORMS | HEAD_NORMS, mlp=(gated(),))
GEMMA = replace(PLAIN, mlp=(gated(),), init_gain=0.0, scales_embedding=True)
GEMMA2 = replace(GEMMA, norm=SANDWICH_NORMS, branch_norms=BRANCH_NORMS, fixed_query_scale=True, hidden_divisible=True)
GEMMA3 = replace(GEMMA2, norm=SANDWICH_NORMS | HEAD_NORMS)
ERNIE4_5 = replace(
    PLAIN,
    attention=attention(bias="use_bias", output_bias="use_bias"),
    mlp=(gated(bias="use_bias"),),
    rotary="pairs",
)
SEED_OSS = replace(PLAIN, attention=attention(bias="attention_bias", output_bias="attention_out_bias"))
OLMO2 = replace(PLAIN, norm=POST_NORMS | WIDE_NORMS, mlp=(gated(),), branch_norms=BRANCH_NORMS)
COHERE2 = replace(PLAIN, norm=norm("input_layernorm"), mlp=(gated(),), norm_kind="layer", rotary="pairs")
# Norms of queries and keys with a gain for each head, over the dims of that head alone.
COHERE = replace(
    COHERE2,
    norm=norm("input_layernorm")
    | norm("self_attn.q_norm", "(kv_heads group) q_dim", when="use_qk_norm")
    | norm("self_attn.k_norm", "kv_heads k_dim", when="use_qk_norm"),
)
COHERE_COMPASS = replace(COHERE2, rotary="halves")

PHI3 = replace(
    PLAIN,
    attention=linear("self_attn.qkv_proj", f"({QUERY} + {KEY} + {VALUE}) hidden")
    | linear("self_attn.o_proj", f"hidden ({ATTENDED})"),
    mlp=(linear("mlp.gate_up_proj", "(ffn + ffn) hidden") | linear("mlp.down_proj", "hidden ffn"),),
)

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

DECODERS: Mapping[str, Family] = {
    "llama": LLAMA,
    "cwm": LLAMA,
    "internlm3": LLAMA,
    "iquestcoder": LLAMA,
    "smollm3": PLAIN,
    "granite": GRANITE,
    "ernie4_5": ERNIE4_5,
    "mistral": MISTRAL,
    "ministral": MISTRAL,
    "ministral3": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "seed_oss": SEED_OSS,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "cohere_compass_text": COHERE_COMPASS,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
}
