"""Each family's names of its tensors in the files, and what their axes mean. Data only.

The tables describe checkpoints as transformers writes them, never the modules that it builds from them (Mixtral
saves an expert's three matrices; in memory there are two, fused over the experts). Axes are written in the layout in
which the tensor is stored: "out in" for a linear map, "in out" for GPT-2's Conv1D.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from surgeon.anatomy.axes import Dim, parse

Kind = Literal["linear", "conv1d", "bias", "gain", "shift", "embedding", "head", "logit", "buffer"]


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor's axes and what it does with them.

    `linear` and `conv1d` map one axis to another, `gain` and `shift` are a norm's, `logit` is a parameter added to
    logits (a router's bias, attention sinks), `buffer` is something old files carry and every loader ignores.
    `when` is the config key that decides whether the tensor exists, or two axes that then differ: "embed != hidden".
    """

    axes: tuple[Dim, ...]
    kind: Kind
    when: str | None = None


Rows = dict[str, Row]


@dataclass(frozen=True, slots=True)
class Family:
    """The tensors of a family, grouped by part. Names inside a layer are relative to `layers` and the layer's number.

    `mlp` lists alternatives: a layer has exactly one of them (dense, or experts). In names, "{}" stands for an
    expert's number. `base` is the prefix that checkpoints saved from the headless model lack.
    """

    base: str
    layers: str
    embedding: Rows
    final_norm: Rows
    attention: Rows
    norm: Rows
    mlp: tuple[Rows, ...]
    sizes: Mapping[str, tuple[str, ...]]  # axis: the config keys that may hold its size; the first one counts
    default_sizes: Mapping[str, tuple[int, str]]  # axis: (factor, axis) where no key holds it
    init_std: str = "initializer_range"  # the config key with the standard deviation of fresh weights
    init_gain: float = 1.0  # a fresh norm's stored gain; 0 where the model adds 1
    residual_init: tuple[str, ...] = ()  # fresh weights drawn with std / sqrt(2 * layers)
    inverse_layer_scale: str | None = None  # the config flag with which attention logits are divided by layer + 1
    norm_kind: Literal["rms", "layer"] = "rms"
    branch_norms: tuple[str, ...] = ()  # norms at the end of a branch: all that a layer adds passes through their gains
    pre_norm_flag: str | None = None  # the config key that is false where norms follow the sum instead
    scales_embedding: bool = False  # the model multiplies embeddings by the square root of hidden
    query_scale_flag: str | None = None  # the config key that is false where attention logits are not scaled
    expert_shares_flag: str | None = None  # the config key that is false where experts' weights are shares among all
    fixed_query_scale: bool = False  # logits are not divided by the square root of head_dim but by a key of the config
    rotary: Literal["halves", "pairs"] | None = "halves"  # which dims rotate together: i and i + R/2, or 2i and 2i + 1
    hidden_divisible: bool = False  # the config insists that heads divide hidden, even where head_dim is given


def _linear(name: str, axes: str, *, bias: str | bool = False, kind: Kind = "linear") -> Rows:
    """Return the rows of a linear map; `bias` is whether it has one, or the config key that says so."""
    dims = parse(axes)
    rows = {f"{name}.weight": Row(dims, kind)}
    if bias is not False:
        out = dims[-1:] if kind == "conv1d" else dims[:1]
        rows[f"{name}.bias"] = Row(out, "bias", when=bias if isinstance(bias, str) else None)
    return rows


def _norm(name: str, axes: str = "hidden", *, shift: bool = False) -> Rows:
    """Return the rows of a norm: its gain, and for a layer norm its shift."""
    dims = parse(axes)
    rows = {f"{name}.weight": Row(dims, "gain")}
    return rows | {f"{name}.bias": Row(dims, "shift")} if shift else rows


def _one(name: str, axes: str, kind: Kind, when: str | None = None) -> Rows:
    return {name: Row(parse(axes), kind, when)}


# --- parts that many families share -----------------------------------------------------------------------------

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
# Where head_dim is always hidden / heads, and every head has its own keys and values.
HIDDEN_AND_HEADS = {axis: keys for axis, keys in SIZES.items() if axis not in ("head_dim", "kv_heads")}
DERIVED_SIZES = {"kv_heads": (1, "heads")}  # and head_dim = hidden / heads, everywhere

