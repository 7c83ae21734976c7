"""The perplexity of a text: its tokens and their bytes, and the losses of a model that streams from its files."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import Source
from surgeon.data.rows import read_rows
from surgeon.errors import MeasureError
from surgeon.evals.compare import Scored, estimate, exponential
from surgeon.evals.evaluation import EvalContext, Evaluation
from surgeon.evals.options import SAMPLES, SEQUENCE_LENGTH, EvaluationOptions
from surgeon.models.device import compute_dtype, groups, row_bytes
from surgeon.models.skeleton import auto_class
from surgeon.models.streaming import Progress, StreamedModel, row_sums
from surgeon.progress import meter, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ONE_ROW = "one row only: a standard error takes two"
NO_OFFSETS = "the tokenizer does not give the offsets of its tokens in the text, so there are no bits per byte"
HARNESS_HINT = "lm-evaluation-harness may be able to run it: --tasks NAME."


def evaluate_perplexity(context: EvalContext, options: EvaluationOptions) -> Evaluation:
    """Return the loss of a text, its perplexity and bits per byte."""
    sequence_length = options.sequence_length or SEQUENCE_LENGTH
    shape = {"samples": options.samples or SAMPLES, "sequence_length": sequence_length}
    whole_rows = options.stride is None
    columns = options.columns
    streams = [
        read_stream(options.data, one, **shape, whole_rows=whole_rows, columns=columns) for one in context.tokenizers
    ]
    stream = streams[0]
    context.check_same([[other.tokens.tolist()] for other in streams])
    length = min(sequence_length, len(stream.tokens))
    context.check_length(
        length,
        "rows have",
        f"Use --sequence-length {min(filter(None, map(positions_of, context.sources)), default=length)}.",
    )
    spans = windows(len(stream.tokens), length, options.stride)
    batches = window_batches(stream.tokens, spans)
    sizes = tuple(end - first for _, first, end in spans)
    before = None if stream.nbytes is None else [0, *accumulate(stream.nbytes)]
    nbytes = None if before is None else [before[end] - before[first] for _, first, end in spans]
    counts = {"tokens": sum(sizes), "rows": len(spans)} | ({"bytes": sum(nbytes)} if nbytes else {})
    scored = []
    for model in [streamed(source, context.device) for source in context.sources]:
        progress = meter("perplexity", sum(batch.tokens.numel() for batch in batches), model.depth)
        sums = torch.cat(row_losses(model, batches, progress=progress)).tolist()
        loss = estimate(sums, sizes)
        figures = {"perplexity": exponential(loss), "loss": loss}
        if nbytes and sum(nbytes):
            figures["bits_per_byte"] = estimate(sums, nbytes).scaled(1 / math.log(2))
        scored.append(Scored(model.label, figures, counts, {"loss": tuple(sums)}, sizes))
    short = f"the text is shorter than a row: one row of {length} tokens instead of {sequence_length}"
    notes = [short] if length < sequence_length else []
    notes += [ONE_ROW] if len(spans) < 2 else []
    notes += [] if nbytes else [NO_OFFSETS]
    notes += stream.notes
    setup = context.setup(options.data, stream.digest, columns) | {"sequence_length": length, "stride": options.stride}
    return Evaluation.of(options.metric, scored, setup, notes)


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Tokens, int64, shape (N,), and the bytes of each, None where the tokenizer has no offsets.

    `digest` is of the tokens and the length of a row; `notes` say what of records was not read.
    """

    tokens: Tensor
    nbytes: tuple[int, ...] | None
    digest: str
    notes: tuple[str, ...]


def read_stream(
    specs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    sequence_length: int,
    whole_rows: bool,
    columns: str | None = None,
) -> TokenStream:
    """Return the first `samples` x `sequence_length` tokens of the texts, or as many as there are.

    They are the tokens of `data.rows.read_rows`; with `whole_rows` a rest that fills no row is dropped.
    Raises DataError for texts that cannot be read.
    """
    shape = {"samples": samples, "sequence_length": sequence_length}
    if not whole_rows:
        shape = {"samples": min(samples, 1), "sequence_length": max(sequence_length, samples * sequence_length)}
    with stage("tokenising"):
        rows = read_rows(specs, tokenizer, **shape, columns=columns)
        tokens = rows.tokens.flatten()
        return TokenStream(tokens, token_bytes(rows.texts, tokenizer, len(tokens)), rows.digest, rows.notes)


