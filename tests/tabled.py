"""Tiny checkpoints of the model types that have a table, beside those of toys.py: three layers, for test_tables.py.

Sizes are pairwise distinct as there, and of kinds of layers there is one each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import toys
from toys import DERIVED_HEAD_DIM, OWN_HEAD_DIM, Config

THREE: Config = {"num_hidden_layers": 3}
OWN = OWN_HEAD_DIM | THREE
DERIVED = DERIVED_HEAD_DIM | THREE
SLIDING: Config = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
FOR_96: Config = {"hidden_size": 96}  # where the config insists that heads divide hidden, 12 and 16 of them too
COHERE: Config = DERIVED | {"logit_scale": 0.5, "tie_word_embeddings": True}

TYPES: Mapping[str, Config] = {
    "cohere": COHERE,
    "cohere-qk-norm": COHERE | {"use_qk_norm": True},
    "cohere_compass_text": COHERE
    | {"hidden_size": 48, "head_dim": 10}
    | SLIDING
    | {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in set(SLIDING["layer_types"])}},
    "cwm": OWN | SLIDING | FOR_96,
    "ernie4_5": OWN,
    "internlm3": OWN | FOR_96,
    "iquestcoder": OWN | FOR_96,
    "ministral": OWN | SLIDING,
    "ministral3": OWN,  # with its own YaRN
    "olmo3": DERIVED | SLIDING,
    "seed_oss": OWN,
    "seed_oss-biases": OWN | {"attention_out_bias": True, "mlp_bias": True},
}


def build64(name: str, directory: Path, **overrides: Any) -> Path:
    """Return `directory`, now holding the toy `name` in float64, its config changed by `overrides`."""
    return toys.save(name.partition("-")[0], {**TYPES[name], **overrides}, directory, dtype="float64")