EMBEDDING = _one("model.embed_tokens.weight", "vocab hidden", "embedding") | _one(
    "lm_head.weight", "vocab hidden", "head"
)
PRE_NORMS = _norm("input_layernorm") | _norm("post_attention_layernorm")
POST_NORMS = _norm("post_attention_layernorm") | _norm("post_feedforward_layernorm")
BRANCH_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
SANDWICH_NORMS = PRE_NORMS | _norm("pre_feedforward_layernorm") | _norm("post_feedforward_layernorm")
HEAD_NORMS = _norm("self_attn.q_norm", "q_dim") | _norm("self_attn.k_norm", "k_dim")
WIDE_NORMS = _norm("self_attn.q_norm", f"({QUERY})") | _norm("self_attn.k_norm", f"({KEY})")


def _attention(*, bias: str | bool = False, output_bias: str | bool = False) -> Rows:
    """Return the rows of attention with separate projections and grouped keys and values."""
    return (
        _linear("self_attn.q_proj", f"({QUERY}) hidden", bias=bias)
        | _linear("self_attn.k_proj", f"({KEY}) hidden", bias=bias)
        | _linear("self_attn.v_proj", f"({VALUE}) hidden", bias=bias)
        | _linear("self_attn.o_proj", f"hidden ({ATTENDED})", bias=output_bias)
        | _one("self_attn.rotary_emb.inv_freq", "rotary", "buffer")
    )


def _gated(ffn: str = "ffn", *, prefix: str = "mlp.", bias: str | bool = False) -> Rows:
    """Return the rows of a gated MLP."""
    return (
        _linear(f"{prefix}gate_proj", f"{ffn} hidden", bias=bias)
        | _linear(f"{prefix}up_proj", f"{ffn} hidden", bias=bias)
        | _linear(f"{prefix}down_proj", f"hidden {ffn}", bias=bias)
    )


# --- the families -----------------------------------------------------------------------------------------------

LLAMA = Family(
    base="model.",
    layers="model.layers.",
    embedding=EMBEDDING,
    final_norm=_norm("model.norm"),
    attention=_attention(bias="attention_bias", output_bias="attention_bias"),
    norm=PRE_NORMS,
    mlp=(_gated(bias="mlp_bias"),),
    sizes=SIZES,
    default_sizes=DERIVED_SIZES,
    hidden_divisible=True,
)
PLAIN = replace(LLAMA, hidden_divisible=False)
GRANITE = replace(PLAIN, fixed_query_scale=True)
MISTRAL = replace(PLAIN, attention=_attention(), mlp=(_gated(),))
QWEN2 = replace(MISTRAL, attention=_attention(bias=True))
QWEN3 = replace(PLAIN, norm=PRE_NORMS | HEAD_NORMS, mlp=(_gated(),))
GEMMA = replace(PLAIN, mlp=(_gated(),), init_gain=0.0, scales_embedding=True)
GEMMA2 = replace(GEMMA, norm=SANDWICH_NORMS, branch_norms=BRANCH_NORMS, fixed_query_scale=True, hidden_divisible=True)
GEMMA3 = replace(GEMMA2, norm=SANDWICH_NORMS | HEAD_NORMS)
OLMO2 = replace(PLAIN, norm=POST_NORMS | WIDE_NORMS, mlp=(_gated(),), branch_norms=BRANCH_NORMS)
COHERE2 = replace(PLAIN, norm=_norm("input_layernorm"), mlp=(_gated(),), norm_kind="layer", rotary="pairs")

PHI3 = replace(
    PLAIN,
    attention=_linear("self_attn.qkv_proj", f"({QUERY} + {KEY} + {VALUE}) hidden")
    | _linear("self_attn.o_proj", f"hidden ({ATTENDED})"),
    mlp=(_linear("mlp.gate_up_proj", "(ffn + ffn) hidden") | _linear("mlp.down_proj", "hidden ffn"),),
)

MIXTRAL = replace(
    MISTRAL,
    mlp=(
        _linear("block_sparse_moe.gate", "experts hidden")
        | _linear("block_sparse_moe.experts.{}.w1", "ffn hidden")
        | _linear("block_sparse_moe.experts.{}.w2", "hidden ffn")
        | _linear("block_sparse_moe.experts.{}.w3", "ffn hidden"),
    ),
)
QWEN3_MOE = replace(
    QWEN3,
    expert_shares_flag="norm_topk_prob",
    mlp=(_gated(), _linear("mlp.gate", "experts hidden") | _gated("expert_ffn", prefix="mlp.experts.{}.")),
)
GPT_OSS = replace(
    PLAIN,
    attention=_attention(bias="attention_bias", output_bias="attention_bias")
    | _one("self_attn.sinks", "(kv_heads group)", "logit"),
    mlp=(
        _one("mlp.router.weight", "experts hidden", "linear")
        | _one("mlp.router.bias", "experts", "logit")
        | _one("mlp.experts.gate_up_proj", "experts hidden (ffn 2)", "conv1d")
        | _one("mlp.experts.gate_up_proj_bias", "experts (ffn 2)", "bias")
        | _one("mlp.experts.down_proj", "experts ffn hidden", "conv1d")
        | _one("mlp.experts.down_proj_bias", "experts hidden", "bias"),
    ),
)

