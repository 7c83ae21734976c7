"""Encoder-decoders: two stacks of one size, of which the decoder's layers read the encoder's last state. Data only."""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.families.parts import ATTENDED, DERIVED_SIZES, KEY, QUERY, VALUE
from surgeon.anatomy.families.table import FIRST, Family, Layers, Rows, linear, norm, one, optional


def repeated_embeddings(base: str) -> Rows:
    """Return the rows of the embedding where older files have it once more for each stack."""
    rows: Rows = {}
    for stack in ("encoder", "decoder"):
        name = f"{base}{stack}.embed_tokens.weight"
        rows |= optional(f"the {stack}'s embedding", one(name, "vocab hidden", "embedding"))
    return rows


def deep_classifier(name: str) -> Rows:
    """Return the rows of a classifier that stands in the place of the head."""
    rows = linear(f"{name}.dense", "hidden hidden", bias=True) | linear(f"{name}.out_proj", "? hidden", bias=True)
    rows |= one(f"{name}.out_proj.weight", "? hidden", "head")
    return optional("classifier", rows)


# --- T5 ---------------------------------------------------------------------------------------------------------

POSITION_BIAS = "relative_attention_bias.weight"


def t5_attention(name: str) -> Rows:
    return (
        linear(f"{name}.q", f"({QUERY}) hidden")
        | linear(f"{name}.k", f"({KEY}) hidden")
        | linear(f"{name}.v", f"({VALUE}) hidden")
        | linear(f"{name}.o", f"hidden ({ATTENDED})")
    )


def t5_mlps(name: str) -> tuple[Rows, ...]:
    """Return T5's MLP, and that of T5 1.1 with a gate."""
    out = linear(f"{name}.wo", "hidden ffn")
    return (
        linear(f"{name}.wi", "ffn hidden") | out,
        linear(f"{name}.wi_0", "ffn hidden") | linear(f"{name}.wi_1", "ffn hidden") | out,
    )


def t5_positions(when: str | None) -> Rows:
    return one(f"layer.0.SelfAttention.{POSITION_BIAS}", "? (kv_heads group)", "logit", when)


def t5(when: str | None) -> tuple[Rows, Layers]:
    """Return the decoder's attention and the encoder's layers, with the bias of positions in some of them."""
    own = t5_attention("layer.0.SelfAttention") | t5_positions(when)
    unused = one(f"layer.1.EncDecAttention.{POSITION_BIAS}", "? heads", "buffer")
    decoder = own | t5_attention("layer.1.EncDecAttention") | unused
    norms = norm("layer.0.layer_norm") | norm("layer.1.layer_norm")
    return decoder, Layers("encoder.block.", (own,), norms, t5_mlps("layer.1.DenseReluDense"))


T5_ATTENTION, T5_ENCODER = t5(FIRST)
UMT5_ATTENTION, UMT5_ENCODER = t5(None)

T5 = Family(
    base="",
    layers="decoder.block.",
    embedding=one("shared.weight", "vocab hidden", "embedding")
    | repeated_embeddings("")
    | one("lm_head.weight", "vocab hidden", "head")
    | deep_classifier("classification_head"),
    encoder_norm=norm("encoder.final_layer_norm"),
    final_norm=norm("decoder.final_layer_norm"),
    attention=T5_ATTENTION,
    norm=norm("layer.0.layer_norm") | norm("layer.1.layer_norm") | norm("layer.2.layer_norm"),
    mlp=t5_mlps("layer.2.DenseReluDense"),
    encoder=T5_ENCODER,
    sizes={
        "vocab": ("vocab_size",),
        "hidden": ("d_model",),
        "ffn": ("d_ff",),
        "heads": ("num_heads",),
        "head_dim": ("d_kv",),
    },
    default_sizes=DERIVED_SIZES,
    init_std="initializer_factor",
    init_by_inputs=True,
    fixed_query_scale=True,
    rotary=None,
    shares_heads=True,
    scales_head=True,
    head_scale_flags=("scale_decoder_outputs", "tie_word_embeddings"),
)
MT5 = replace(T5, scales_head=False)
UMT5 = replace(T5, attention=UMT5_ATTENTION, encoder=UMT5_ENCODER, shares_heads=False, head_scale_flags=())

# --- BART -------------------------------------------------------------------------------------------------------


