"""Decoders with experts in place of some or all MLPs. Data only."""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.families.decoders import ERNIE4_5, GRANITE, HUNYUAN, MISTRAL, OLMO2, PLAIN, QWEN3
from surgeon.anatomy.families.parts import (
    ATTENDED,
    CLIPPED,
    EMBEDDING,
    PRE_NORMS,
    SIZES,
    SQUARE_SIZES,
    WIDE_NORMS,
    attention,
    gated,
    gpt_norms,
)
from surgeon.anatomy.families.table import Family, Rows, linear, norm, one

# A number added to each expert's score before the best are chosen.
CORRECTION = one("mlp.gate.e_score_correction_bias", "experts", "logit", start=0.0)


def experts(ffn: str = "expert_ffn", *, router: str = "mlp.gate", prefix: str = "mlp.experts.{}.") -> Rows:
    """Return the rows of a router and of experts, each with a gated MLP."""
    return linear(router, "experts hidden") | gated(ffn, prefix=prefix)


def shared(*, prefix: str = "mlp.shared_experts.", bias: str | bool = False, when: str = "n_shared_experts") -> Rows:
    """Return the rows of experts that every token takes, stored as one MLP as wide as all of them."""
    rows = gated("(shared expert_ffn)", prefix=prefix, bias=bias)
    return {name: row if row.when else replace(row, when=when) for name, row in rows.items()}


MIXTRAL = replace(
    MISTRAL,
    mlp=(
        linear("block_sparse_moe.gate", "experts hidden")
        | linear("block_sparse_moe.experts.{}.w1", "ffn hidden")
        | linear("block_sparse_moe.experts.{}.w2", "hidden ffn")
        | linear("block_sparse_moe.experts.{}.w3", "ffn hidden"),
    ),
)
QWEN3_MOE = replace(
    QWEN3,
    expert_shares_flag="norm_topk_prob",
    mlp=(gated(), experts()),
)
GPT_OSS = replace(
    PLAIN,
    attention=attention(bias="attention_bias", output_bias="attention_bias")
    | one("self_attn.sinks", "(kv_heads group)", "logit"),
    mlp=(
        one("mlp.router.weight", "experts hidden", "linear")
        | one("mlp.router.bias", "experts", "logit")
        | one("mlp.experts.gate_up_proj", "experts hidden (ffn 2)", "conv1d")
        | one("mlp.experts.gate_up_proj_bias", "experts (ffn 2)", "bias")
        | one("mlp.experts.down_proj", "experts ffn hidden", "conv1d")
        | one("mlp.experts.down_proj_bias", "experts hidden", "bias"),
    ),
)

MELLUM = replace(QWEN3_MOE, mlp=(experts(),))
QWEN2_MOE = replace(
    PLAIN,
    attention=attention(bias="qkv_bias"),
    mlp=(
        gated(),
        experts() | gated("shared_ffn", prefix="mlp.shared_expert.") | linear("mlp.shared_expert_gate", "1 hidden"),
    ),
    sizes={**SIZES, "shared_ffn": ("shared_expert_intermediate_size",)},
    expert_shares_flag="norm_topk_prob",
)
# The norm of its queries is as wide as the hidden state.
OLMOE = replace(
    PLAIN,
    norm=PRE_NORMS | WIDE_NORMS,
    mlp=(experts("ffn"),),
    sizes=SQUARE_SIZES,
    expert_shares_flag="norm_topk_prob",
    frozen_by={"clip_qkv": CLIPPED},
)
FLEX_OLMO = replace(OLMO2, mlp=(experts("ffn"),), expert_shares_flag="norm_topk_prob")
PHIMOE = replace(
    PLAIN,
    embedding=EMBEDDING | one("lm_head.bias", "vocab", "bias", when="lm_head_bias"),
    final_norm=gpt_norms("model.norm"),
    norm=gpt_norms("input_layernorm", "post_attention_layernorm"),
    mlp=MIXTRAL.mlp,
    norm_kind="layer",
)
FUSED_EXPERTS = (
    linear("block_sparse_moe.router.layer", "experts hidden")
    | linear("block_sparse_moe.input_linear", "experts (ffn + ffn) hidden")
    | linear("block_sparse_moe.output_linear", "experts hidden ffn")
)
GRANITEMOE = replace(GRANITE, mlp=(FUSED_EXPERTS,))
GRANITEMOESHARED = replace(
    GRANITEMOE,
    mlp=(
        FUSED_EXPERTS,
        FUSED_EXPERTS
        | linear("shared_mlp.input_linear", "(shared_ffn + shared_ffn) hidden")
        | linear("shared_mlp.output_linear", "hidden shared_ffn"),
    ),
    sizes={**SIZES, "shared_ffn": ("shared_intermediate_size",)},
)
MINIMAX_M2 = replace(
    MISTRAL,
    norm=PRE_NORMS | WIDE_NORMS,
    mlp=(MIXTRAL.mlp[0] | one("block_sparse_moe.e_score_correction_bias", "experts", "logit", start=0.0),),
    sizes={**SIZES, "rotary": ("rotary_dim",)},
)
HUNYUAN_MOE = replace(
    HUNYUAN,
    mlp=(experts("ffn", router="mlp.gate.wg") | gated(prefix="mlp.shared_mlp."),),
)
ROUTED = {
    **SIZES,
    "experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "shared": ("n_shared_experts", "num_shared_experts"),
}
GLM4_MOE = replace(
    PLAIN,
    attention=attention(bias="attention_bias"),
    norm=PRE_NORMS
    | norm("self_attn.q_norm", "q_dim", when="use_qk_norm")
    | norm("self_attn.k_norm", "k_dim", when="use_qk_norm"),
    mlp=(gated(), experts() | CORRECTION | shared()),
    sizes=ROUTED,
    rotary_share=0.5,
    expert_groups="n_group",
)
# All its MLPs are experts, so its config need not say how wide a dense one would be.
SOLAR_OPEN = replace(
    GLM4_MOE,
    norm=PRE_NORMS,
    rotary_share=1.0,
    default_sizes={**GLM4_MOE.default_sizes, "ffn": (1, "expert_ffn")},
)
DOTS1 = replace(QWEN3, mlp=GLM4_MOE.mlp, sizes=ROUTED, expert_groups="n_group")
EXAONE_MOE = replace(
    QWEN3,
    attention=attention(),
    mlp=(
        gated(),
        experts()
        | one("mlp.e_score_correction_bias", "experts", "logit", start=0.0)
        | shared(when="num_shared_experts"),
    ),
    sizes={**ROUTED, "experts": ("num_experts",)},
    expert_groups="n_group",
)
ERNIE4_5_MOE = replace(
    ERNIE4_5,
    embedding=EMBEDDING | one("lm_head.bias", "vocab", "bias", when="use_bias"),
    mlp=(
        gated(bias="use_bias"),
        experts()
        | one("mlp.moe_statics.e_score_correction_bias", "1 experts", "logit", start=0.0)
        | shared(bias="use_bias", when="moe_num_shared_experts"),
    ),
    sizes={**SIZES, "experts": ("moe_num_experts", "num_experts"), "shared": ("moe_num_shared_experts",)},
)
LLAMA4 = replace(
    PLAIN,
    attention=attention(bias="attention_bias", output_bias="attention_bias"),
    mlp=(
        gated(prefix="feed_forward."),
        linear("feed_forward.router", "experts hidden")
        | one("feed_forward.experts.gate_up_proj", "experts hidden (expert_ffn + expert_ffn)", "conv1d")
        | one("feed_forward.experts.down_proj", "experts expert_ffn hidden", "conv1d")
        | gated("expert_ffn", prefix="feed_forward.shared_expert."),
    ),
    sizes={**SIZES, "ffn": ("intermediate_size_mlp",), "expert_ffn": ("intermediate_size",)},
    rotary="pairs",
    frozen_by={"use_qk_norm": {"head_dim": "it normalises queries and keys without gains, which would have to change"}},
)

