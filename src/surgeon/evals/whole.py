"""The perplexity of documents, each by itself: on the tokens that `surgeon finetune` would train of it."""

import math
from collections.abc import Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from surgeon.anatomy.config import positions_of
from surgeon.data.documents import Reading
from surgeon.data.rows import by_template
from surgeon.errors import DataError
from surgeon.evals.compare import Scored, estimate, exponential
from surgeon.evals.evaluation import EvalContext, Evaluation, sha256_of
from surgeon.evals.options import SEQUENCE_LENGTH, EvaluationOptions
from surgeon.evals.perplexity import ONE_ROW, WindowBatch, row_losses, streamed
from surgeon.progress import meter
from surgeon.train.examples import Example, examples

ROWS = 64  # of a batch: documents of similar length, padded to the longest


def evaluate_documents(context: EvalContext, options: EvaluationOptions) -> Evaluation:
    """Return the loss of documents, and its perplexity: the mean over their trained tokens.

    A document of more than `sequence_length` tokens is cut there. Raises DataError where nothing is predicted.
    """
    most = min([options.sequence_length or SEQUENCE_LENGTH, *filter(None, map(positions_of, context.sources))])
    reading = Reading(options.columns)
    listed = list(islice(chain.from_iterable(map(reading.documents, options.data)), options.samples))
    made = [examples(listed, tokenizer) for tokenizer in context.tokenizers]
    context.check_same([[list(example.ids) for example in one] for one in made])
    cut, spans = _spans(made[0], most)
    if not spans:
        raise DataError(
            f"no document in {', '.join(options.data)} has a token to predict within {most}",
            hint="Give text or records with an answer; a longer --sequence-length reads more of each.",
        )
    sizes = tuple(end - first for _, first, end in spans)
    batches = _batches(spans)
    counts = {"tokens": sum(sizes), "rows": len(spans)}
    scored = []
    for model in [streamed(source, context.device) for source in context.sources]:
        progress = meter("perplexity", sum(batch.tokens.numel() for batch, _ in batches), model.depth)
        losses = row_losses(model, [batch for batch, _ in batches], progress=progress)
        sums = _in_order(losses, [places for _, places in batches])
        loss = estimate(sums, sizes)
        figures = {"perplexity": exponential(loss), "loss": loss}
        scored.append(Scored(model.label, figures, counts, {"loss": tuple(sums)}, sizes))
    notes = [f"{cut} of {len(spans)} documents were cut at {most} tokens"] if cut else []
    notes += [ONE_ROW] if len(spans) < 2 else []
    notes += reading.notes(by_template(context.tokenizers[0]))
    digest = sha256_of([list(ids) for ids, _, _ in spans])
    setup = context.setup(options.data, digest, options.columns) | {
        "sequence_length": most,
        "stride": None,
        "documents": True,
    }
    return Evaluation.of(options.metric, scored, setup, notes)


Span = tuple[Sequence[int], int, int]  # the ids of a document; of those `first` to `end` - 1 are predicted


def _spans(made: Sequence[Example], most: int) -> tuple[int, list[Span]]:
    """Return how many documents are cut at `most` tokens, and the spans of those that have a token to predict.

    Raises DataError for a chat of several answers: what is predicted is no one span.
    """
    spans: list[Span] = []
    cut = 0
    for example in made:
        trained = example.trained[:most]
        first, end = trained.find(1), trained.rfind(1) + 1
        if first < 0:
            continue
        if 0 in trained[first:end]:
            raise DataError("a chat has several answers", hint="Give --documents text, or records with one answer.")
        spans.append((example.ids[:end], first, end))
        cut += len(example.ids) > most
    return cut, spans


def _batches(spans: Sequence[Span]) -> list[tuple[WindowBatch, list[int]]]:
    """Return the documents in batches of similar length, each with their places among all."""
    order = sorted(range(len(spans)), key=lambda place: spans[place][2])
    batches = []
    for at in range(0, len(order), ROWS):
        places = order[at : at + ROWS]
        chosen = [spans[place] for place in places]
        width = chosen[-1][2]
        # Padded with a token of its own: transformers warns of padding tokens, which are masked here anyhow.
        tokens = torch.tensor([[*ids, *[ids[-1]] * (width - end)] for ids, _, end in chosen])
        firsts, ends = (torch.tensor([span[index] for span in chosen]) for index in (1, 2))
        batches.append((WindowBatch(tokens, firsts, ends), places))
    return batches


def _in_order(losses: Sequence[Tensor], places: Sequence[Sequence[int]]) -> list[float]:
    """Return the sum of each document's losses, in the documents' order."""
    sums = [math.nan] * sum(map(len, places))
    for batch, own in zip(losses, places, strict=True):
        for place, value in zip(own, batch.tolist(), strict=True):
            sums[place] = value
    return sums
