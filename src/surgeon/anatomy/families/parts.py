"""Parts that many families share: attention with grouped keys, gated MLPs, norms, and the usual names of sizes."""

from dataclasses import replace
from math import expm1, log

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


# An activation with numbers of its own (arXiv:2411.13010).
XIELU = (
    one("mlp.act_fn.alpha_p", "1", "scalar", start=log(expm1(0.8)))
    | one("mlp.act_fn.alpha_n", "1", "scalar", start=log(expm1(0.8 - 0.5)))
    | one("mlp.act_fn.beta", "", "scalar", start=0.5)
    | one("mlp.act_fn.eps", "", "scalar", start=-1e-6)
)
CLIPPED = {"head_dim": "queries and keys are clipped, and those of another size would have to be scaled"}
ALIBI = {"heads": "it tells positions by a slope for each head, which the code derives from their number"}

SCALED_ALIBI = dict.fromkeys(
    ("hidden", "heads", "head_dim"),
    "it tells positions by slopes, which the code derives from the number of heads and divides by the size of a head",
)


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


def ungated(*, bias: str | bool = False, up: str = "mlp.up_proj", down: str = "mlp.down_proj") -> Rows:
    """Return the rows of an MLP without a gate."""
    return linear(up, "ffn hidden", bias=bias) | linear(down, "hidden ffn", bias=bias)


def gpt_norms(*names: str) -> Rows:
    """Return the rows of layer norms with a shift."""
    return {row: value for name in names for row, value in norm(name, shift=True).items()}


def started(rows: Rows, *, gain: float) -> Rows:
    """Return rows whose gains, when fresh, have this value."""
    return {name: replace(row, start=gain) if row.kind == "gain" else row for name, row in rows.items()}
