"""The pseudo-perplexity of a masked language model: each token of a text is masked in turn, and predicted.

Source: Salazar et al. 2020 (Masked Language Model Scoring, arXiv:1910.14659), equations 1 and 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import Source
from surgeon.data.rows import read_rows
from surgeon.errors import MeasureError
from surgeon.evals.compare import Scored, estimate, exponential
from surgeon.evals.evaluation import EvalContext, Evaluation
from surgeon.evals.options import EvaluationOptions
from surgeon.evals.perplexity import ONE_ROW, check_finite
from surgeon.measure.scoring import streamed_model
from surgeon.models.device import groups, head_tokens, row_bytes
from surgeon.models.skeleton import auto_class
from surgeon.models.streaming import Progress, StreamedModel
from surgeon.progress import meter, stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES, SEQUENCE_LENGTH = 16, 128  # a row of T tokens is run T times
COST = "each token was masked in turn, so {tokens:,} rows of {width} tokens were read"


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around a text, and the one that masks."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    mask: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", label: str) -> "Frame":
        """Return the frame of a tokenizer. Raises MeasureError where it has no mask."""
        mask = tokenizer.mask_token_id
        if mask is None:
            raise MeasureError(
                f"the tokenizer of {label} has no mask token", hint="Set mask_token in tokenizer_config.json."
            )
        inside = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        first = next(at for at in range(len(whole)) if whole[at : at + len(inside)] == inside)
        return cls(tuple(whole[:first]), tuple(whole[first + len(inside) :]), int(mask))

    def around(self, rows: Tensor) -> Tensor:
        """Return rows, shape (R, T), with the special tokens around each."""
        before, after = (torch.tensor(ids, dtype=torch.long).expand(len(rows), -1) for ids in (self.before, self.after))
        return torch.cat([before, rows, after], 1)


def evaluate_pseudo_perplexity(context: EvalContext, options: EvaluationOptions) -> Evaluation:
    """Return the mean loss of the tokens of a text, each masked alone, and exp of it."""
    for source in context.sources:
        check_masked(source)
    shape = {"samples": options.samples or SAMPLES, "sequence_length": options.sequence_length or SEQUENCE_LENGTH}
    columns = options.columns
    with stage("tokenising"):
        texts = [
            read_rows(options.data, tokenizer, **shape, columns=options.columns) for tokenizer in context.tokenizers
        ]
    context.check_same([text.tokens.tolist() for text in texts])
    labels = [source.label for source in context.sources]
    frames = [Frame.of(tokenizer, label) for tokenizer, label in zip(context.tokenizers, labels, strict=True)]
    context.check_same([[(*frame.before, frame.mask, *frame.after)] for frame in frames])
    rows, frame = texts[0].tokens, frames[0]
    length, width = rows.shape[1], frame.around(rows[:1]).shape[1]
    most = min(filter(None, map(positions_of, context.sources)), default=width)
    context.check_length(width, "rows with special tokens have", f"Use --sequence-length {most - width + length}.")
    sizes, scored = [length] * len(rows), []
    for source in context.sources:
        model = streamed_model(source, context.device, resident=True)
        progress = meter("masking", rows.numel() * width, model.depth)
        sums = masked_losses(model, rows, frame, progress=progress)
        loss = estimate(sums, sizes)
        figures = {"pseudo_perplexity": exponential(loss), "loss": loss}
        counts = {"tokens": rows.numel(), "rows": len(rows)}
        scored.append(Scored(model.label, figures, counts, {"loss": tuple(sums)}, tuple(sizes)))
    notes = [COST.format(tokens=rows.numel(), width=width)]
    notes += [ONE_ROW] if len(rows) < 2 else []
    setup = context.setup(options.data, texts[0].digest, columns) | {"sequence_length": length, "stride": None}
    return Evaluation.of(options.metric, scored, setup, notes)


def check_masked(source: Source) -> None:
    """Raises MeasureError for a model that does not fill in masked tokens."""
    if auto_class(source).__name__ != "AutoModelForMaskedLM":
        raise MeasureError(
            f"{source.label} is no masked language model, by the classes that its config.json names",
            hint="Of a model that writes from left to right: --metric perplexity.",
        )


def masked_losses(model: StreamedModel, rows: Tensor, frame: Frame, *, progress: Progress | None = None) -> list[float]:
    """Return the sum of each row's losses, in nats: of every token, from all others of its row.

    `rows` has shape (R, T). Computed in the model's dtype up to the logits, then in float32; summed in float64.
    """
    model.check_head()
    length, count = rows.shape[1], rows.numel()
    width = frame.around(rows[:1]).shape[1]
    losses: list[Tensor] = []
    with torch.no_grad():
        for start, stop in groups(count, row_bytes(width, 2 * model.hidden_size), model.states_bytes):
            numbers = torch.arange(start, stop)  # of tokens in the text, row by row
            places = numbers % length + len(frame.before)
            masked = frame.around(rows[numbers // length])
            masked[torch.arange(stop - start), places] = frame.mask
            batches = model.start(masked)
            model.run(batches, progress=progress)
            with model.finish(batches) as head:
                sizes = [len(batch.tokens) for batch in batches]
                pairs = zip(batches, torch.split(places, sizes), strict=True)
                states = torch.cat([batch.hidden[torch.arange(len(at)), at.to(model.device)] for batch, at in pairs])
                losses += _losses(head, states, rows.flatten()[start:stop], min(head_tokens(model.device), width))
    sums = torch.cat(losses).view(-1, length).sum(1)
    check_finite(sums, model.label)
    return [float(value) for value in sums]


def _losses(head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the losses of tokens, `size` at a time, in float64 on the CPU, by their states, shape (N, D)."""
    for at in range(0, len(states), size):
        logits = head(states[at : at + size]).float()
        expected = targets[at : at + size].to(logits.device)
        yield nn.functional.cross_entropy(logits, expected, reduction="none").cpu().double()
