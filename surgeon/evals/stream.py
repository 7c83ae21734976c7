"""The text that a perplexity is of: its tokens, and how many bytes of it each of them stands for."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from surgeon.data.documents import documents
from surgeon.data.rows import read_rows, text_of
from surgeon.errors import MeasureError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Stream:
    """Tokens, int64, shape (N,), and the bytes of each, None where the tokenizer does not say; `digest` is of both the
    tokens and the length of a row.
    """

    tokens: "Tensor"
    nbytes: tuple[int, ...] | None
    digest: str
    source: tuple[dict[str, str], ...]


def read_stream(
    specs: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, samples: int, sequence_length: int, whole_rows: bool
) -> Stream:
    """Return the first `samples` x `sequence_length` tokens of the texts, or as many as there are.

    They are the tokens of `data.rows.read_rows`; with `whole_rows` a rest that fills no row is dropped, as there.
    Raises DataError as that does.
    """
    count = samples * sequence_length
    rows = (
        read_rows(specs, tokenizer, samples=samples, sequence_length=sequence_length)
        if whole_rows
        else read_rows(specs, tokenizer, samples=min(samples, 1), sequence_length=max(sequence_length, count))
    )
    tokens = rows.tokens.flatten()
    return Stream(tokens, token_bytes(specs, tokenizer, len(tokens)), rows.digest, rows.source)


def token_bytes(specs: Sequence[str], tokenizer: "PreTrainedTokenizerBase", count: int) -> tuple[int, ...] | None:
    """Return how many bytes of the texts, in UTF-8, each of the first `count` tokens stands for.

    By the tokenizer's offsets: a token stands for the text from the end of what tokens before it stand for up to its
    own end. So every byte counts once: a character of several tokens with the first of them, space that no token
    covers with the next one, a rest of a text with its last token. The token that joins documents stands for none.
    None where the tokenizer has no offsets.
    """
    if not tokenizer.is_fast:
        return None
    found: list[int] = []
    for index, document in enumerate(chain.from_iterable(map(documents, specs))):
        text = text_of(document, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        at = 0
        sizes: list[int] = []
        for _, end in encoded["offset_mapping"]:
            sizes.append(len(text[at:end].encode()))
            at = max(at, end)
        if sizes:
            sizes[-1] += len(text[at:].encode())
        found += [0] * (index > 0) + sizes
        if len(found) >= count:
            break
    return tuple(found[:count])


def check_same_tokens(
    one: "Tensor", other: "Tensor", tokenizers: "Sequence[PreTrainedTokenizerBase]", labels: Sequence[str]
) -> None:
    """Raises MeasureError where two models do not see the same tokens, shape (N,), naming the first that differ."""
    import torch

    if torch.equal(one, other):
        return
    shorter = min(len(one), len(other))
    differs = (one[:shorter] != other[:shorter]).nonzero()
    place = int(differs[0]) if len(differs) else shorter
    told = [
        repr(tokenizer.decode([int(ids[place])])) if place < len(ids) else "none"
        for ids, tokenizer in zip((one, other), tokenizers, strict=True)
    ]
    raise MeasureError(
        f"{labels[0]} and {labels[1]} make different tokens of the text: token {place} is {told[0]} and {told[1]}",
        hint="Only losses on the same tokens can be compared; evaluate each by itself, and compare bits per byte.",
    )


def digest(parts: Sequence[object]) -> str:
    """Return the SHA-256 of what was read, 64 hex digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
