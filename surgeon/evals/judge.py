"""Which of two answers a local model takes to be the better one: asked in both orders, read from its next token."""

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.data.documents import documents
from surgeon.data.records import Document
from surgeon.errors import DataError, MeasureError
from surgeon.evals.files import opened
from surgeon.evals.verdicts import FIRST, NEITHER, SECOND, Judgement, Verdict

if TYPE_CHECKING:
    from surgeon.measure.scoring import Meter

BATCH_SIZE = 8
ASK = """Which of two answers to a prompt is better?

Prompt:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with one letter: A if answer A is better, B if answer B is better, C if both are equal."""
LABELS = {"A": FIRST, "B": SECOND, "C": NEITHER}
WITHOUT_TEMPLATE = "\n\nReply:", " "  # behind the question, and in front of a label
HINT = "Use a judge that sees more tokens, shorter answers (--max-new-tokens), or leave the record out."


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt to which answers are compared, as the judge is shown it, and where it was read."""

    where: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Asking:
    """The tokens of a question up to where labels begin to differ, and the rest of each label, in the order of LABELS.

    Usually one token each; what matters is how the tokenizer splits question and label when they stand together.
    """

    shared: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """What the model is given to score each label: all but its last token. The same for labels of one token."""
        return tuple(self.shared + label[:-1] for label in self.labels)


def read_cases(specs: Sequence[str], *, samples: int | None) -> list[Case]:
    """Return the first `samples` records, all with None, each without its answer and without any chat template."""
    streams = [documents(spec) for spec in specs]
    return [Case(document.where, _shown(document)) for document in islice(chain(*streams), samples)]


def _shown(document: Document) -> str:
    before = document.messages[:-1]
    if len(before) == 1:
        return str(before[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in before) or "\n".join(document.parts[:-1])


class Judge:
    """A causal model that compares answers. Its tokenizer is loaded when it is made, its weights when it is asked."""

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
        """Raises MeasureError where a prompt and two answers of so many tokens may be more than the judge sees."""
        for case in cases:
            count = max(map(len, self.asking(case, "", "").rows)) + 2 * max_new_tokens
            what = f"to judge two answers of up to {max_new_tokens} tokens takes"
            self._check_length(case, count, what)

    def compare(
        self,
        cases: Sequence[Case],
        answers: Sequence[str],
        others: Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
        meter: "Meter | None" = None,
    ) -> Judgement:
        """Return which of each answer and other the judge takes to be better, asked in both orders.

        Answers that are the same but for white space around them are a tie without asking.
        Raises MeasureError for a pair that is longer than what the judge sees.
        """
        pairs = list(zip(cases, answers, others, strict=True))
        askings: dict[tuple[int, bool], Asking] = {}
        for index, (case, one, other) in enumerate(pairs):
            if one.strip() == other.strip():
                continue
            for swapped in (False, True):
                asking = self.asking(case, *((other, one) if swapped else (one, other)))
                self._check_length(case, max(map(len, asking.rows)), "to judge its answers takes")
                askings[index, swapped] = asking
        taken = self._taken(askings, batch_size, meter)
        verdicts = (Verdict(taken.get((index, False)), taken.get((index, True))) for index in range(len(pairs)))
        return Judgement(self.source.label, tuple(verdicts))

    def asking(self, case: Case, first: str, second: str) -> Asking:
        """Return what the judge is asked of two answers: in its chat template where it has one."""
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
        asked = [(*self._begin, *encode(f"{text}{before}{label}", self.tokenizer)) for label in LABELS]
        alike = next((place for place, tokens in enumerate(zip(*asked, strict=False)) if len(set(tokens)) > 1), None)
        if not alike or any(tokens[:alike] != asked[0][:alike] for tokens in asked):
            raise MeasureError(
                f"the tokenizer of {self.source.label} makes the same tokens of {' and '.join(LABELS)}",
                hint="Use another judge.",
            )
        return Asking(asked[0][:alike], tuple(tokens[alike:] for tokens in asked))

    def _harmless(self, text: str) -> str:
        """Return text without the judge's special tokens, with which it could end its place and speak for others."""
        specials = [str(token) for token in self.tokenizer.all_special_tokens]
        while found := next((token for token in specials if token and token in text), None):
            text = text.replace(found, "")  # which may put another together
        return text.strip()

    def _check_length(self, case: Case, count: int, what: str) -> None:
        if self.positions is not None and count > self.positions:
            raise MeasureError(
                f"{case.where}: {what} {count} tokens, more than the {self.positions} positions of the judge "
                f"{self.source.label}",
                hint=HINT,
            )

    def _taken(
        self, askings: "dict[tuple[int, bool], Asking]", batch_size: int, meter: "Meter | None"
    ) -> dict[tuple[int, bool], str]:
        """Return what the judge takes of each pair and order: the likeliest label, the first of equals."""
        if not askings:
            return {}
        wanted: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for asking in askings.values():
            for row, label in zip(asking.rows, asking.labels, strict=True):
                wanted.setdefault(row, set()).add(label)
        depth = read_anatomy(spec_of(self.source)).depth
        count = None if meter is None else meter("judging", sum(map(len, wanted)), depth)
        found = likelihoods(
            self.model,
            wanted,
            batch_size=batch_size,
            progress=None if count is None else lambda tokens: count(tokens * depth),
        )
        taken = {}
        for place, asking in askings.items():
            scores = [found[pair] for pair in zip(asking.rows, asking.labels, strict=True)]
            if any(score != score for score in scores):
                hint = "Are its weights in order? surgeon evaluate gives its perplexity on a text."
                raise MeasureError(f"the judge {self.source.label} puts out numbers that are not finite", hint=hint)
            taken[place] = list(LABELS.values())[scores.index(max(scores))]
        return taken


