"""Parts that many families share: attention with grouped keys, gated MLPs, norms, and the usual names of sizes."""

from surgeon.anatomy.families.table import Rows, linear, norm, one

QUERY, KEY, VALUE = "kv_heads group q_dim", "kv_heads k_dim", "kv_heads v_dim"
ATTENDED = "kv_heads group v_dim"  # what the heads put out

SIZES = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size",),
    "ffn": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "positions": ("max_position_embeddings",),
    "experts": ("num_local_experts", "num_experts"),
    "expert_ffn": ("moe_intermediate_size",),
}
SQUARE_SIZES = {axis: keys for axis, keys in SIZES.items() if axis != "head_dim"}  # head_dim is always hidden / heads
# And every head has its own keys and values.
HIDDEN_AND_HEADS = {axis: keys for axis, keys in SIZES.items() if axis not in ("head_dim", "kv_heads")}
DERIVED_SIZES = {"kv_heads": (1, "heads")}  # and head_dim = hidden / heads, everywhere

EMBEDDING = one("model.embed_tokens.weight", "vocab hidden", "embedding") | one(
    "lm_head.weight", "vocab hidden", "head"
)
PRE_NORMS = norm("input_layernorm") | norm("post_attention_layernorm")
POST_NORMS = norm("post_attention_layernorm") | norm("post_feedforward_layernorm")
BRANCH_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
SANDWICH_NORMS = PRE_NORMS | norm("pre_feedforward_layernorm") | norm("post_feedforward_layernorm")
HEAD_NORMS = norm("self_attn.q_norm", "q_dim") | norm("self_attn.k_norm", "k_dim")
WIDE_NORMS = norm("self_attn.q_norm", f"({QUERY})") | norm("self_attn.k_norm", f"({KEY})")


def attention(*, bias: str | bool = False, output_bias: str | bool = False) -> Rows:
    """Return the rows of attention with separate projections and grouped keys and values."""
    return (
        linear("self_attn.q_proj", f"({QUERY}) hidden", bias=bias)
        | linear("self_attn.k_proj", f"({KEY}) hidden", bias=bias)
        | linear("self_attn.v_proj", f"({VALUE}) hidden", bias=bias)
        | linear("self_attn.o_proj", f"hidden ({ATTENDED})", bias=output_bias)
        | one("self_attn.rotary_emb.inv_freq", "rotary", "buffer")
    )


def gated(ffn: str = "ffn", *, prefix: str = "mlp.", bias: str | bool = False) -> Rows:
    """Return the rows of a gated MLP."""
    return (
        linear(f"{prefix}gate_proj", f"{ffn} hidden", bias=bias)
        | linear(f"{prefix}up_proj", f"{ffn} hidden", bias=bias)
        | linear(f"{prefix}down_proj", f"hidden {ffn}", bias=bias)
    )
