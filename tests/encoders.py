"""Tiny checkpoints of encoders and encoder-decoders that have a table: three layers, for test_encoders.py.

Sizes are pairwise distinct as in toys.py. A name is transformers' `model_type`, or `model_type variant`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toys
from toys import BERT, Config

THREE: Config = {"num_hidden_layers": 3}
ROBERTA: Config = BERT | THREE | {"bos_token_id": 0, "pad_token_id": 1}

TYPES: Mapping[str, Config] = {
    "bert": BERT | THREE,
    "bert untied": BERT | THREE | {"tie_word_embeddings": False},
    "roberta": ROBERTA,
    "camembert": ROBERTA,
    "xlm-roberta": ROBERTA,
}


def build64(name: str, directory: Path, **overrides: Any) -> Path:
    """Return `directory`, now holding the toy `name` in float64, its config changed by `overrides`."""
    return toys.save(name.partition(" ")[0], {**TYPES[name], **overrides}, directory, dtype="float64")
