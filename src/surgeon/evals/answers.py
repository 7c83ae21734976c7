"""Generated answers, scored against the references of records: exact match and ROUGE-L, and a judge's verdicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import spec_of
from surgeon.data.documents import Reading
from surgeon.data.records import ANSWER_HINT, Document
from surgeon.data.rows import begin_of_text, by_template, encode, templated
from surgeon.errors import DataError
from surgeon.evals.compare import Scored, estimate
from surgeon.evals.evaluation import EvalContext, Evaluation, sha256_of
from surgeon.evals.generation import answer, load_whole
from surgeon.evals.metrics import exact_match, rouge_l
from surgeon.evals.options import BATCH_SIZE, MAX_NEW_TOKENS, EvaluationOptions
from surgeon.evals.verdicts import WIN_RATE
from surgeon.models.streaming import Progress
from surgeon.progress import meter
from surgeon.train.examples import chat_segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.evals.judge import Case, Judge


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text and as tokens, and the reference answer."""

    where: str
    text: str
    ids: tuple[int, ...]
    reference: str


def evaluate_answers(context: EvalContext, options: EvaluationOptions) -> Evaluation:
    """Return the mean score of greedy answers: "exact-match" or "rouge-l"."""
    length, batch_size = options.max_new_tokens or MAX_NEW_TOKENS, options.batch_size or BATCH_SIZE
    reading = Reading(options.columns)
    records = read_records(options.data, reading, samples=options.samples)
    per_model = [prompts_of(records, tokenizer, chat=options.chat) for tokenizer in context.tokenizers]
    prompts = per_model[0]
    context.check_same([[prompt.ids for prompt in others] for others in per_model])
    _check_prompts(prompts, context, length)
    references = [_reference(prompt, options) for prompt in prompts]
    scored: list[Scored] = []
    notes: list[str] = [*reading.notes(by_template(context.tokenizers[0]))]
    predictions: list[dict[str, Any]] = [{"prompt": prompt.text, "reference": prompt.reference} for prompt in prompts]
    for source, tokenizer, prefix in zip(context.sources, context.tokenizers, ("", "baseline_"), strict=False):
        depth = read_anatomy(spec_of(source)).depth
        count = meter("writing", len(prompts) * length, depth)
        answers, is_mixed = answer(
            load_whole(source, context.device),
            tokenizer,
            [prompt.ids for prompt in prompts],
            max_new_tokens=length,
            batch_size=batch_size,
            progress=partial(_count, count, depth),
        )
        scores = _scores(options.metric, answers, references, options.extractor)
        scored.append(of_records(source.label, {options.metric.replace("-", "_"): scores}))
        for entry, prediction, score in zip(predictions, answers, scores, strict=True):
            entry |= {f"{prefix}prediction": prediction, f"{prefix}score": score}
        if batch_size > 1 and not is_mixed:
            notes.append(f"padding changes the outputs of {source.label}, so a batch holds prompts of one length only")
    sha256 = sha256_of([(prompt.ids, prompt.reference) for prompt in prompts])
    setup = {"max_new_tokens": length, "batch_size": batch_size, "extract": options.extract, "chat": options.chat}
    setup = context.setup(options.data, sha256, options.columns) | setup
    return Evaluation.of(options.metric, scored, setup, notes, predictions)


def with_verdicts(
    evaluation: Evaluation, judge: "Judge", cases: "Sequence[Case]", context: EvalContext, *, batch_size: int
) -> Evaluation:
    """Return an evaluation of answers with a judge's verdicts on each pair of them, and both models' win rates."""
    answers, others = (
        [entry[f"{prefix}prediction"] for entry in evaluation.predictions] for prefix in ("", "baseline_")
    )
    judgement = judge.compare(cases, answers, others, batch_size=batch_size)
    assert evaluation.baseline is not None
    return replace(
        evaluation,
        scored=evaluation.scored.with_outcome(WIN_RATE, judgement.scores),
        baseline=evaluation.baseline.with_outcome(WIN_RATE, tuple(1 - score for score in judgement.scores)),
        predictions=tuple(
            {**entry, **verdict.to_dict()}
            for entry, verdict in zip(evaluation.predictions, judgement.verdicts, strict=True)
        ),
        judgement=judgement,
    )


