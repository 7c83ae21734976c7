"""The next-token losses of rows of tokens, row by row, by a model that streams from its files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgeon.checkpoint.source import Source
from surgeon.errors import MeasureError
from surgeon.models.device import compute_dtype
from surgeon.models.streaming import HEAD_TOKENS, STATES_BYTES, Batch, Progress, StreamedModel, groups

HARNESS_HINT = "lm-evaluation-harness may be able to run it: --tasks NAME."
PROBE = ((0, 0, 0, 0), (0, 0, 0, 1))  # rows of tokens that differ in the last one
SAME = 1e-3  # of the largest state: what rounding may differ by; a token that is seen from before it moves far more


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of tokens of one length, shape (R, T). Of each row the tokens `first` to `end` - 1 are predicted.

    `first` is at least 1; both have shape (R,). What lies behind `end` is padding.
    """

    tokens: Tensor
    first: Tensor
    end: Tensor

    def part(self, start: int, stop: int) -> "Piece":
        return Piece(self.tokens[start:stop], self.first[start:stop], self.end[start:stop])

    @property
    def real(self) -> Tensor | None:
        """Which tokens are no padding, shape (R, T), None where none is."""
        length = self.tokens.shape[1]
        return None if bool((self.end == length).all()) else torch.arange(length) < self.end[:, None]

    @property
    def predicted(self) -> Tensor:
        """Which of the tokens behind the first are predicted, shape (R, T - 1)."""
        places = torch.arange(1, self.tokens.shape[1])
        return (places >= self.first[:, None]) & (places < self.end[:, None])


def windows(num_tokens: int, length: int, stride: int | None) -> list[tuple[int, int, int]]:
    """Return what of a stream is seen, and what of it predicted: (start, first predicted, end) of each window.

    Without a stride rows of `length` tokens, in which all but the first are predicted; the rest is dropped. With one,
    windows that begin `stride` tokens apart, until the end is reached: each predicts what no earlier one did, so every
    token of the stream but its first is predicted once, after at least length - stride others, where there are as many
    before it. The last window may be shorter. Source: transformers' page "Perplexity of fixed-length models".
    """
    if stride is None:
        return [(at, at + 1, at + length) for at in range(0, num_tokens - length + 1, length)]
    found, done = [], 1
    for at in range(0, num_tokens, stride):
        end = min(at + length, num_tokens)
        found.append((at, done, end))
        done = end
        if end == num_tokens:
            break
    return found


def pieces_of(stream: Tensor, found: Sequence[tuple[int, int, int]]) -> list[Piece]:
    """Return the windows of a stream, shape (N,), as pieces: those of full length, which share its memory, and a last
    shorter one.
    """
    lengths = [end - start for start, _, end in found]
    full = [window for window, length in zip(found, lengths, strict=True) if length == lengths[0]]
    step = full[1][0] - full[0][0] if len(full) > 1 else 1
    tokens = stream[full[0][0] : full[-1][2]].unfold(0, lengths[0], step)
    places = [_places(full)]
    rows = [tokens]
    if len(full) < len(found):  # only the last window of all is cut short
        assert len(full) == len(found) - 1
        rows.append(stream[found[-1][0] : found[-1][2]][None])
        places.append(_places(found[-1:]))
    return [Piece(tokens, *place) for tokens, place in zip(rows, places, strict=True)]


