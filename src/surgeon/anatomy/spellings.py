"""Which config keys can hold a quantity: hidden size, heads, window, norm epsilon and so on. Data only.

Read from the configuration files of transformers 5.23. `spelled` in config.py is the one reader. It looks first at what
a family's own table says, so a family whose table names another key needs no entry here.
"""

from collections.abc import Mapping
from typing import Literal

Quantity = Literal[
    "vocab",
    "hidden",
    "ffn",
    "expert_ffn",
    "heads",
    "kv_heads",
    "head_dim",
    "positions",
    "window",
    "experts",
    "experts_per_token",
    "epsilon",
    "activation",
    "state",
    "attention_chunk",
]

# The usual key first: it is the one that an error tells people to write.
SPELLINGS: Mapping[Quantity, tuple[str, ...]] = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "encoder_ffn_dim"),
    "expert_ffn": ("moe_intermediate_size",),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "positions": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    "window": ("sliding_window", "window_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": (
        "num_experts_per_tok",
        "experts_per_token",
        "num_experts_per_token",
        "moe_top_k",
        "moe_topk",
        "moe_k",
        "top_k_experts",
    ),
    "epsilon": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    "activation": ("hidden_act", "activation_function", "hidden_activation", "activation", "dense_act_fn"),
    # Of layers with a recurrent state or a convolution, where the config does not say which layers those are.
    "state": (
        "state_size",
        "ssm_state_size",
        "mamba_d_state",
        "mamba_state_dim",
        "linear_key_head_dim",
        "attention_hidden_size",
        "lru_width",
        "conv_L_cache",
    ),
    "attention_chunk": ("attention_chunk_size",),
}
