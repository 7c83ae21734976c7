"""Tokens that two models share, by whose rows of the embeddings the positions of their hidden states are compared."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.checkpoint.matching import Vocabulary, match
from surgeon.checkpoint.source import Source, content_of
from surgeon.checkpoint.tokenizer_files import TOKENIZER
from surgeon.lineage.maps import AxisMap
from surgeon.lineage.numbers import Array
from surgeon.lineage.roles import Roles
from surgeon.lineage.samples import Samples

TOKENS = 256


@dataclass(frozen=True, eq=False)
class TokenPairs:
    """Ids of the child with those of the candidate, and the map of the whole vocabulary."""

    child: Array
    parent: Array
    map: AxisMap


def same_ids(child: Samples, parent: Samples, own: Roles, other: Roles) -> TokenPairs | None:
    """Return a run of ids that both models have; None where one of them has no table of tokens."""
    one, two = own.table_of_tokens, other.table_of_tokens
    if one is None or two is None:
        return None
    size, old = child.shape(one)[0], parent.shape(two)[0]
    both = min(size, old)
    start = max(0, min(both // 8, both - TOKENS))
    ids = np.arange(start, min(both, start + TOKENS))
    index = np.where(np.arange(size) < old, np.arange(size), -1)
    return TokenPairs(ids, ids, AxisMap(index, old, np.ones(size, np.float32)))


def same_texts(child: Samples, parent: Samples, own: Roles, other: Roles) -> TokenPairs | None:
    """Return tokens that both tokenizers have, by the bytes that they spell; None where one cannot be read."""
    one, two = own.table_of_tokens, other.table_of_tokens
    new, old = _vocabulary(child.source), _vocabulary(parent.source)
    if one is None or two is None or new is None or old is None:
        return None
    size, old_size = child.shape(one)[0], parent.shape(two)[0]
    pairs = match(old, new, {}).old
    index = np.full(size, -1)
    for i, token in pairs.items():
        if i < size and token < old_size:
            index[i] = token
    known = np.flatnonzero(index >= 0)
    if len(known) < 2:
        return None
    known = _close(known, index)
    return TokenPairs(known, index[known], AxisMap(index, old_size, np.ones(size, np.float32)))


def _close(known: Array, index: Array) -> Array:
    """Return shared tokens whose rows lie close together in the candidate too, from the child's first eighth on."""
    starts = np.arange(len(known) // 8, max(len(known) // 8 + 1, len(known) - TOKENS), TOKENS)
    spans = [float(np.ptp(index[known[start : start + TOKENS]])) for start in starts]
    start = int(starts[int(np.argmin(spans))])
    return known[start : start + TOKENS]


def _vocabulary(source: Source) -> Vocabulary | None:
    if TOKENIZER not in source.companions:
        return None
    try:
        parsed: Any = json.loads(content_of(source.fetch(TOKENIZER)))
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, Mapping) or not isinstance(parsed.get("model"), Mapping):
        return None
    return Vocabulary.of(parsed, {})
