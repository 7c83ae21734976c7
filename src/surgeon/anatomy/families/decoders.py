"""Decoders as Llama is: one stack of layers, each with attention and mostly a gated MLP. Data only."""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.families.parts import (
    ATTENDED,
    BRANCH_NORMS,
    CLIPPED,
    DERIVED_SIZES,
    EMBEDDING,
    HEAD_NORMS,
    KEY,
    POST_NORMS,
    PRE_NORMS,
    QUERY,
    SANDWICH_NORMS,
    SIZES,
    VALUE,
    WIDE_NORMS,
    XIELU,
    attention,
    gated,
    gpt_norms,
    started,
    ungated,
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

# Glm fuses gate and up, and rotates half of each head.
GLM = replace(
    PLAIN,
    attention=attention(bias="attention_bias"),
    mlp=(linear("mlp.gate_up_proj", "(ffn + ffn) hidden") | linear("mlp.down_proj", "hidden ffn"),),
    rotary="pairs",
    rotary_share=0.5,
)
GLM4 = replace(
    GLM,
    norm=PRE_NORMS | norm("post_self_attn_layernorm") | norm("post_mlp_layernorm"),
    branch_norms=("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"),
)
HELIUM = replace(PLAIN, attention=attention(bias="attention_bias"), rotary="pairs", square_heads=True)
HUNYUAN = replace(
    PLAIN,
    norm=PRE_NORMS | norm("self_attn.query_layernorm", "q_dim") | norm("self_attn.key_layernorm", "k_dim"),
    mlp=(gated(),),
)
EXAONE4 = replace(PLAIN, attention=attention(), norm=POST_NORMS | HEAD_NORMS, mlp=(gated(),), branch_norms=BRANCH_NORMS)
ARCEE = replace(LLAMA, mlp=(ungated(bias="mlp_bias"),))
APERTUS = replace(
    PLAIN,
    norm=norm("attention_layernorm") | norm("feedforward_layernorm") | HEAD_NORMS,
    mlp=(ungated() | XIELU,),
)
# It adds 1 to its gains, and starts them at 1 all the same.
NEMOTRON = replace(
    PLAIN,
    norm=started(gpt_norms("input_layernorm", "post_attention_layernorm"), gain=1.0),
    final_norm=started(gpt_norms("model.norm"), gain=1.0),
    mlp=(ungated(bias="mlp_bias"),),
    norm_kind="layer",
    init_gain=0.0,
    rotary_share=0.5,
)
# Its norms have no gains: what reads them would have to carry those.
OLMO = replace(
    PLAIN,
    final_norm={},
    norm={},
    mlp=(gated(),),
    norm_kind="layer",
    frozen_by={"clip_qkv": CLIPPED},
)

VAULTGEMMA = replace(GEMMA2, norm=norm("input_layernorm") | norm("pre_feedforward_layernorm"), branch_norms=())
GRANITE_SWA = replace(
    GRANITE,
    attention=attention(bias="attention_bias", output_bias="attention_bias")
    | one("self_attn.sinks", "(kv_heads group)", "logit", start=0.0),
)
JAIS2 = replace(
    LLAMA,
    norm=gpt_norms("input_layernorm", "post_attention_layernorm"),
    final_norm=gpt_norms("model.norm"),
    mlp=(ungated(bias="mlp_bias"),),
    norm_kind="layer",
)

DECODERS: Mapping[str, Family] = {
    "llama": LLAMA,
    "cwm": LLAMA,
    "internlm3": LLAMA,
    "iquestcoder": LLAMA,
    "smollm3": PLAIN,
    "granite": GRANITE,
    "granite_swa": GRANITE_SWA,
    "jais2": JAIS2,
    "vaultgemma": VAULTGEMMA,
    "arcee": ARCEE,
    "apertus": APERTUS,
    "exaone4": EXAONE4,
    "glm": GLM,
    "glm4": GLM4,
    "helium": HELIUM,
    "hunyuan_v1_dense": HUNYUAN,
    "nemotron": NEMOTRON,
    "olmo": OLMO,
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
}
