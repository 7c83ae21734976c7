"""One metric, on one model or on two that see the same tokens: read, run, score."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.config import positions_of
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import DataError, MeasureError
from surgeon.evals.choices import log_likelihoods, options_of, picked, read_questions
from surgeon.evals.compare import Scored, estimate, exponential
from surgeon.evals.generation import answer, load_whole
from surgeon.evals.metrics import exact_match, extracted, rouge_l
from surgeon.evals.perplexity import pieces_of, row_losses, streamed, windows
from surgeon.evals.prompts import Prompt, read_prompts
from surgeon.evals.stream import check_same_tokens, digest, read_stream
from surgeon.evals.verdicts import WIN_RATE, Judgement
from surgeon.models.device import compute_dtype
from surgeon.models.loading import load_tokenizer, loadable
from surgeon.models.streaming import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.evals.judge import Case, Judge
    from surgeon.measure.scoring import Meter

ONE_ROW = "one row only: a standard error takes two"
NO_OFFSETS = "the tokenizer does not say where in the text its tokens are, so there are no bits per byte"


@dataclass(frozen=True)
class Run:
    """What each model scored, what makes the figures reproducible, and what was predicted."""

    scored: tuple[Scored, ...]
    setup: dict[str, Any]
    notes: tuple[str, ...] = ()
    predictions: tuple[dict[str, Any], ...] = ()
    judgement: Judgement | None = None


@dataclass(frozen=True)
class Bench:
    """The models and where they run. Their tokenizers are loaded when it is made."""

    sources: Sequence[Source]
    device: str
    meter: "Meter"
    tokenizers: "list[PreTrainedTokenizerBase]" = field(init=False)

    def __post_init__(self) -> None:
        loaded = [load_tokenizer(*loadable(source)) for source in self.sources]
        object.__setattr__(self, "tokenizers", loaded)

    def check_length(self, length: int, what: str, hint: str) -> None:
        """Raises MeasureError where a model has fewer positions than so many tokens take."""
        for source in self.sources:
            most = positions_of(source)
            if most is not None and length > most:
                raise MeasureError(
                    f"{what} {length} tokens, more than the {most} positions of {source.label}", hint=hint
                )

    def check_same(self, ids: Sequence[Sequence[Sequence[int]]]) -> None:
        """Raises MeasureError where the models are given different tokens."""
        flat = [torch.tensor([token for row in rows for token in row]) for rows in ids]
        for other in range(1, len(flat)):
            labels = [self.sources[0].label, self.sources[other].label]
            check_same_tokens(flat[0], flat[other], [self.tokenizers[0], self.tokenizers[other]], labels)

    def setup(self, data: Sequence[str], sha256: str) -> dict[str, Any]:
        """Return what every run says of itself."""
        dtypes = {str(compute_dtype(source, self.device)).removeprefix("torch.") for source in self.sources}
        return {"data": list(data), "sha256": sha256, "device": self.device, "dtype": "/".join(sorted(dtypes))}


def run_perplexity(bench: Bench, data: Sequence[str], *, samples: int, sequence_length: int, stride: int | None) -> Run:
    """Return the loss of a text, its perplexity and bits per byte."""
    shape = {"samples": samples, "sequence_length": sequence_length}
    streams = [read_stream(data, tokenizer, **shape, whole_rows=stride is None) for tokenizer in bench.tokenizers]
    stream = streams[0]
    bench.check_same([[found.tokens.tolist()] for found in streams])
    length = min(sequence_length, len(stream.tokens))
    bench.check_length(
        length,
        "rows have",
        f"Use --sequence-length {min(filter(None, map(positions_of, bench.sources)), default=length)}.",
    )
    found = windows(len(stream.tokens), length, stride)
    pieces = pieces_of(stream.tokens, found)
    sizes = tuple(end - first for _, first, end in found)
    before = None if stream.nbytes is None else [0, *accumulate(stream.nbytes)]
    nbytes = None if before is None else [before[end] - before[first] for _, first, end in found]
    counts = {"tokens": sum(sizes), "rows": len(found)} | ({"bytes": sum(nbytes)} if nbytes else {})
    scored = []
    for model in [streamed(source, bench.device) for source in bench.sources]:
        work = sum(piece.tokens.numel() for piece in pieces)
        sums = torch.cat(row_losses(model, pieces, progress=bench.meter("perplexity", work, model.depth))).tolist()
        loss = estimate(sums, sizes)
        figures = {"perplexity": exponential(loss), "loss": loss}
        if nbytes and sum(nbytes):
            figures["bits_per_byte"] = estimate(sums, nbytes).scaled(1 / math.log(2))
        scored.append(Scored(model.label, figures, counts, {"loss": tuple(sums)}, sizes))
    short = f"the text is shorter than a row: one row of {length} tokens instead of {sequence_length}"
    notes = [short] if length < sequence_length else []
    notes += [ONE_ROW] if len(found) < 2 else []
    notes += [] if nbytes else [NO_OFFSETS]
    setup = bench.setup(data, stream.digest) | {"sequence_length": length, "stride": stride}
    return Run(tuple(scored), setup, tuple(notes))


def run_answers(
    bench: Bench,
    data: Sequence[str],
    *,
    metric: str,
    samples: int | None,
    max_new_tokens: int,
    batch_size: int,
    extract: re.Pattern[str] | None,
    chat: bool,
) -> Run:
    """Return the mean score of answers that are written greedily: "exact-match" or "rouge-l"."""
    read = [read_prompts(data, tokenizer, samples=samples, chat=chat) for tokenizer in bench.tokenizers]
    prompts = read[0]
    bench.check_same([[prompt.ids for prompt in found] for found in read])
    for prompt in prompts:
        if not prompt.ids:
            raise DataError(
                f"{prompt.where} has an empty prompt", hint="A model needs one token at least to go on from."
            )
        bench.check_length(
            len(prompt.ids) + max_new_tokens,
            f"{prompt.where}: its prompt and {max_new_tokens} new tokens take",
            "Use a smaller --max-new-tokens, or leave the record out.",
        )
    references = [prompt.reference if extract is None else _extracted_reference(prompt, extract) for prompt in prompts]
    scored: list[Scored] = []
    notes: list[str] = []
    predictions: list[dict[str, Any]] = [{"prompt": prompt.text, "reference": prompt.reference} for prompt in prompts]
    for source, tokenizer, prefix in zip(bench.sources, bench.tokenizers, ("", "baseline_"), strict=False):
        depth = read_anatomy(spec_of(source)).depth
        count = bench.meter("writing", len(prompts) * max_new_tokens, depth)
        answers, mixed = answer(
            load_whole(source, bench.device),
            tokenizer,
            [prompt.ids for prompt in prompts],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=None if count is None else partial(_count, count, depth),
        )
        if metric == "rouge-l":
            scores = [rouge_l(*pair) for pair in zip(answers, references, strict=True)]
        else:
            said = [found if extract is None else extracted(found, extract) for found in answers]
            scores = [exact_match(*pair) for pair in zip(said, references, strict=True)]
        scored.append(_scored(source.label, {metric.replace("-", "_"): scores}))
        for entry, found, score in zip(predictions, answers, scores, strict=True):
            entry |= {f"{prefix}prediction": found, f"{prefix}score": score}
        if batch_size > 1 and not mixed:
            notes.append(f"padding changes what {source.label} computes, so a batch holds prompts of one length only")
    found_ids = digest([(prompt.ids, prompt.reference) for prompt in prompts])
    pattern = None if extract is None else extract.pattern
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "extract": pattern, "chat": chat}
    return Run(tuple(scored), bench.setup(data, found_ids) | options, tuple(notes), tuple(predictions))


def judge_run(run: Run, judge: "Judge", cases: "Sequence[Case]", bench: Bench, *, batch_size: int) -> Run:
    """Return a run of answers with how often those of either model win, and what the judge said of each record."""
    answers, others = ([entry[f"{prefix}prediction"] for entry in run.predictions] for prefix in ("", "baseline_"))
    found = judge.compare(cases, answers, others, batch_size=batch_size, meter=bench.meter)
    sides = (found.scores, tuple(1 - score for score in found.scores))
    scored = tuple(one.with_outcome(WIN_RATE, scores) for one, scores in zip(run.scored, sides, strict=True))
    told = (entry | verdict.to_dict() for entry, verdict in zip(run.predictions, found.verdicts, strict=True))
    return replace(run, scored=scored, predictions=tuple(told), judgement=found)


def run_choice(bench: Bench, data: Sequence[str], *, samples: int | None) -> Run:
    """Return how often the likeliest choice is the right one, by log-likelihood in all and for each character."""
    questions = read_questions(data, samples=samples)
    given = [[options_of(question, tokenizer) for question in questions] for tokenizer in bench.tokenizers]
    flat = [[option for options in found for option in options] for found in given]
    bench.check_same([[option.ids for option in found] for found in flat])
    for question, options in zip(questions, given[0], strict=True):
        longest = max(len(option.ids) for option in options)
        bench.check_length(longest, f"{question.where}: a question with a choice has", "Leave the record out.")
    ends = [0, *accumulate(len(question.choices) for question in questions)]
    predictions: list[dict[str, Any]] = [
        {"prompt": question.text, "reference": question.choices[question.answer]} for question in questions
    ]
    scored: list[Scored] = []
    models = [streamed(source, bench.device) for source in bench.sources]
    for model, prefix in zip(models, ("", "baseline_"), strict=False):
        work = sum(len(option.ids) for option in flat[0])
        values = log_likelihoods(model, flat[0], progress=bench.meter("choosing", work, model.depth))
        likelihoods = [values[start:stop] for start, stop in pairwise(ends)]
        scores: dict[str, list[float]] = {}
        for name, normalised in (("accuracy", False), ("accuracy_normalised", True)):
            picks = [picked(*pair, normalised=normalised) for pair in zip(questions, likelihoods, strict=True)]
            scores[name] = [float(pick == question.answer) for pick, question in zip(picks, questions, strict=True)]
            if not normalised:
                for entry, question, pick, score in zip(predictions, questions, picks, scores[name], strict=True):
                    entry |= {f"{prefix}prediction": question.choices[pick], f"{prefix}score": score}
        scored.append(_scored(model.label, scores))
    return Run(tuple(scored), bench.setup(data, digest(questions)), (), tuple(predictions))


def _count(progress: Progress, depth: int, tokens: int) -> None:
    progress(tokens * depth)


def _scored(label: str, scores: dict[str, list[float]]) -> Scored:
    figures = {name: estimate(values) for name, values in scores.items()}
    count = len(next(iter(scores.values())))
    return Scored(label, figures, {"records": count}, {name: tuple(values) for name, values in scores.items()})


def _extracted_reference(prompt: Prompt, pattern: re.Pattern[str]) -> str:
    found = extracted(prompt.reference, pattern)
    if found is None:
        raise DataError(
            f"{prompt.where}: nothing in its answer matches {pattern.pattern!r}",
            hint=r"--extract is searched in answers and in predictions; for GSM8K: '#### (-?[\d,]+)'",
        )
    return found
