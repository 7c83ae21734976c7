"""Tiny checkpoints of encoders and encoder-decoders that have a table: three layers, for test_encoders.py.

Sizes are pairwise distinct as in toys.py. A name is transformers' `model_type`, or `model_type variant`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toys
from toys import BERT, T5, TOKENS, Config

THREE: Config = {"num_hidden_layers": 3}
ROBERTA: Config = BERT | THREE | {"bos_token_id": 0, "pad_token_id": 1}
DISTILBERT: Config = TOKENS | {
    "n_layers": 3,
    "dim": 80,
    "hidden_dim": 52,
    "n_heads": 8,
    "max_position_embeddings": 64,
}
T5_SMALL: Config = T5 | {"num_layers": 3, "num_decoder_layers": 3}
BART: Config = TOKENS | {
    "encoder_layers": 3,
    "decoder_layers": 3,
    "d_model": 80,
    "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 52,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "max_position_embeddings": 64,
}

TYPES: Mapping[str, Config] = {
    "bert": BERT | THREE,
    "bert untied": BERT | THREE | {"tie_word_embeddings": False},
    "roberta": ROBERTA,
    "camembert": ROBERTA,
    "xlm-roberta": ROBERTA,
    "electra": BERT | THREE | {"embedding_size": 44},
    "electra square": BERT | THREE | {"embedding_size": 80},
    "distilbert": DISTILBERT,
    "modernbert": BERT | THREE | {"local_attention": 6},
    "t5": T5_SMALL,
    "t5 gated": T5_SMALL | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": T5_SMALL,
    "umt5": T5_SMALL,
    "bart": BART,
    "bart scaled": BART | {"scale_embedding": True},
    "mbart": BART | {"scale_embedding": True},
    "blenderbot": BART | {"scale_embedding": True},
    "blenderbot-small": BART,
    "pegasus": BART,
    "marian": BART | {"decoder_start_token_id": 0},
}


def build64(name: str, directory: Path, **overrides: Any) -> Path:
    """Return `directory`, now holding the toy `name` in float64, its config changed by `overrides`."""
    return toys.save(name.partition(" ")[0], {**TYPES[name], **overrides}, directory, dtype="float64")
