"""Tiny checkpoints of the model types that have a table, beside those of toys.py: three layers, for test_tables.py.

Sizes are pairwise distinct as there, and of kinds of layers there is one each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toys
from toys import DERIVED_HEAD_DIM, FALCON, GPT2_NAMES, ONE_KV_PER_HEAD, OWN_HEAD_DIM, PARTIAL_ROTARY, TOKENS, Config

THREE: Config = {"num_hidden_layers": 3}
OWN = OWN_HEAD_DIM | THREE
DERIVED = DERIVED_HEAD_DIM | THREE
SLIDING: Config = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
FOR_96: Config = {"hidden_size": 96}  # where the config insists that heads divide hidden, 12 and 16 of them too
COHERE: Config = DERIVED | {"logit_scale": 0.5, "tie_word_embeddings": True}

GPT2: Config = GPT2_NAMES | {"n_layer": 3}
STABLELM: Config = DERIVED | PARTIAL_ROTARY
THREE_FALCON: Config = FALCON | THREE

TYPES: Mapping[str, Config] = {
    "apertus": OWN | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "arcee": OWN | FOR_96,
    "arcee-biases": OWN | FOR_96 | {"mlp_bias": True, "attention_bias": True},
    "bloom": TOKENS | {"n_layer": 3, "hidden_size": 80, "n_head": 8},
    "codegen": GPT2 | {"rotary_dim": 4},
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