def bart_attention(name: str) -> Rows:
    return (
        linear(f"{name}.q_proj", f"({QUERY}) hidden", bias=True)
        | linear(f"{name}.k_proj", f"({KEY}) hidden", bias=True)
        | linear(f"{name}.v_proj", f"({VALUE}) hidden", bias=True)
        | linear(f"{name}.out_proj", f"hidden ({ATTENDED})", bias=True)
    )


BART_NORMS = norm("self_attn_layer_norm", shift=True) | norm("final_layer_norm", shift=True)
BART_MLP = linear("fc1", "ffn hidden", bias=True) | linear("fc2", "hidden ffn", bias=True)


def both(name: str, rows: Rows) -> Rows:
    """Return the rows of a part that both stacks have, called `name` in each."""
    stacks = ("encoder", "decoder")
    return {f"model.{stack}.{name}.{rest}": row for stack in stacks for rest, row in rows.items()}


BART = Family(
    base="model.",
    layers="model.decoder.layers.",
    embedding=one("model.shared.weight", "vocab hidden", "embedding")
    | repeated_embeddings("model.")
    | both("embed_positions", one("weight", "(positions + 2) hidden", "embedding"))
    | both("layernorm_embedding", one("weight", "hidden", "gain") | one("bias", "hidden", "shift"))
    | one("model.encoder.version", "1", "buffer")
    | one("model.decoder.version", "1", "buffer")
    | one("lm_head.weight", "vocab hidden", "head")
    | optional("the head's bias", one("final_logits_bias", "1 vocab", "bias"))
    | deep_classifier("classification_head")
    | optional("question answering", linear("qa_outputs", "? hidden", bias=True)),
    final_norm={},
    attention=bart_attention("self_attn") | bart_attention("encoder_attn"),
    norm=BART_NORMS | norm("encoder_attn_layer_norm", shift=True),
    mlp=(BART_MLP,),
    encoder=Layers("model.encoder.layers.", (bart_attention("self_attn"),), BART_NORMS, (BART_MLP,)),
    sizes={
        "vocab": ("vocab_size",),
        "hidden": ("d_model", "hidden_size"),
        "ffn": ("encoder_ffn_dim", "decoder_ffn_dim"),
        "heads": ("encoder_attention_heads", "decoder_attention_heads", "num_attention_heads"),
        "positions": ("max_position_embeddings",),
    },
    default_sizes=DERIVED_SIZES,
    init_std="init_std",
    norm_kind="layer",
    norms_after_sum=True,
    last_norm="final_layer_norm",
    scales_embedding="scale_embedding",
    rotary=None,
)

LAST_NORMS = norm("model.decoder.layer_norm", shift=True)
EMBEDDING_NORMS = both("layernorm_embedding", one("weight", "hidden", "gain") | one("bias", "hidden", "shift"))
POSITIONS = both("embed_positions", one("weight", "positions hidden", "embedding"))
SINUSOIDS = {"hidden": "its positions are sinusoids that the code makes for the hidden size"}
UNPLACED = {name: row for name, row in BART.embedding.items() if name not in POSITIONS}  # without positions

MBART = replace(
    BART,
    norms_after_sum=False,
    last_norm="",
    encoder_norm=norm("model.encoder.layer_norm", shift=True),
    final_norm=LAST_NORMS,
)
BLENDERBOT = replace(
    MBART,
    embedding={name: row for name, row in (UNPLACED | POSITIONS).items() if name not in EMBEDDING_NORMS},
)
BLENDERBOT_SMALL = replace(BART, embedding=UNPLACED | POSITIONS)
MADE_POSITIONS = both("embed_positions", one("weight", "positions hidden", "buffer"))
PEGASUS = replace(BLENDERBOT, embedding=BLENDERBOT.embedding | MADE_POSITIONS, frozen=SINUSOIDS)
MARIAN = replace(
    BART,
    embedding={name: row for name, row in UNPLACED.items() if name not in EMBEDDING_NORMS} | MADE_POSITIONS,
    frozen=SINUSOIDS,
)

ENCODER_DECODERS: Mapping[str, Family] = {
    "t5": T5,
    "mt5": MT5,
    "umt5": UMT5,
    "bart": BART,
    "mbart": MBART,
    "blenderbot": BLENDERBOT,
    "blenderbot-small": BLENDERBOT_SMALL,
    "pegasus": PEGASUS,
    "marian": MARIAN,
}
