"""How much of a text is there once: tokens after runs that occurred before, and documents that are nearly another one.

Two hashings, both in one pass over the text and in memory proportional to it:

- Tokens: a token is repeated where it lies in a run of RUN tokens, or as many as make up CHARACTERS, that occurred
  before. A run is known by a polynomial of its ids modulo 2^64 with an odd base, so that any two are taken for equal by
  chance with a probability near (number of runs)² / 2^65. Such runs find whole copies, copied passages, and copies with
  a word changed here and there.
- Pieces of text (a document, or of a longer one its paragraphs): MinHash (Broder 1997) over runs of WORDS words. The
  share of PERMUTATIONS minima that two pieces have in common estimates the Jaccard index of their sets of runs, with a
  standard error of √(J (1 - J) / PERMUTATIONS). Candidates are pieces that agree in all minima of one band of BAND.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from lzma import LZMACompressor
from typing import TYPE_CHECKING
from zlib import crc32

from surgeon.data.documents import Reading
from surgeon.data.rows import text_of
from surgeon.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

RUN = 13  # tokens: shorter runs recur as figures of speech, longer ones miss copies with changes
CHARACTERS = 50  # those of 13 tokens of an ordinary tokenizer; of a tokenizer of bytes a run has to be longer
WORDS = 5  # words of a run of MinHash
PERMUTATIONS, BAND = 64, 4  # 16 bands of 4: half of the pairs at a Jaccard index of 0.46 are candidates, 99 % at 0.72
NEAR = 0.7  # of their runs two pieces share so many at least, to be near duplicates
FEWEST = 10  # words of a piece that is judged: headings and answers of one word recur in any text
LONG = 4000  # characters; a longer document is judged paragraph by paragraph
PACKED = 1 << 20  # characters that are compressed
TOGETHER = 256  # documents that are tokenised at once
BASE = 0x9E3779B97F4A7C15  # odd, so that powers never vanish modulo 2^64: the golden ratio's bits
PRIME = (1 << 61) - 1
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """What of a text is there once.

    `tokens` are all of it, `unique` those in no run that occurred before. Of `pieces` of text that were judged,
    `copies` are equal to an earlier one, and `near` more are nearly one. `packed` is what xz needs of the first PACKED
    characters, in nats a token: so much a text holds at most, whatever a model knows of it.
    """

    tokens: int
    unique: int
    documents: int
    pieces: int
    copies: int
    near: int
    packed: float

    @property
    def near_share(self) -> float:
        """The share of pieces that an earlier one equals, or nearly does."""
        return (self.copies + self.near) / max(1, self.pieces)


def repetition(
    specs: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, columns: str | None = None
) -> tuple[Repetition, tuple[str, ...]]:
    """Return the repetition of all documents of data arguments, and notes about what of records was not read.

    Raises DataError where there is nothing to read.
    """
    import numpy as np

    reading, runs, signatures = Reading(columns), Runs(), MinHash()
    num_documents = characters = packed_tokens = 0
    packer, packed_bytes = LZMACompressor(), 0
    documents = (document for spec in specs for document in reading.documents(spec))
    while batch := list(islice(documents, TOGETHER)):
        texts = [text_of(document, tokenizer) for document in batch]
        num_documents += len(texts)
        for text, ids in zip(
            texts, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True
        ):
            runs.add(np.asarray(ids, dtype=np.uint64))
            if packed_tokens == 0 or characters < PACKED:
                packed_bytes += len(packer.compress(text[:PACKED].encode()))
                packed_tokens += round(len(ids) * min(1.0, PACKED / max(1, len(text))))
        characters += sum(map(len, texts))
        signatures.add(piece for text in texts for piece in pieces_of(text))
    if not runs.tokens:
        raise DataError(f"no token in {', '.join(specs) or 'no data'}", hint="Give more text with --data.")
    copies, near = signatures.duplicates()
    found = Repetition(
        tokens=runs.tokens,
        unique=runs.unique(max(RUN, round(CHARACTERS * runs.tokens / max(1, characters)))),
        documents=num_documents,
        pieces=signatures.pieces,
        copies=copies,
        near=near,
        packed=8 * (packed_bytes + len(packer.flush())) * math.log(2) / packed_tokens,
    )
    return found, reading.notes()


def pieces_of(text: str) -> Iterator[str]:
    """Yield what of a document is judged: all of it, or the paragraphs of a long one."""
    parts = _PARAGRAPH.split(text) if len(text) > LONG else [text]
    return (part for part in parts if part.strip())


class Runs:
    """Counts the tokens of documents that lie in no run of tokens which occurred before."""

    def __init__(self) -> None:
        self.tokens = 0
        self._documents: list[NDArray[np.uint64]] = []

    def add(self, ids: "NDArray[np.uint64]") -> None:
        """Add the ids of a document, shape (T,)."""
        if len(ids):
            self.tokens += len(ids)
            self._documents.append(ids)

    def unique(self, run: int = RUN) -> int:
        """Return how many tokens are in no run of so many that occurred before; a shorter document is one run."""
        import numpy as np

        hashes = np.concatenate([rolled(ids, min(run, len(ids))) for ids in self._documents])
        is_again = np.ones(len(hashes), dtype=bool)
        is_again[np.unique(hashes, return_index=True)[1]] = False
        at, repeated = 0, 0
        for length in map(len, self._documents):
            count = length - min(run, length) + 1
            again = is_again[at : at + count]
            at += count
            if again.any():  # a token is repeated where a run that holds it is: runs begin at +1 and end at -1
                edges = np.zeros(length + 1, dtype=np.int64)
                edges[:count] += again
                edges[length - count + 1 : length + 1] -= again
                repeated += int((np.cumsum(edges[:length]) > 0).sum())
        return self.tokens - repeated


def rolled(ids: "NDArray[np.uint64]", run: int) -> "NDArray[np.uint64]":
    """Return a hash of every run of so many ids, shape (T,) to (T - run + 1,), equal for equal runs only (nearly)."""
    import numpy as np

    # An id is scrambled first: small ids in a polynomial of low degree would collide less seldom than by chance.
    scrambled = (ids + np.uint64(1)) * np.uint64(BASE)
    scrambled ^= scrambled >> np.uint64(29)
    found = np.zeros(len(ids) - run + 1, dtype=np.uint64)
    for place in range(run):
        found = found * np.uint64(BASE) + scrambled[place : place + len(found)]
    # The length is part of it: a document shorter than a run equals none of another length.
    return found * np.uint64(BASE) + np.uint64(run)


class MinHash:
    """Signatures of pieces of text, and how many of them are copies or near duplicates of earlier ones."""

    def __init__(self) -> None:
        import numpy as np

        generator = np.random.default_rng(0)  # always the same permutations: the same text gives the same figures
        self._factors = generator.integers(1, 1 << 29, size=(PERMUTATIONS, 1), dtype=np.uint64)
        self._offsets = generator.integers(0, PRIME, size=(PERMUTATIONS, 1), dtype=np.uint64)
        self._signatures: list[NDArray[np.uint64]] = []
        self._whole: list[int] = []

    @property
    def pieces(self) -> int:
        """How many pieces were added."""
        return len(self._whole)

    def add(self, pieces: Iterable[str]) -> None:
        """Add pieces of text; one of fewer than FEWEST words is passed over."""
        import numpy as np

        for piece in pieces:
            words = np.array([crc32(word.encode()) for word in piece.split()], dtype=np.uint64)
            if len(words) < FEWEST:
                continue
            runs = np.unique(rolled(words, WORDS) >> np.uint64(32))
            # Products stay below 2^61: a 32-bit hash times a factor below 2^29.
            minima = ((runs * self._factors + self._offsets) % np.uint64(PRIME)).min(1)
            self._signatures.append(minima)
            self._whole.append(hash(tuple(words.tolist())))

    def duplicates(self) -> tuple[int, int]:
        """Return how many pieces equal an earlier one, word for word, and how many more nearly do."""
        import numpy as np

        seen: set[int] = set()
        firsts = []
        for number, whole in enumerate(self._whole):
            if whole not in seen:
                seen.add(whole)
                firsts.append(number)
        if not firsts:
            return 0, 0
        signatures = np.stack([self._signatures[number] for number in firsts])
        is_near = np.zeros(len(firsts), dtype=bool)
        for band in range(0, PERMUTATIONS, BAND):
            buckets: dict[bytes, int] = {}
            for place, key in enumerate(signatures[:, band : band + BAND]):
                first = buckets.setdefault(key.tobytes(), place)
                if first != place and not is_near[place]:
                    is_near[place] = float((signatures[place] == signatures[first]).mean()) >= NEAR
        return len(self._whole) - len(firsts), int(is_near.sum())
