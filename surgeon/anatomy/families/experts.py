"""Decoders with experts in place of some or all MLPs. Data only."""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.families.decoders import MISTRAL, PLAIN, QWEN3
from surgeon.anatomy.families.parts import (
    attention,
    gated,
)
from surgeon.anatomy.families.table import Family, linear, one

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
    mlp=(gated(), linear("mlp.gate", "experts hidden") | gated("expert_ffn", prefix="mlp.experts.{}.")),
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

EXPERTS: Mapping[str, Family] = {
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
}
