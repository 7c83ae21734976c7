"""A local model as a judge of two answers: asked in both orders, its verdict read from the next-token logits."""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.data.documents import Reading
from surgeon.data.records import Document
from surgeon.errors import MeasureError
from surgeon.evals.evaluation import open_evaluated
from surgeon.evals.options import BATCH_SIZE
from surgeon.evals.verdicts import FIRST, NEITHER, SECOND, Judgement, Verdict
from surgeon.options import Checked, device_option, option, progress_option, revision_option, trust_option
from surgeon.progress import Progress, meter

ASK = """Which of two answers to a prompt is better?

Prompt:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with one letter: A if answer A is better, B if answer B is better, C if both are equal."""
LABELS = {"A": FIRST, "B": SECOND, "C": NEITHER}
WITHOUT_TEMPLATE = "\n\nReply:", " "  # after the question, and before a label
HINT = "Use a judge with a longer context, shorter answers (--max-new-tokens), or leave the record out."


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt as the judge sees it, and the file and line it was read from."""

    where: str
    prompt: str


@dataclass(frozen=True, slots=True)
class JudgeQuestion:
    """The tokens of a question up to the first that differs between labels, and the rest of each label.

    Labels are in the order of LABELS, usually one token each: the tokenizer splits question and label together.
    """

    shared: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """The input that scores each label: all but its last token. The same for labels of one token."""
        return tuple(self.shared + label[:-1] for label in self.labels)


def read_cases(specs: Sequence[str], *, samples: int | None, columns: str | None = None) -> list[Case]:
    """Return the first `samples` records, all with None, without their answers and without a chat template."""
    streams = [*map(Reading(columns).documents, specs)]
    return [Case(document.where, _shown(document)) for document in islice(chain(*streams), samples)]


def _shown(document: Document) -> str:
    before = document.messages[:-1]
    if len(before) == 1:
        return str(before[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in before) or "\n".join(document.parts[:-1])


class Judge:
    """A causal model that compares answers. Its tokenizer is loaded at once, its weights with the first question."""

    def __init__(self, source: Source, device: str) -> None:
        from surgeon.anatomy.config import positions_of
        from surgeon.data.rows import begin_of_text
        from surgeon.models.loading import load_tokenizer, loadable

        self.source, self.device = source, device
        self.tokenizer = load_tokenizer(*loadable(source))
        self.positions = positions_of(source)
        self._begin = [] if self.tokenizer.chat_template is not None else begin_of_text(self.tokenizer)

    @cached_property
    def model(self) -> Any:
        from surgeon.evals.generation import load_whole

        return load_whole(self.source, self.device)

    def check(self, cases: Sequence[Case], *, max_new_tokens: int) -> None:
        """Raises MeasureError for a prompt that with two answers of `max_new_tokens` may exceed the judge's context."""
        for case in cases:
            count = max(map(len, self.question(case, "", "").rows)) + 2 * max_new_tokens
            what = f"to judge two answers of up to {max_new_tokens} tokens takes"
            self._check_length(case, count, what)

    def compare(
        self,
        cases: Sequence[Case],
        answers: Sequence[str],
        others: Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
    ) -> Judgement:
        """Return the judge's verdict on each pair of an answer and another, asked in both orders.

        Answers that differ only in white space around them are a tie; the judge is not asked.
        Raises MeasureError for a pair that is longer than the judge's context.
        """
        pairs = list(zip(cases, answers, others, strict=True))
        questions: dict[tuple[int, bool], JudgeQuestion] = {}
        for index, (case, one, other) in enumerate(pairs):
            if one.strip() == other.strip():
                continue
            for swapped in (False, True):
                question = self.question(case, *((other, one) if swapped else (one, other)))
                self._check_length(case, max(map(len, question.rows)), "to judge its answers takes")
                questions[index, swapped] = question
        replies = self._replies(questions, batch_size)
        verdicts = (Verdict(replies.get((index, False)), replies.get((index, True))) for index in range(len(pairs)))
        return Judgement(self.source.label, tuple(verdicts))

    def question(self, case: Case, first: str, second: str) -> JudgeQuestion:
        """Return the question about two answers, in the judge's chat template where it has one."""
        from surgeon.data.rows import encode, templated

        question = ASK.format(
            prompt=self._harmless(case.prompt), first=self._harmless(first), second=self._harmless(second)
        )
        if self.tokenizer.chat_template is not None:
            chat = [{"role": "user", "content": question}]
            text, before = templated(chat, self.tokenizer, case.where, answer=True), ""
        else:
            end, before = WITHOUT_TEMPLATE
            text = question + end
        rows = [(*self._begin, *encode(f"{text}{before}{label}", self.tokenizer)) for label in LABELS]
        alike = next((place for place, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), None)
        if not alike or any(tokens[:alike] != rows[0][:alike] for tokens in rows):
            raise MeasureError(
                f"the tokenizer of {self.source.label} makes the same tokens of {' and '.join(LABELS)}",
                hint="Use another judge.",
            )
        return JudgeQuestion(rows[0][:alike], tuple(tokens[alike:] for tokens in rows))

    def _harmless(self, text: str) -> str:
        """Return text without the judge's special tokens, with which an answer could pose as another turn."""
        specials = [str(token) for token in self.tokenizer.all_special_tokens]
        while special := next((token for token in specials if token and token in text), None):
            text = text.replace(special, "")  # may join the parts of another one
        return text.strip()

    def _check_length(self, case: Case, count: int, what: str) -> None:
        if self.positions is not None and count > self.positions:
            raise MeasureError(
                f"{case.where}: {what} {count} tokens, more than the {self.positions} positions of the judge "
                f"{self.source.label}",
                hint=HINT,
            )

    def _replies(
        self, questions: dict[tuple[int, bool], JudgeQuestion], batch_size: int
    ) -> dict[tuple[int, bool], str]:
        """Return the judge's reply for each pair and order: the likeliest label, the first of equals."""
        if not questions:
            return {}
        labels: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for question in questions.values():
            for row, label in zip(question.rows, question.labels, strict=True):
                labels.setdefault(row, set()).add(label)
        depth = read_anatomy(spec_of(self.source)).depth
        count = meter("judging", sum(map(len, labels)), depth)
        scored = likelihoods(
            self.model,
            labels,
            batch_size=batch_size,
            progress=lambda tokens: count(tokens * depth),
        )
        replies = {}
        for place, question in questions.items():
            scores = [scored[pair] for pair in zip(question.rows, question.labels, strict=True)]
            if any(score != score for score in scores):
                hint = "Check its weights: surgeon evaluate gives its perplexity on a text."
                raise MeasureError(f"the outputs of the judge {self.source.label} are not finite", hint=hint)
            replies[place] = list(LABELS.values())[scores.index(max(scores))]
        return replies