GPT2 = Family(
    base="transformer.",
    layers="transformer.h.",
    embedding=_one("transformer.wte.weight", "vocab hidden", "embedding")
    | _one("transformer.wpe.weight", "positions hidden", "embedding")
    | _one("lm_head.weight", "vocab hidden", "head"),
    final_norm=_norm("transformer.ln_f", shift=True),
    attention=_linear("attn.c_attn", f"hidden ({QUERY} + {KEY} + {VALUE})", bias=True, kind="conv1d")
    | _linear("attn.c_proj", f"({ATTENDED}) hidden", bias=True, kind="conv1d")
    | _one("attn.bias", "1 1 positions positions", "buffer")
    | _one("attn.masked_bias", "", "buffer"),
    norm=_norm("ln_1", shift=True) | _norm("ln_2", shift=True),
    mlp=(
        _linear("mlp.c_fc", "hidden ffn", bias=True, kind="conv1d")
        | _linear("mlp.c_proj", "ffn hidden", bias=True, kind="conv1d"),
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
    embedding=_one("gpt_neox.embed_in.weight", "vocab hidden", "embedding")
    | _one("embed_out.weight", "vocab hidden", "head"),
    final_norm=_norm("gpt_neox.final_layer_norm", shift=True),
    attention=_linear(
        "attention.query_key_value", "(kv_heads (group q_dim + k_dim + v_dim)) hidden", bias="attention_bias"
    )
    | _linear("attention.dense", f"hidden ({ATTENDED})", bias="attention_bias")
    | _one("attention.bias", "1 1 positions positions", "buffer")
    | _one("attention.masked_bias", "", "buffer")
    | _one("attention.rotary_emb.inv_freq", "rotary", "buffer"),
    norm=_norm("input_layernorm", shift=True) | _norm("post_attention_layernorm", shift=True),
    mlp=(
        _linear("mlp.dense_h_to_4h", "ffn hidden", bias=True) | _linear("mlp.dense_4h_to_h", "hidden ffn", bias=True),
    ),
    sizes=HIDDEN_AND_HEADS,
    default_sizes=DERIVED_SIZES,
    norm_kind="layer",
    hidden_divisible=True,
)

OPT = Family(
    base="model.",
    layers="model.decoder.layers.",
    embedding=_one("model.decoder.embed_tokens.weight", "vocab embed", "embedding")
    | _one("model.decoder.embed_positions.weight", "(positions + 2) hidden", "embedding")
    | _one("model.decoder.project_in.weight", "hidden embed", "linear", when="embed != hidden")
    | _one("model.decoder.project_out.weight", "embed hidden", "linear", when="embed != hidden")
    | _one("lm_head.weight", "vocab embed", "head")
    | _one("model.decoder.version", "1", "buffer"),
    final_norm={
        name: replace(row, when="do_layer_norm_before")
        for name, row in _norm("model.decoder.final_layer_norm", shift=True).items()
    },
    attention=_linear("self_attn.q_proj", f"({QUERY}) hidden", bias="enable_bias")
    | _linear("self_attn.k_proj", f"({KEY}) hidden", bias="enable_bias")
    | _linear("self_attn.v_proj", f"({VALUE}) hidden", bias="enable_bias")
    | _linear("self_attn.out_proj", f"hidden ({ATTENDED})", bias="enable_bias"),
    norm=_norm("self_attn_layer_norm", shift=True) | _norm("final_layer_norm", shift=True),
    mlp=(_linear("fc1", "ffn hidden", bias="enable_bias") | _linear("fc2", "hidden ffn", bias="enable_bias"),),
    sizes=HIDDEN_AND_HEADS | {"ffn": ("ffn_dim",), "embed": ("word_embed_proj_dim",)},
    default_sizes={"kv_heads": (1, "heads"), "embed": (1, "hidden")},
    init_std="init_std",
    norm_kind="layer",
    pre_norm_flag="do_layer_norm_before",
    rotary=None,
)

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "smollm3": PLAIN,
    "granite": GRANITE,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "olmo2": OLMO2,
    "cohere2": COHERE2,
    "phi3": PHI3,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
}