def token_bytes(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", count: int) -> tuple[int, ...] | None:
    """Return the number of bytes of text, in UTF-8, that each of the first `count` tokens stands for.

    By the tokenizer's offsets: a token stands for the text from the end of the tokens before it up to its own end. So
    every byte counts once: a character of several tokens with the first of them, space that no token covers with the
    next one, a rest of a text with its last token. The token that joins documents stands for no bytes.
    None where the tokenizer has no offsets.
    """
    if not tokenizer.is_fast:
        return None
    nbytes: list[int] = []
    for index, text in enumerate(texts):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        at = 0
        sizes: list[int] = []
        for _, end in encoded["offset_mapping"]:
            sizes.append(len(text[at:end].encode()))
            at = max(at, end)
        if sizes:
            sizes[-1] += len(text[at:].encode())
        nbytes += [0] * (index > 0) + sizes
        if len(nbytes) >= count:
            break
    return tuple(nbytes[:count])


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """Rows of tokens of one length, shape (R, T). Of each row the tokens `first` to `end` - 1 are predicted.

    `first` is at least 1; both have shape (R,). Tokens from `end` on are padding.
    """

    tokens: Tensor
    first: Tensor
    end: Tensor

    def part(self, start: int, stop: int) -> "WindowBatch":
        return WindowBatch(self.tokens[start:stop], self.first[start:stop], self.end[start:stop])

    @property
    def real(self) -> Tensor | None:
        """Which tokens are not padding, shape (R, T), None where there is no padding."""
        length = self.tokens.shape[1]
        return None if bool((self.end == length).all()) else torch.arange(length) < self.end[:, None]

    @property
    def predicted(self) -> Tensor:
        """Which tokens after the first one of a row are predicted, shape (R, T - 1)."""
        places = torch.arange(1, self.tokens.shape[1])
        return (places >= self.first[:, None]) & (places < self.end[:, None])


def windows(num_tokens: int, length: int, stride: int | None) -> list[tuple[int, int, int]]:
    """Return the windows over a stream of tokens: (start, first predicted, end) of each.

    Without a stride rows of `length` tokens, in which all but the first are predicted; the rest is dropped. With one,
    windows that begin `stride` tokens apart, until the end is reached: each predicts the tokens that no earlier one
    did, so every token of the stream but its first is predicted once, after at least length - stride others, where
    there are as many before it. The last window may be shorter.
    Source: transformers' page "Perplexity of fixed-length models".
    """
    if stride is None:
        return [(at, at + 1, at + length) for at in range(0, num_tokens - length + 1, length)]
    spans, done = [], 1
    for at in range(0, num_tokens, stride):
        end = min(at + length, num_tokens)
        spans.append((at, done, end))
        done = end
        if end == num_tokens:
            break
    return spans


def window_batches(stream: Tensor, spans: Sequence[tuple[int, int, int]]) -> list[WindowBatch]:
    """Return the windows of a stream, shape (N,), in batches: those of full length, which share its memory, and a
    shorter last one.
    """
    lengths = [end - start for start, _, end in spans]
    full = [window for window, length in zip(spans, lengths, strict=True) if length == lengths[0]]
    step = full[1][0] - full[0][0] if len(full) > 1 else 1
    tokens = stream[full[0][0] : full[-1][2]].unfold(0, lengths[0], step)
    places = [_places(full)]
    rows = [tokens]
    if len(full) < len(spans):  # only the last window of all is cut short
        assert len(full) == len(spans) - 1
        rows.append(stream[spans[-1][0] : spans[-1][2]][None])
        places.append(_places(spans[-1:]))
    return [WindowBatch(tokens, *place) for tokens, place in zip(rows, places, strict=True)]


def _places(spans: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    first = torch.tensor([first - start for start, first, _ in spans])
    return first, torch.tensor([end - start for start, _, end in spans])


def streamed(source: Source, device: str) -> StreamedModel:
    """Return a causal model with a head, streamed from its files.

    Raises MeasureError for any other model, before anything is computed.
    """
    if auto_class(source).__name__ == "AutoModelForMaskedLM":
        raise MeasureError(
            f"in {source.label} a token sees those after it, so it cannot predict them",
            hint="A masked language model has a pseudo-perplexity: --metric pseudo-perplexity.",
        )
    try:
        model = StreamedModel(source, device=device, dtype=compute_dtype(source, device))
    except MeasureError as error:
        has_code = source.config.get("auto_map") is not None  # then the error says how it is run
        raise MeasureError(str(error), hint=error.hint if has_code else HARNESS_HINT) from error
    model.check_head()  # now, not after the last layer
    model.check_predicts()
    return model


def row_losses(
    model: StreamedModel, windows: Sequence[WindowBatch], *, progress: Progress | None = None
) -> list[Tensor]:
    """Return for each batch the sums of its rows' losses over the predicted tokens, shape (R,), in nats.

    Computed in the model's dtype up to the logits, then in float32; summed in float64. All batches go through a layer
    before the next one is read, as far as their states fit into memory; a row is never cut.
    Raises MeasureError when a loss is not finite.
    """
    sums = [torch.zeros(len(window.tokens), dtype=torch.float64) for window in windows]
    with torch.no_grad():
        for parts in _passes(windows, 2 * model.hidden_size, model.states_bytes):
            chosen = [windows[i].part(start, stop) for i, start, stop in parts]
            batches = [model.start(part.tokens.contiguous(), part.real) for part in chosen]
            together = list(chain.from_iterable(batches))
            model.run(together, progress=progress)
            with model.finish(together) as head:
                for (i, start, _), part, group in zip(parts, chosen, batches, strict=True):
                    predicted = part.predicted
                    for batch in group:
                        rows = len(batch.tokens)
                        sums[i][start : start + rows] = row_sums(head, batch, batch.hidden, predicted[:rows])
                        predicted, start = predicted[rows:], start + rows
    for losses in sums:
        check_finite(losses, model.label)
    return sums


def check_finite(losses: Tensor, label: str) -> None:
    """Raises MeasureError for losses that are not all numbers."""
    if not bool(losses.isfinite().all()):
        raise MeasureError(
            f"{label} gives a loss that is not finite",
            hint="Its weights may not be finite, or be too large for 16 bits: try --device cpu.",
        )


def _passes(windows: Sequence[WindowBatch], numbers: int, most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield rows (number of the batch, start, stop) whose states, of `numbers` a token, take at most so many bytes."""
    parts: list[tuple[int, int, int]] = []
    used = 0
    for number, window in enumerate(windows):
        each = row_bytes(window.tokens.shape[1], numbers)
        for start, stop in groups(len(window.tokens), each, most):
            nbytes = (stop - start) * each
            if parts and used + nbytes > most:
                yield parts
                parts, used = [], 0
            parts.append((number, start, stop))
            used += nbytes
    if parts:
        yield parts
