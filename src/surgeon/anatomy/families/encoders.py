"""Encoders: one stack whose layers attend both ways, below a masked LM's head, a pooler or a classifier. Data only."""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.families.parts import ATTENDED, DERIVED_SIZES, HIDDEN_AND_HEADS, KEY, QUERY, VALUE
from surgeon.anatomy.families.table import LATER, UNTIED, Family, Rows, linear, norm, one, optional

SIZES = HIDDEN_AND_HEADS | {"types": ("type_vocab_size",)}
OLD_NORMS = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))

CLASSIFIER = linear("classifier", "? hidden", bias=True)
DEEP_CLASSIFIER = linear("classifier.dense", "hidden hidden", bias=True) | linear(
    "classifier.out_proj", "? hidden", bias=True
)
ANSWERS = optional("question answering", linear("qa_outputs", "? hidden", bias=True))
CROSS = "add_cross_attention"


def embeddings(base: str, axis: str = "hidden") -> Rows:
    """Return the rows of BERT's embeddings: words, positions and types of text, summed and normalised."""
    return (
        one(f"{base}embeddings.word_embeddings.weight", f"vocab {axis}", "embedding")
        | one(f"{base}embeddings.position_embeddings.weight", f"positions {axis}", "embedding")
        | one(f"{base}embeddings.token_type_embeddings.weight", f"types {axis}", "embedding")
        | norm(f"{base}embeddings.LayerNorm", axis, shift=True)
        | one(f"{base}embeddings.position_ids", "1 positions", "buffer")
    )


def attended(name: str, when: str | bool = True) -> Rows:
    """Return the rows of one attention of BERT's."""
    rows = (
        linear(f"{name}.self.query", f"({QUERY}) hidden", bias=True)
        | linear(f"{name}.self.key", f"({KEY}) hidden", bias=True)
        | linear(f"{name}.self.value", f"({VALUE}) hidden", bias=True)
        | linear(f"{name}.output.dense", f"hidden ({ATTENDED})", bias=True)
    )
    return rows if when is True else {rest: replace(row, when=str(when)) for rest, row in rows.items()}


def pooler(base: str) -> Rows:
    return optional("pooler", linear(f"{base}pooler.dense", "hidden hidden", bias=True))


BERT = Family(
    base="bert.",
    layers="bert.encoder.layer.",
    embedding=embeddings("bert.")
    | pooler("bert.")
    | optional(
        "masked LM",
        linear("cls.predictions.transform.dense", "hidden hidden", bias=True)
        | one("cls.predictions.bias", "vocab", "bias")
        | one("cls.predictions.decoder.weight", "vocab hidden", "head", when=UNTIED)
        | one("cls.predictions.decoder.bias", "vocab", "bias", when=UNTIED),
    )
    | optional("next sentence", linear("cls.seq_relationship", "? hidden", bias=True))
    | optional("classifier", CLASSIFIER)
    | ANSWERS,
    final_norm=optional("masked LM", norm("cls.predictions.transform.LayerNorm", shift=True)),
    attention=attended("attention") | attended("crossattention", CROSS),
    norm=norm("attention.output.LayerNorm", shift=True)
    | norm("crossattention.output.LayerNorm", shift=True, when=CROSS)
    | norm("output.LayerNorm", shift=True),
    mlp=(linear("intermediate.dense", "ffn hidden", bias=True) | linear("output.dense", "hidden ffn", bias=True),),
    sizes=SIZES,
    default_sizes=DERIVED_SIZES,
    norm_kind="layer",
    norms_after_sum=True,
    rotary=None,
    aliases=OLD_NORMS,
)

ROBERTA = replace(
    BERT,
    base="roberta.",
    layers="roberta.encoder.layer.",
    embedding=embeddings("roberta.")
    | pooler("roberta.")
    | optional(
        "masked LM",
        linear("lm_head.dense", "hidden hidden", bias=True)
        | one("lm_head.bias", "vocab", "bias")
        | one("lm_head.decoder.weight", "vocab hidden", "head", when=UNTIED)
        | one("lm_head.decoder.bias", "vocab", "bias", when=UNTIED),
    )
    | optional("classifier of two layers", DEEP_CLASSIFIER)
    | optional("classifier", CLASSIFIER)
    | ANSWERS,
    final_norm=optional("masked LM", norm("lm_head.layer_norm", shift=True)),
)