def likelihoods(
    model: Any,
    wanted: "dict[tuple[int, ...], set[tuple[int, ...]]]",
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """Return ln p of labels by row and label; a row holds the question and all but the last token of the label.

    Rows are padded on the right, where nothing in front sees it. Batches depend on the rows alone, not on their order:
    two sets of answers that change places are judged by the very same numbers.
    """
    import torch

    from surgeon.models.loading import quiet_transformers

    found = {}
    order = sorted(wanted, key=lambda row: (-len(row), row))  # the longest first: memory is known
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    with torch.no_grad(), quiet_transformers():  # what is padded is in front of nothing, and needs no mask
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = torch.tensor([[*row, *[0] * (len(batch[0]) - len(row))] for row in batch], device=model.device)
            reads = {row: max(map(len, wanted[row])) for row in batch}
            places = sorted({len(row) - back for row in batch for back in range(1, reads[row] + 1)})
            at = torch.tensor(places, device=model.device)
            options = {"logits_to_keep": at} if keeps else {}
            logits = model(ids, use_cache=False, **options).logits
            logits = logits if keeps else logits[:, at]
            for row, each in zip(batch, logits, strict=True):
                here = [places.index(len(row) - back) for back in range(reads[row], 0, -1)]
                logs = each[here].float().log_softmax(-1)
                for label in wanted[row]:
                    behind = zip(logs[len(logs) - len(label) :], label, strict=True)
                    found[row, label] = sum(float(place[token]) for place, token in behind)
            if progress:
                progress(sum(map(len, batch)))
    return found


def seated(
    judge: str | os.PathLike[str], data: Sequence[str], device: str, *, samples: int | None, max_new_tokens: int
) -> tuple[Judge, list[Case]]:
    """Return a judge that is ready for answers to the first `samples` records, and what it will be shown of them.

    Raises MeasureError where two answers of so many tokens may be more than it sees.
    """
    found, cases = Judge(opened(judge, None), device), read_cases(data, samples=samples)
    found.check(cases, max_new_tokens=max_new_tokens)
    return found, cases


def judge_answers(
    judge: str | os.PathLike[str],
    prompts: Sequence[str],
    answers: Sequence[str],
    others: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    revision: str | None = None,
    meter: "Meter | None" = None,
) -> Judgement:
    """Return which of two answers to each prompt a local model takes to be better, and how often: the win rate.

    `judge` is the checkpoint directory or Hub id of a causal model. It is asked in both orders, in its chat template
    where it has one, and its reply is the likeliest of three letters; where the orders disagree it is a tie.

    Raises DataError for lists of different lengths, MeasureError for a judge that cannot be asked.

        print(surgeon.judge_answers("Qwen3-4B", ["2 + 2?"], ["4"], ["5"]).to_text())
    """
    from surgeon.models.device import resolve_device

    if not len(prompts) == len(answers) == len(others):
        found = f"{len(prompts)} prompts, {len(answers)} answers and {len(others)} others"
        raise DataError(f"{found} make no pairs", hint="Give as many of each.")
    if not prompts:
        raise DataError("there are no answers to judge", hint="Give one prompt at least, with two answers.")
    cases = [Case(f"prompt {index}", prompt) for index, prompt in enumerate(prompts)]
    seat = Judge(opened(judge, revision), resolve_device(device))
    return seat.compare(cases, answers, others, batch_size=batch_size, meter=meter)
