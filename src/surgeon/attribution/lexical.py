"""BM25 over the tokens of rows: the baseline that knows words and no model."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from surgeon.train.store import TokenStore

SATURATION, BY_LENGTH = 1.2, 0.75  # k1 and b


def bm25(
    store: TokenStore, pieces: NDArray[np.int64], queries: TokenStore, groups: Sequence[NDArray[np.int64]]
) -> NDArray[np.float64]:
    """Return the BM25 score of each piece of a store for each group of pieces of `queries`: (pieces, groups).

    The terms of a query are its different tokens; tokens in more than half of the rows count little, and never less
    than nothing.
    Source: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework, section 3.2, with Lucene's positive idf.
    """
    terms = [np.unique(np.concatenate([queries.piece(int(piece))[0] for piece in group])) for group in groups]
    known = np.unique(np.concatenate(terms))
    lengths = store.lengths[pieces].astype(np.float64)
    norm = SATURATION * (1 - BY_LENGTH + BY_LENGTH * lengths / lengths.mean())
    places: list[NDArray[np.int64]] = []
    counted: list[NDArray[np.int64]] = []
    found: Counter[int] = Counter()
    for piece in pieces.tolist():
        ids, counts = np.unique(store.piece(piece)[0], return_counts=True)
        at = np.searchsorted(known, ids)
        is_known = (at < len(known)) & (known[np.minimum(at, len(known) - 1)] == ids)
        places.append(at[is_known])
        counted.append(counts[is_known])
        found.update(at[is_known].tolist())
    idf = np.array([np.log1p((len(pieces) - found[term] + 0.5) / (found[term] + 0.5)) for term in range(len(known))])
    asked = np.stack([np.isin(known, each) for each in terms]).astype(np.float64) * idf  # (groups, known)
    scores = np.zeros((len(pieces), len(groups)))
    for row, (at, counts) in enumerate(zip(places, counted, strict=True)):
        scores[row] = asked[:, at] @ (counts * (SATURATION + 1) / (counts + norm[row]))
    return scores
