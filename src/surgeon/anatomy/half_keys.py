"""Of which half of a layer a config key speaks: its attention, or its MLP. Data only.

A key that is not here may speak of both: it says of a layer made of two others only what it said of both of them.
Read from the configuration and modeling files of transformers 5.23.
"""

from collections.abc import Iterable, Mapping

from surgeon.anatomy.halves import ATTENTION, MLP, Half

_OF_ATTENTION = (
    # lists with an entry for each layer, and what a layer takes from another
    *("layer_types", "attention_layers", "attn_layers", "no_rope_layers", "layer_rope_theta", "indexer_types"),
    *("num_attention_heads_per_layer", "compress_ratios", "sparse_attention_freq", "kv_source_layers"),
    # lists of layer numbers
    *("attn_layer_indices", "full_attn_idxs", "local_layer_ids", "rope_scaling_layers"),
    *("global_attn_indexes", "fullatt_block_indexes", "window_block_indices"),
    # rules without a list of their own
    *("attention_types", "attn_layer_period", "attn_layer_offset"),
    # entries of per_layer_config
    *("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "attention_chunk_size"),
    *("attention_bias", "q_lora_rank", "kv_lora_rank", "rope_theta", "rope_parameters"),
)
_OF_MLP = (
    *("mlp_layer_types", "intermediate_size", "activation_sparsity_pattern", "layers_num_experts"),
    *("mlp_only_layers", "moe_layers"),
    *("decoder_sparse_step", "first_k_dense_replace", "num_dense_layers", "expert_layer_period"),
    *("expert_layer_offset", "interleave_moe_layer_step", "moe_layer_freq"),
    *("moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
    "mlp_bias",
)
HALF_OF_KEY: Mapping[str, Half] = {**dict.fromkeys(_OF_ATTENTION, ATTENTION), **dict.fromkeys(_OF_MLP, MLP)}


def half_of_keys(keys: Iterable[str]) -> Half | None:
    """Return the half that all of these keys speak of; None where they may speak of both."""
    halves = {HALF_OF_KEY.get(key) for key in keys}
    return halves.pop() if len(halves) == 1 else None
