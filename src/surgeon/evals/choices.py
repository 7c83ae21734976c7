"""Multiple choice: how often the likeliest of several continuations of a question is the right one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.data.chats import checked_text
from surgeon.data.documents import RecordForm, records
from surgeon.data.records import CHOICES, chosen_columns
from surgeon.data.rows import begin_of_text, encode
from surgeon.errors import DataError
from surgeon.evals.answers import of_records
from surgeon.evals.compare import Scored
from surgeon.evals.evaluation import EvalContext, Evaluation, sha256_of
from surgeon.evals.options import EvaluationOptions
from surgeon.evals.perplexity import WindowBatch, row_losses, streamed
from surgeon.models.streaming import Progress, StreamedModel
from surgeon.progress import meter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM_HINT = 'Write a record so: {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'
FORM = RecordForm(CHOICES, "questions with choices", "questions", FORM_HINT)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its choices, and the index of the right one."""

    where: str
    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class ChoiceTokens:
    """The tokens of a question with one of its choices; those from `first` on are the choice's."""

    ids: tuple[int, ...]
    first: int


def evaluate_choices(context: EvalContext, options: EvaluationOptions) -> Evaluation:
    """Return how often the likeliest choice is the right one, by log-likelihood as a whole and per character."""
    questions = read_questions(options.data, samples=options.samples, columns=options.columns)
    tokens = [[options_of(question, tokenizer) for question in questions] for tokenizer in context.tokenizers]
    flat = [list(chain.from_iterable(per_question)) for per_question in tokens]
    context.check_same([[option.ids for option in per_model] for per_model in flat])
    for question, choices in zip(questions, tokens[0], strict=True):
        longest = max(len(option.ids) for option in choices)
        context.check_length(longest, f"{question.where}: a question with a choice has", "Leave the record out.")
    predictions: list[dict[str, Any]] = [
        {"prompt": question.text, "reference": question.choices[question.answer]} for question in questions
    ]
    ends = [0, *accumulate(len(question.choices) for question in questions)]
    scored: list[Scored] = []
    models = [streamed(source, context.device) for source in context.sources]
    for model, prefix in zip(models, ("", "baseline_"), strict=False):
        work = sum(len(option.ids) for option in flat[0])
        values = log_likelihoods(model, flat[0], progress=meter("choosing", work, model.depth))
        likelihoods = [values[start:stop] for start, stop in pairwise(ends)]
        scores: dict[str, list[float]] = {}
        for name, normalised in (("accuracy", False), ("accuracy_normalised", True)):
            picks = [picked(*pair, normalised=normalised) for pair in zip(questions, likelihoods, strict=True)]
            scores[name] = [float(pick == question.answer) for pick, question in zip(picks, questions, strict=True)]
            if not normalised:
                for entry, question, pick, score in zip(predictions, questions, picks, scores[name], strict=True):
                    entry |= {f"{prefix}prediction": question.choices[pick], f"{prefix}score": score}
        scored.append(of_records(model.label, scores))
    setup = context.setup(options.data, sha256_of(questions), options.columns)
    return Evaluation.of(options.metric, scored, setup, predictions=predictions)


def read_questions(specs: Sequence[str], *, samples: int | None, columns: str | None = None) -> list[Question]:
    """Return the first `samples` questions of data, all of them with None.

    A record has `question`, `choices` (a list of two texts or more), and `answer`: the index of the right one, from 0,
    or its text. `columns` names other columns for them. Raises DataError for any other.
    """
    found = records(specs, FORM, samples=samples, columns=chosen_columns(columns, forms=[CHOICES]))
    return [_question(where, record) for where, record in found]


def _question(where: str, record: Mapping[str, Any]) -> Question:
    text = checked_text(record["question"], f"{where}: 'question'", hint=FORM_HINT)
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: 'choices' is no list of two texts or more", hint=FORM_HINT)
    for index, choice in enumerate(choices):
        if not checked_text(choice, f"{where}: 'choices'[{index}]", hint=FORM_HINT).strip():
            raise DataError(f"{where}: 'choices'[{index}] is empty", hint=FORM_HINT)
    answer = record["answer"]
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        value = json.dumps(record["answer"], ensure_ascii=False)
        hint = f"It is an index, 0 to {len(choices) - 1}, or the text of a choice."
        raise DataError(f"{where}: 'answer' is {value}, which is none of its {len(choices)} choices", hint=hint)
    return Question(where, text, tuple(choices), answer)


def options_of(question: Question, tokenizer: "PreTrainedTokenizerBase") -> list[ChoiceTokens]:
    """Return the tokens of the question with each choice, joined by a space where the question does not end in one.

    The choice's tokens are those after the longest common start of the question alone and both together. The first
    token is the tokenizer's begin-of-text token, where it puts one. Raises DataError where no token precedes a choice.
    """
    begin = begin_of_text(tokenizer)
    text = question.text.rstrip()
    alone = begin + encode(text, tokenizer)
    options = []
    for choice in question.choices:
        between = question.text[len(text) :] or " "
        ids = begin + encode(text + between + choice, tokenizer)
        first = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
        if not 0 < first < len(ids):
            raise DataError(f"{question.where}: no token of the question precedes its choices", hint=FORM_HINT)
        options.append(ChoiceTokens(tuple(ids), first))
    return options


def log_likelihoods(
    model: StreamedModel, options: Sequence[ChoiceTokens], *, progress: Progress | None = None
) -> list[float]:
    """Return ln p(choice | question) of each option, by its tokens, in one streamed pass, padded on the right."""
    order = sorted(range(len(options)), key=lambda index: len(options[index].ids))
    batches, members = [], []
    while order:
        longest = len(options[order[-1]].ids)
        rows = max(1, model.batch_tokens // longest)
        members.append(order[-rows:])
        batches.append(_batch([options[index] for index in members[-1]], longest))
        order = order[:-rows]
    likelihoods = [0.0] * len(options)
    for chosen, losses in zip(members, row_losses(model, batches, progress=progress), strict=True):
        for index, loss in zip(chosen, losses.tolist(), strict=True):
            likelihoods[index] = -loss
    return likelihoods


def _batch(options: Sequence[ChoiceTokens], width: int) -> WindowBatch:
    tokens = torch.tensor([[*option.ids, *[option.ids[-1]] * (width - len(option.ids))] for option in options])
    first: Tensor = torch.tensor([option.first for option in options])
    return WindowBatch(tokens, first, torch.tensor([len(option.ids) for option in options]))


def picked(question: Question, likelihoods: Sequence[float], *, normalised: bool) -> int:
    """Return the index of the choice with the highest log-likelihood; with `normalised` per character of the choice.

    The first of equals. Source: lm-evaluation-harness, its acc and acc_norm.
    """
    lengths = [len(choice) if normalised else 1 for choice in question.choices]
    scores = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
    return scores.index(max(scores))