def of_records(label: str, scores: dict[str, list[float]]) -> Scored:
    """Return a model's scores, by name one for each record."""
    figures = {name: estimate(values) for name, values in scores.items()}
    count = len(next(iter(scores.values())))
    return Scored(label, figures, {"records": count}, {name: tuple(values) for name, values in scores.items()})


def read_records(specs: Sequence[str], reading: Reading, *, samples: int | None) -> list[Document]:
    """Return the first `samples` records, all with None. Raises DataError for what cannot be read."""
    streams = [reading.documents(spec) for spec in specs]  # a wrong name is an error, even where `samples` ends before
    return list(islice(chain(*streams), samples))


def prompts_of(records: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", *, chat: bool) -> list[Prompt]:
    """Return the prompts of records with an answer.

    The prompt is the record's text before its answer: its fields, each with a newline after it; of messages all but the
    last, in the tokenizer's chat template. With `chat` fields become a user's message in the template too.
    An answer that calls tools is compared as the template writes it. Raises DataError for a record without an answer.
    """
    begin = begin_of_text(tokenizer)
    return [_prompt(document, tokenizer, begin, chat) for document in records]


def _prompt(document: Document, tokenizer: "PreTrainedTokenizerBase", begin: list[int], chat: bool) -> Prompt:
    if document.messages:
        *before, last = document.messages
        if last["role"] != "assistant" or not before:
            what = f"is of {last['role']!r}" if last["role"] != "assistant" else "is the only one"
            raise DataError(
                f"{document.where}: the last message {what}, so there is nothing to answer", hint=ANSWER_HINT
            )
        reference = _written(document, tokenizer) if last.get("tool_calls") else last["content"]
    else:
        if len(document.parts) < 2:
            raise DataError(
                f"{document.where} has a text, but no answer to compare a prediction with", hint=ANSWER_HINT
            )
        reference = document.parts[-1]
        before = [{"role": "user", "content": "\n".join(document.parts[:-1])}] if chat else []
    if before:
        text, ids = templated(before, tokenizer, document.where, answer=True, tools=document.tools), []
    else:
        text, ids = "".join(f"{part}\n" for part in document.parts[:-1]), list(begin)
    return Prompt(document.where, text, (*ids, *encode(text, tokenizer)), reference)


def _written(document: Document, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the last answer of a chat as its template writes it, without special tokens, as answers are decoded."""
    *_, last = (segment.text for segment in chat_segments(document, tokenizer) if segment.trained)
    return str(tokenizer.decode(encode(last, tokenizer), skip_special_tokens=True)).strip()


def _check_prompts(prompts: Sequence[Prompt], context: EvalContext, max_new_tokens: int) -> None:
    """Raises DataError for an empty prompt, MeasureError for one that leaves no room for its answer."""
    for prompt in prompts:
        if not prompt.ids:
            raise DataError(
                f"{prompt.where} has an empty prompt", hint="A model needs one token at least to go on from."
            )
        context.check_length(
            len(prompt.ids) + max_new_tokens,
            f"{prompt.where}: its prompt and {max_new_tokens} new tokens take",
            "Use a smaller --max-new-tokens, or leave the record out.",
        )


def _scores(
    metric: str, answers: Sequence[str], references: Sequence[str], extractor: Callable[[str], str | None] | None
) -> list[float]:
    """Return the score of each answer."""
    if metric == "rouge-l":
        return [rouge_l(*pair) for pair in zip(answers, references, strict=True)]
    compared = answers if extractor is None else [extractor(prediction) for prediction in answers]
    return [exact_match(*pair) for pair in zip(compared, references, strict=True)]


def _reference(prompt: Prompt, options: EvaluationOptions) -> str:
    """Return the reference answer, or its part that is compared. Raises DataError where it has none."""
    if options.extractor is None:
        return prompt.reference
    reference = options.extractor(prompt.reference)
    if reference is None:
        raise DataError(
            f"{prompt.where}: nothing in its answer matches {options.extract!r}",
            hint="--extract is searched in answers and in predictions; for GSM8K: --extract number",
        )
    return reference


def _count(progress: Progress, depth: int, tokens: int) -> None:
    progress(tokens * depth)
