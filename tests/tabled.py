"""Tiny checkpoints of the model types that have a table, beside those of toys.py: three layers, for test_tables.py.

Sizes are pairwise distinct as there, and of kinds of layers there is one each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toys
from toys import (
    DERIVED_HEAD_DIM,
    FALCON,
    GPT2_NAMES,
    GRANITE_SCALES,
    ONE_KV_PER_HEAD,
    OWN_HEAD_DIM,
    PARTIAL_ROTARY,
    TOKENS,
    Config,
)

THREE: Config = {"num_hidden_layers": 3}
OWN = OWN_HEAD_DIM | THREE
DERIVED = DERIVED_HEAD_DIM | THREE
SLIDING: Config = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
FOR_96: Config = {"hidden_size": 96}  # where the config insists that heads divide hidden, 12 and 16 of them too
COHERE: Config = DERIVED | {"logit_scale": 0.5, "tie_word_embeddings": True}

DELTA: Config = PARTIAL_ROTARY | {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 18,
    "linear_value_head_dim": 20,
}

EXPERTS: Config = {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True}
LOCAL_EXPERTS: Config = {"num_local_experts": 7, "num_experts_per_tok": 3}
# Nine experts in three groups of three; two groups at a time, of which a token takes two experts in all.
ROUTED: Config = {
    "n_routed_experts": 9,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "moe_intermediate_size": 28,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}
LATENT: Config = ONE_KV_PER_HEAD | THREE | toys.LATENT
GPT2: Config = GPT2_NAMES | {"n_layer": 3}
STABLELM: Config = DERIVED | PARTIAL_ROTARY
THREE_FALCON: Config = FALCON | THREE

TYPES: Mapping[str, Config] = {
    "apertus": OWN | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "arcee": OWN | FOR_96,
    "arcee-biases": OWN | FOR_96 | {"mlp_bias": True, "attention_bias": True},
    "bloom": TOKENS | {"n_layer": 3, "hidden_size": 80, "n_head": 8},
    "codegen": GPT2 | {"rotary_dim": 4},
    "deepseek_v2": LATENT | ROUTED | {"topk_method": "group_limited_greedy"},
    "deepseek_v2-lite": LATENT | ROUTED | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1},
    "deepseek_v3": LATENT | ROUTED,
    "dots1": OWN | ROUTED,
    "ernie4_5_moe": OWN
    | {
        "moe_num_experts": 7,
        "moe_k": 3,
        "moe_intermediate_size": 28,
        "moe_num_shared_experts": 2,
        "use_bias": True,
        "tie_word_embeddings": False,
    },
    "exaone_moe": OWN | SLIDING | ROUTED | {"n_routed_experts": None, "num_experts": 9, "num_shared_experts": 2},
    "flex_olmo": DERIVED | EXPERTS,
    "glm4_moe": OWN | ROUTED | PARTIAL_ROTARY,
    "glm4_moe-qk-norm": OWN | ROUTED | PARTIAL_ROTARY | {"use_qk_norm": True},
    "glm4_moe_lite": LATENT | ROUTED,
    "granitemoe": DERIVED | LOCAL_EXPERTS | GRANITE_SCALES,
    "granitemoeshared": DERIVED | LOCAL_EXPERTS | GRANITE_SCALES | {"shared_intermediate_size": 36},
    "hunyuan_v1_moe": OWN | {"num_experts": 7, "moe_topk": 3},
    "llama4_text": OWN
    | LOCAL_EXPERTS
    | {
        "intermediate_size_mlp": 60,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 3,
        "attention_chunk_size": 5,
    },
    "llama4_text-no-norm": OWN
    | LOCAL_EXPERTS
    | {"intermediate_size_mlp": 60, "interleave_moe_layer_step": 2, "use_qk_norm": False},
    "mellum": OWN | LOCAL_EXPERTS | SLIDING | {"moe_intermediate_size": 28, "mlp_layer_types": ["sparse"] * 3},
    "minimax_m2": OWN | LOCAL_EXPERTS | PARTIAL_ROTARY,
    "olmoe": DERIVED | EXPERTS,
    "phimoe": OWN | LOCAL_EXPERTS | {"attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": DERIVED
    | EXPERTS
    | {"moe_intermediate_size": 28, "shared_expert_intermediate_size": 36, "mlp_only_layers": [1]},
    "qwen3_moe": OWN | EXPERTS | {"moe_intermediate_size": 28, "mlp_only_layers": [1]},
    "granite_swa": DERIVED | GRANITE_SCALES | SLIDING,
    "jais2": DERIVED,
    "vaultgemma": OWN | FOR_96 | {"sliding_window": 5, "query_pre_attn_scalar": 13},
    "youtu": LATENT,
    "qwen3_5_text": OWN
    | DELTA
    | {"rope_parameters": PARTIAL_ROTARY["rope_parameters"] | {"mrope_section": [1, 1, 0], "mrope_interleaved": True}},
    "qwen3_next": OWN
    | DELTA
    | EXPERTS
    | {"moe_intermediate_size": 28, "shared_expert_intermediate_size": 36, "mlp_only_layers": [1]},
    "solar_open": OWN | ROUTED,
    "exaone4": OWN | SLIDING,
    "falcon": THREE_FALCON,
    "falcon-new-decoder": THREE_FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": THREE_FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    "glm": OWN | PARTIAL_ROTARY,
    "glm4": OWN | PARTIAL_ROTARY | {"attention_bias": True},
    "gpt_bigcode": GPT2,
    "gpt_bigcode-multi-head": GPT2 | {"multi_query": False},
    "gpt_neo": TOKENS
    | {
        "num_layers": 2,
        "hidden_size": 80,
        "intermediate_size": 52,
        "num_heads": 8,
        "max_position_embeddings": 64,
        "window_size": 5,
        "attention_types": [[["global", "local"], 1]],
    },
    "gptj": GPT2 | {"rotary_dim": 4},
    "helium": OWN | {"hidden_size": 80},
    "hunyuan_v1_dense": OWN,
    "mpt": TOKENS | {"n_layers": 3, "d_model": 80, "n_heads": 8, "max_seq_len": 64},
    "nemotron": OWN | PARTIAL_ROTARY,
    "olmo": DERIVED,
    "olmo-clipped": DERIVED | {"clip_qkv": 1.5},
    "persimmon": ONE_KV_PER_HEAD | THREE | PARTIAL_ROTARY,
    "phi": DERIVED | PARTIAL_ROTARY,
    "phi-qk-norm": DERIVED | PARTIAL_ROTARY | {"qk_layernorm": True},
    "stablelm": STABLELM | {"use_qkv_bias": True},
    "stablelm-parallel": STABLELM | {"use_parallel_residual": True, "qk_layernorm": True},
    "starcoder2": DERIVED | {"sliding_window": 5},
    "cohere": COHERE,
    "cohere-qk-norm": COHERE | {"use_qk_norm": True},
    "cohere_compass_text": COHERE
    | {"hidden_size": 48, "head_dim": 10}
    | SLIDING
    | {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in set(SLIDING["layer_types"])}},
    "cwm": OWN | SLIDING | FOR_96,
    "ernie4_5": OWN,
    "internlm3": OWN | FOR_96,
    "iquestcoder": OWN | FOR_96,
    "ministral": OWN | SLIDING,
    "ministral3": OWN,  # with its own YaRN
    "olmo3": DERIVED | SLIDING,
    "seed_oss": OWN,
    "seed_oss-biases": OWN | {"attention_out_bias": True, "mlp_bias": True},
}


def build64(name: str, directory: Path, **overrides: Any) -> Path:
    """Return `directory`, now holding the toy `name` in float64, its config changed by `overrides`."""
    return toys.save(name.partition("-")[0], {**TYPES[name], **overrides}, directory, dtype="float64")