def likelihoods(
    model: Any,
    labels: dict[tuple[int, ...], set[tuple[int, ...]]],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """Return ln p of labels by row and label; a row holds the question and all but the last token of the label.

    Rows are padded on the right, which no earlier token sees. Batches depend on the rows alone, not on their order:
    two sets of answers that are swapped are judged by the very same numbers.
    """
    import torch

    from surgeon.models.loading import quiet_transformers

    log_probabilities = {}
    order = sorted(labels, key=lambda row: (-len(row), row))  # the longest first: later batches take less memory
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    with torch.no_grad(), quiet_transformers():  # padding at the end needs no mask
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = torch.tensor([[*row, *[0] * (len(batch[0]) - len(row))] for row in batch], device=model.device)
            reads = {row: max(map(len, labels[row])) for row in batch}
            places = sorted({len(row) - back for row in batch for back in range(1, reads[row] + 1)})
            at = torch.tensor(places, device=model.device)
            options = {"logits_to_keep": at} if keeps else {}
            logits = model(ids, use_cache=False, **options).logits
            logits = logits if keeps else logits[:, at]
            for row, each in zip(batch, logits, strict=True):
                here = [places.index(len(row) - back) for back in range(reads[row], 0, -1)]
                logs = each[here].float().log_softmax(-1)
                for label in labels[row]:
                    steps = zip(logs[len(logs) - len(label) :], label, strict=True)
                    log_probabilities[row, label] = sum(float(step[token]) for step, token in steps)
            if progress:
                progress(sum(map(len, batch)))
    return log_probabilities


def load_judge(
    judge: str | os.PathLike[str],
    data: Sequence[str],
    device: str,
    *,
    samples: int | None,
    max_new_tokens: int,
    columns: str | None = None,
) -> tuple[Judge, list[Case]]:
    """Return a judge, and the first `samples` records as it will see them.

    Raises MeasureError where two answers of `max_new_tokens` may be longer than its context.
    """
    loaded, cases = Judge(open_evaluated(judge, None), device), read_cases(data, samples=samples, columns=columns)
    loaded.check(cases, max_new_tokens=max_new_tokens)
    return loaded, cases


@dataclass(frozen=True, kw_only=True)
class JudgementOptions(Checked):
    """The options of `surgeon.judge_answers`."""

    batch_size: int = option("Questions per batch.", BATCH_SIZE)
    device: str = device_option()
    revision: str | None = revision_option()
    trust_remote_code: bool = trust_option()
    progress: Progress | bool | None = progress_option()