# Queries, and keys with values, go through narrow states of their own rank; a part of each query and one part of all
# keys together rotate. The lighter models have no narrow state for queries.
LATENT = (
    linear("self_attn.kv_a_proj_with_mqa", "(kv_rank + rope) hidden", bias="attention_bias")
    | norm("self_attn.kv_a_layernorm", "kv_rank")
    | linear("self_attn.kv_b_proj", "(kv_heads (nope + v_dim)) kv_rank")
    | linear("self_attn.o_proj", f"hidden ({ATTENDED})", bias="attention_bias")
)
LATENT_QUERIES = (
    linear("self_attn.q_a_proj", "q_rank hidden", bias="attention_bias")
    | norm("self_attn.q_a_layernorm", "q_rank")
    | linear("self_attn.q_b_proj", "(kv_heads group (nope + rope)) q_rank")
)
DEEPSEEK_V3 = replace(
    PLAIN,
    attention=LATENT | linear("self_attn.q_proj", "(kv_heads group (nope + rope)) hidden"),
    mixers=(LATENT | LATENT_QUERIES,),
    mlp=GLM4_MOE.mlp,
    sizes={
        **ROUTED,
        "head_dim": ("v_head_dim",),
        "nope": ("qk_nope_head_dim",),
        "rope": ("qk_rope_head_dim",),
        "q_rank": ("q_lora_rank",),
        "kv_rank": ("kv_lora_rank",),
    },
    kv_heads_flag=False,
    expert_groups="n_group",
    frozen={"head_dim": "its heads have four sizes, of values and of the parts of queries and keys"},
)
YOUTU = replace(DEEPSEEK_V3, mlp=(gated(),), expert_groups=None, embedding_std="embedding_initializer_range")
DEEPSEEK_V2 = replace(
    DEEPSEEK_V3, mlp=(gated(bias="mlp_bias"), experts() | shared(bias="mlp_bias")), expert_shares=True
)

EXPERTS: Mapping[str, Family] = {
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "dots1": DOTS1,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "exaone_moe": EXAONE_MOE,
    "flex_olmo": FLEX_OLMO,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": DEEPSEEK_V3,
    "granitemoe": GRANITEMOE,
    "granitemoeshared": GRANITEMOESHARED,
    "hunyuan_v1_moe": HUNYUAN_MOE,
    "llama4_text": LLAMA4,
    "mellum": MELLUM,
    "minimax_m2": MINIMAX_M2,
    "olmoe": OLMOE,
    "phimoe": PHIMOE,
    "qwen2_moe": QWEN2_MOE,
    "solar_open": SOLAR_OPEN,
    "youtu": YOUTU,
}
