"""Bits per byte of one text, by models whose tokenizers differ: what compares them, since their tokens do not."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from surgeon.checkpoint.source import Source
from surgeon.data.rows import encode
from surgeon.errors import DataError
from surgeon.evals.compare import Estimate, estimate
from surgeon.evals.perplexity import NO_OFFSETS, row_losses, streamed, token_bytes, window_batches, windows
from surgeon.progress import meter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def bits_per_byte(
    source: Source, tokenizer: "PreTrainedTokenizerBase", text: str, *, sequence_length: int, device: str
) -> Estimate:
    """Return the bits per byte of UTF-8 of a text, with the standard error over its rows.

    The text is tokenised whole, without special tokens. In windows of `sequence_length` tokens that overlap by one,
    each token but the first is predicted once, and the bytes of those that are predicted count.

    Raises DataError for less than two tokens, or where the tokenizer has no offsets; MeasureError for a model that has
    no such loss.
    """
    ids = encode(text, tokenizer)
    nbytes = token_bytes([text], tokenizer, len(ids))
    if nbytes is None:
        raise DataError(NO_OFFSETS, hint="Use a model with a tokenizer.json.")
    if len(ids) < 2:
        raise DataError("the text has less than two tokens", hint="Give more text with --eval-data.")
    length = min(sequence_length, len(ids))
    spans = [span for span in windows(len(ids), length, max(1, length - 1)) if span[1] < span[2]]
    batches = window_batches(torch.tensor(ids), spans)
    model = streamed(source, device)
    progress = meter("bits per byte", sum(batch.tokens.numel() for batch in batches), model.depth)
    sums = torch.cat(row_losses(model, batches, progress=progress)).tolist()
    sizes: Sequence[int] = [sum(nbytes[first:end]) for _, first, end in spans]
    return estimate(sums, sizes).scaled(1 / math.log(2))