def _places(found: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    first = torch.tensor([first - start for start, first, _ in found])
    return first, torch.tensor([end - start for start, _, end in found])


def streamed(source: Source, device: str) -> StreamedModel:
    """Return a model that can be asked what comes next: one with a head, whose tokens do not see those behind them.

    Raises MeasureError for any other, before anything is computed.
    """
    try:
        model = StreamedModel(source, device=device, dtype=compute_dtype(source, device))
    except MeasureError as error:
        raise MeasureError(str(error), hint=HARNESS_HINT) from error
    with model.head():
        pass  # a head without weights is found now, not behind the last layer
    with torch.no_grad():
        batch = model.embed(torch.tensor(PROBE))[0]
        with model.layer(0) as apply:
            check_causal(apply(batch, batch.hidden), source.label)
    return model


def check_causal(states: Tensor, label: str) -> None:
    """Raises MeasureError where a model's states or logits on PROBE, shape (2, 4, ...), tell that tokens see ahead."""
    one, other = states[:, :-1].float()
    if float((one - other).abs().max()) > SAME * float(one.abs().max()):
        raise MeasureError(
            f"in {label} a token sees those behind it, so it predicts none of them",
            hint="What is evaluated here are models that write from left to right (GPT, Llama ...).",
        )


def row_losses(model: StreamedModel, pieces: Sequence[Piece], *, progress: Progress | None = None) -> list[Tensor]:
    """Return for each piece the sum of its rows' losses over the tokens that are predicted, shape (R,), in nats.

    Computed in the model's dtype up to the logits, then in float32; summed in float64. All pieces go through a layer
    before the next one is read, as far as their states fit into memory; a row is never cut.
    Raises MeasureError when a loss is not finite.
    """
    sums = [torch.zeros(len(piece.tokens), dtype=torch.float64) for piece in pieces]
    with torch.no_grad():
        for parts in _passes(pieces, model.hidden_size * 4 * 2):
            chosen = [pieces[i].part(start, stop) for i, start, stop in parts]
            batches = [model.embed(part.tokens.contiguous(), part.real) for part in chosen]
            for index in range(model.depth):
                with model.layer(index) as apply:
                    for batch in (batch for group in batches for batch in group):
                        batch.hidden = apply(batch, batch.hidden)
                        if progress:
                            progress(batch.tokens.numel())
            with model.head() as head:
                for (i, start, _), part, group in zip(parts, chosen, batches, strict=True):
                    predicted = part.predicted
                    for batch in group:
                        rows = len(batch.tokens)
                        sums[i][start : start + rows] = _loss_sums(head, batch, predicted[:rows])
                        predicted, start = predicted[rows:], start + rows
    for piece in sums:
        if not bool(piece.isfinite().all()):
            raise MeasureError(
                f"{model.label} gives a loss that is not finite",
                hint="Its weights may hold numbers that are not, or be too large for 16 bits: try --device cpu.",
            )
    return sums


def _passes(pieces: Sequence[Piece], token_bytes: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield rows (number of the piece, start, stop) whose states fit into memory together."""
    parts: list[tuple[int, int, int]] = []
    used = 0
    for number, piece in enumerate(pieces):
        row_bytes = piece.tokens.shape[1] * token_bytes
        for start, stop in groups(len(piece.tokens), row_bytes, STATES_BYTES):
            nbytes = (stop - start) * row_bytes
            if parts and used + nbytes > STATES_BYTES:
                yield parts
                parts, used = [], 0
            parts.append((number, start, stop))
            used += nbytes
    if parts:
        yield parts


def _loss_sums(head: Callable[[Tensor], Tensor], batch: Batch, predicted: Tensor) -> Tensor:
    """Return the sum of each row's losses, shape (B,), in float64 on the CPU; `predicted` has shape (B, T - 1)."""
    chosen = predicted.to(batch.tokens.device)
    states, targets = batch.hidden[:, :-1][chosen], batch.tokens[:, 1:][chosen]
    size = min(HEAD_TOKENS, batch.tokens.shape[1])  # no more than the model has positions for
    losses = [
        nn.functional.cross_entropy(head(states[at : at + size]).float(), targets[at : at + size], reduction="none")
        for at in range(0, len(states), size)
    ]
    rows = predicted.nonzero()[:, 0]
    return torch.zeros(len(predicted), dtype=torch.float64).index_add_(0, rows, torch.cat(losses).cpu().double())
