"""Encoders: one stack whose layers attend both ways, below a masked LM's head, a pooler or a classifier. Data only."""

from collections.abc import Mapping
from dataclasses import replace

from surgeon.anatomy.families.parts import ATTENDED, DERIVED_SIZES, HIDDEN_AND_HEADS, KEY, QUERY, VALUE
from surgeon.anatomy.families.table import UNTIED, Family, Rows, linear, norm, one, optional

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

ENCODERS: Mapping[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "camembert": ROBERTA,
    "xlm-roberta": ROBERTA,
}
