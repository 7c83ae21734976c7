"""Which tokens a text uses, and how another tokenizer of fewer tokens writes the same text."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from surgeon.data.documents import Reading
from surgeon.data.rows import encode, hashed, text_of
from surgeon.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

TOGETHER = 256  # documents that are tokenised at once
PIECE = 2000  # characters of a text, up to the end of a line, that are compared at once


@dataclass(frozen=True, eq=False)
class Usage:
    """How often texts use each token, int64, shape (ids,), and what they were.

    `source` has {"data": argument, "sha256": of its texts} per argument, hashed as `TokenRows.source` is.
    """

    counts: "NDArray[Any]"
    source: tuple[dict[str, str], ...]

    @property
    def most_used(self) -> list[int]:
        """The tokens that are used, the most used first; of equals the lower id."""
        used = self.counts.nonzero()[0].tolist()
        return sorted(used, key=lambda token: (-int(self.counts[token]), token))


def usage(specs: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, columns: str | None = None) -> Usage:
    """Return how often all documents of data arguments use each token, special tokens spelled out in them included.

    Raises DataError where there is nothing to read.
    """
    import numpy as np

    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    reading, source = Reading(columns), []
    for spec in specs:
        sha256, number = hashlib.sha256(), 0
        documents = reading.documents(spec)
        while batch := list(islice(documents, TOGETHER)):
            for document in batch:
                sha256.update(hashed(document, number))
                number += 1
            texts = [text_of(document, tokenizer) for document in batch]
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(counts))
        source.append({"data": spec, "sha256": sha256.hexdigest()})
    if not counts.any():
        raise DataError(f"no token in {', '.join(specs) or 'no data'}", hint="Give more text with --data.")
    return Usage(counts, tuple(source))


def texts_of(
    specs: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, most: int, columns: str | None = None
) -> Iterator[str]:
    """Yield the texts of data arguments, until so many characters have been: of the last one its begin."""
    reading = Reading(columns)
    for spec in specs:
        for document in reading.documents(spec):
            text = text_of(document, tokenizer)[:most]
            most -= len(text)
            if text:
                yield text
            if most <= 0:
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """A text written by a tokenizer and by the one with fewer tokens, piece by piece.

    `tokens` before and after; `missing` of those before are no more, and spelled by smaller ones, which are `nbytes` of
    the text's `of_bytes` bytes. `singles` are tokens of one byte or for what is unknown, before and after. `changed`
    pieces of `pieces` no longer decode to what they did.
    """

    tokens: tuple[int, int]
    missing: int
    nbytes: int
    of_bytes: int
    singles: tuple[int, int]
    pieces: int
    changed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as `--json` prints them."""
        return {
            "tokens": {"before": self.tokens[0], "after": self.tokens[1]},
            "missing_tokens": self.missing,
            "missing_bytes": self.nbytes,
            "bytes": self.of_bytes,
            "byte_tokens": {"before": self.singles[0], "after": self.singles[1]},
            "pieces": self.pieces,
            "changed_pieces": self.changed,
        }


def round_trip(
    texts: Sequence[str],
    before: "PreTrainedTokenizerBase",
    after: "PreTrainedTokenizerBase",
    numbers: Mapping[int, int],
    spelled: Callable[[int], int | None],
) -> RoundTrip:
    """Return how texts are written by the tokenizer `after`, which has the tokens of `before` under other `numbers`.

    spelled(token) is how many bytes a token of `before` spells, None for what is unknown. Raises DataError where a
    piece of text of which all tokens are kept is not written by them: then the two are not what they should be.
    """
    tokens, singles, missing, nbytes, of_bytes, pieces, changed = [0, 0], [0, 0], 0, 0, 0, 0, 0
    olds = {new: old for old, new in numbers.items()}
    for text in texts:
        for piece in in_pieces(text):
            old, new = encode(piece, before), encode(piece, after)
            gone = [token for token in old if token not in numbers]
            if not gone and new != [numbers[token] for token in old]:
                raise DataError(
                    f"the trimmed tokenizer writes {piece[:40]!r} with other tokens, though all of them are kept",
                    hint="Its merges do not follow from its tokens; the tokenizer cannot be trimmed.",
                )
            for place, ids in enumerate((old, [olds[token] for token in new])):
                tokens[place] += len(ids)
                singles[place] += sum(spelled(token) in (None, 1) for token in ids)
            missing += len(gone)
            nbytes += sum(spelled(token) or 0 for token in gone)
            of_bytes += len(piece.encode())
            pieces += 1
            changed += before.decode(old) != after.decode(new)
    return RoundTrip(
        tokens=(tokens[0], tokens[1]),
        missing=missing,
        nbytes=nbytes,
        of_bytes=of_bytes,
        singles=(singles[0], singles[1]),
        pieces=pieces,
        changed=changed,
    )


def in_pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of about as many characters, each up to the end of a line where there is one."""
    at = 0
    while at < len(text):
        end = text.find("\n", at + PIECE)
        end = len(text) if end < 0 else end + 1
        yield text[at:end]
        at = end