ELECTRA = replace(
    BERT,
    base="electra.",
    layers="electra.encoder.layer.",
    embedding=embeddings("electra.", "embed")
    | one("electra.embeddings_project.weight", "hidden embed", "linear", "embed != hidden")
    | one("electra.embeddings_project.bias", "hidden", "bias", "embed != hidden")
    | optional(
        "masked LM",
        linear("generator_predictions.dense", "embed hidden", bias=True)
        | one("generator_lm_head.bias", "vocab", "bias")
        | one("generator_lm_head.weight", "vocab embed", "head", when=UNTIED),
    )
    | optional(
        "discriminator",
        linear("discriminator_predictions.dense", "hidden hidden", bias=True)
        | linear("discriminator_predictions.dense_prediction", "1 hidden", bias=True),
    )
    | optional("classifier of two layers", DEEP_CLASSIFIER)
    | optional("summary", linear("sequence_summary.summary", "hidden hidden", bias=True))
    | optional("classifier", CLASSIFIER)
    | ANSWERS,
    final_norm=optional("masked LM", norm("generator_predictions.LayerNorm", "embed", shift=True)),
    sizes=SIZES | {"embed": ("embedding_size",)},
    default_sizes=DERIVED_SIZES | {"embed": (1, "hidden")},
)

DISTILBERT = replace(
    BERT,
    base="distilbert.",
    layers="distilbert.transformer.layer.",
    embedding={name: row for name, row in embeddings("distilbert.").items() if "token_type" not in name}
    | optional(
        "masked LM",
        linear("vocab_transform", "hidden hidden", bias=True)
        | one("vocab_projector.bias", "vocab", "bias")
        | one("vocab_projector.weight", "vocab hidden", "head", when=UNTIED),
    )
    | optional("layer before a classifier", linear("pre_classifier", "hidden hidden", bias=True))
    | optional("classifier", CLASSIFIER)
    | ANSWERS,
    final_norm=optional("masked LM", norm("vocab_layer_norm", shift=True)),
    attention=linear("attention.q_lin", f"({QUERY}) hidden", bias=True)
    | linear("attention.k_lin", f"({KEY}) hidden", bias=True)
    | linear("attention.v_lin", f"({VALUE}) hidden", bias=True)
    | linear("attention.out_lin", f"hidden ({ATTENDED})", bias=True),
    norm=norm("sa_layer_norm", shift=True) | norm("output_layer_norm", shift=True),
    mlp=(linear("ffn.lin1", "ffn hidden", bias=True) | linear("ffn.lin2", "hidden ffn", bias=True),),
    sizes={
        "vocab": ("vocab_size",),
        "hidden": ("dim",),
        "ffn": ("hidden_dim",),
        "heads": ("n_heads",),
        "positions": ("max_position_embeddings",),
    },
)


def plain_norm(name: str) -> Rows:
    """Return the rows of ModernBERT's layer norms, which have a shift only where the config asks for one."""
    return norm(name) | one(f"{name}.bias", "hidden", "shift", "norm_bias")


MODERNBERT = Family(
    base="model.",
    layers="model.layers.",
    embedding=one("model.embeddings.tok_embeddings.weight", "vocab hidden", "embedding")
    | plain_norm("model.embeddings.norm")
    | plain_norm("model.final_norm")
    | optional("prediction head", linear("head.dense", "hidden hidden", bias="classifier_bias"))
    | optional("masked LM", one("decoder.weight", "vocab hidden", "head", when=UNTIED))
    | optional("masked LM's bias", one("decoder.bias", "vocab", "bias", "decoder_bias"))
    | optional("classifier", CLASSIFIER | one("classifier.weight", "? hidden", "head")),
    final_norm=optional("prediction head", plain_norm("head.norm")),
    attention=linear("attn.Wqkv", f"({QUERY} + {KEY} + {VALUE}) hidden", bias="attention_bias")
    | linear("attn.Wo", f"hidden ({ATTENDED})", bias="attention_bias"),
    norm=norm("attn_norm", when=LATER)
    | optional("shift of later layers", one("attn_norm.bias", "hidden", "shift", "norm_bias"))
    | plain_norm("mlp_norm"),
    mlp=(linear("mlp.Wi", "(ffn + ffn) hidden", bias="mlp_bias") | linear("mlp.Wo", "hidden ffn", bias="mlp_bias"),),
    sizes=HIDDEN_AND_HEADS,
    default_sizes=DERIVED_SIZES,
    norm_kind="layer",
    own_init=True,
)

ENCODERS: Mapping[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "camembert": ROBERTA,
    "xlm-roberta": ROBERTA,
    "electra": ELECTRA,
    "distilbert": DISTILBERT,
    "modernbert": MODERNBERT,
}
