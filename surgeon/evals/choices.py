"""Multiple choice: of several continuations of a question, the one that the model finds likeliest."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.data.records import checked_text
from surgeon.data.rows import begin_of_text, encode
from surgeon.errors import DataError
from surgeon.evals.perplexity import Piece, row_losses
from surgeon.models.streaming import BATCH_TOKENS, Progress, StreamedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

FORM_HINT = 'Write a record so: {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}'


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its choices, and the index of the right one."""

    where: str
    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Option:
    """The tokens of a question with one of its choices; those from `first` on are the choice's."""

    ids: tuple[int, ...]
    first: int


def read_questions(specs: Sequence[str], *, samples: int | None) -> list[Question]:
    """Return the first `samples` questions of .jsonl files, all of them with None.

    A record has `question`, `choices` (a list of two texts or more), and `answer`: the index of the right one, from 0,
    or its text. Raises DataError for any other.
    """
    for spec in specs:
        if Path(spec).suffix != ".jsonl":
            raise DataError(
                f"{spec} is no .jsonl file, which is where questions with choices are read from", hint=FORM_HINT
            )
    found = list(islice(chain.from_iterable(map(_lines, specs)), samples))
    if not found:
        raise DataError(f"0 questions in {', '.join(specs)}", hint=FORM_HINT)
    return found


def _lines(spec: str) -> "Iterator[Question]":
    try:
        with Path(spec).open(encoding="utf-8-sig", newline="\n") as file:  # U+2028 may stand inside a string
            for number, line in enumerate(file, start=1):
                if line.strip(" \t\r\n"):
                    yield _question(_parsed(line, f"{spec}:{number}"), f"{spec}:{number}")
    except UnicodeDecodeError as error:
        hint = f"Convert it, if you know its encoding: iconv -f ENCODING -t UTF-8 {spec}"
        raise DataError(f"{spec} is not UTF-8: {error.reason}", hint=hint) from error
    except OSError as error:
        raise DataError(f"cannot read {spec}: {error.strerror}", hint=f"Look at it: ls -l {spec}") from error


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        said = f"{where}:{error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else f"{where}: {error}"
        raise DataError(said, hint=FORM_HINT) from error


def _question(record: Any, where: str) -> Question:
    if not isinstance(record, dict):
        raise DataError(f"{where} is no object", hint=FORM_HINT)
    for key in ("question", "choices", "answer"):
        if key not in record:
            raise DataError(f"{where} has no {key!r}, only {', '.join(map(repr, record)) or 'nothing'}", hint=FORM_HINT)
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
        found = json.dumps(record["answer"], ensure_ascii=False)
        hint = f"It is an index, 0 to {len(choices) - 1}, or the text of a choice."
        raise DataError(f"{where}: 'answer' is {found}, which is none of its {len(choices)} choices", hint=hint)
    return Question(where, text, tuple(choices), answer)


def options_of(question: Question, tokenizer: "PreTrainedTokenizerBase") -> list[Option]:
    """Return the tokens of the question with each choice, joined by a space where the question does not end in one.

    The choice's tokens are those behind what the question alone has in common with both together. The tokenizer's
    begin-of-text token goes before, where it puts one. Raises DataError where nothing goes before a choice.
    """
    begin = begin_of_text(tokenizer)
    text = question.text.rstrip()
    alone = begin + encode(text, tokenizer)
    found = []
    for choice in question.choices:
        between = question.text[len(text) :] or " "
        ids = begin + encode(text + between + choice, tokenizer)
        first = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
        if not 0 < first < len(ids):
            raise DataError(f"{question.where}: no token of the question goes before its choices", hint=FORM_HINT)
        found.append(Option(tuple(ids), first))
    return found


def log_likelihoods(
    model: StreamedModel, options: Sequence[Option], *, progress: Progress | None = None
) -> list[float]:
    """Return ln p(choice | question) of each option, by its tokens, in one streamed pass, padded on the right."""
    order = sorted(range(len(options)), key=lambda index: len(options[index].ids))
    pieces, members = [], []
    while order:
        longest = len(options[order[-1]].ids)
        rows = max(1, BATCH_TOKENS // longest)
        members.append(order[-rows:])
        pieces.append(_piece([options[index] for index in members[-1]], longest))
        order = order[:-rows]
    found = [0.0] * len(options)
    for chosen, losses in zip(members, row_losses(model, pieces, progress=progress), strict=True):
        for index, loss in zip(chosen, losses.tolist(), strict=True):
            found[index] = -loss
    return found


def _piece(options: Sequence[Option], width: int) -> Piece:
    tokens = torch.tensor([[*option.ids, *[option.ids[-1]] * (width - len(option.ids))] for option in options])
    first: Tensor = torch.tensor([option.first for option in options])
    return Piece(tokens, first, torch.tensor([len(option.ids) for option in options]))


def picked(question: Question, likelihoods: Sequence[float], *, normalised: bool) -> int:
    """Return the index of the choice with the highest log-likelihood; with `normalised` for each of its characters.

    The first of equals. Source: lm-evaluation-harness, where they are called acc and acc_norm.
    """
    lengths = [len(choice) if normalised else 1 for choice in question.choices]
    scores = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
    return scores.index(max(scores))
