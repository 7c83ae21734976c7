"""Whether a rewritten answer is taken: it ends, answers what the reference does, and does not speak of its task."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from surgeon.errors import DataError
from surgeon.evals.metrics import extracted, final_number, rouge_words
from surgeon.rewriting.prompts import MARK, Row

# What gives away that the writer was shown an answer. Source: the code of arXiv:2402.13669, gen_distilled_data.py; the
# last two are added here: headings of the prompt that a small model writes again.
LEAKS = (
    *("reference answer", "your response", "my response", "your own response", "now it's your turn"),
    *("### instruction", "### response"),
)
LEAK_AT_START = "Your turn"
NGRAM = 8  # words of a run that counts as copied
NUMBER, NONE, AUTO = "number", "none", "auto"

# The reasons for which a row keeps its own answer, in the order in which they are looked for.
REASONS = {
    "prompt": "the prompt leaves no room for an answer",
    "empty": "nothing was written",
    "truncated": "it did not end within --max-new-tokens",
    "leak": "it speaks of the reference answer, or of its task",
    "answer": "it comes to another result",
    "length": "it is much shorter or longer than the reference",
    "copied": "it is a copy of the reference",
}


@dataclass(frozen=True, slots=True)
class Checks:
    """What an answer is checked for.

    `check` is "number", "none", "auto" or a regular expression whose last match is compared. `lengths` are the least
    and the most characters of a free text, as a share of the reference's. `most_copied` is a share of runs of 8 words.
    """

    check: str = AUTO
    lengths: tuple[float, float] | None = (0.3, 3.0)
    most_copied: float | None = None

    def result(self, text: str, *, check: str) -> str | None:
        """Return what is compared of an answer, None where it has no such thing."""
        return final_number(text) if check == NUMBER else extracted(text, re.compile(check))

    def check_of(self, row: Row) -> str:
        """Return how a row is checked: with "auto" by its number where that is marked."""
        if self.check != AUTO:
            return self.check
        return NUMBER if MARK in row.reference else NONE

    def check_row(self, row: Row) -> None:
        """Raises DataError for a reference without what is compared: no answer could pass."""
        check = self.check_of(row)
        if check == NONE or self.result(row.reference, check=check) is not None:
            return
        what = "no number in its answer" if check == NUMBER else f"nothing in its answer that matches {check!r}"
        raise DataError(
            f"{row.where} has {what}", hint="Use --extract auto, or --extract none; or leave the record out."
        )

    def fault(self, answer: str, row: Row, *, is_finished: bool) -> str | None:
        """Return the reason for which an answer is not taken, a key of REASONS; None where it is."""
        if not answer:
            return "empty"
        if not is_finished:
            return "truncated"
        if answer.startswith(LEAK_AT_START) or any(leak in answer.lower() for leak in LEAKS):
            return "leak"
        check = self.check_of(row)
        if check != NONE and self.result(answer, check=check) != self.result(row.reference, check=check):
            return "answer"
        if check == NONE and self.lengths is not None and row.reference:
            low, high = self.lengths
            if not low <= len(answer) / len(row.reference) <= high:
                return "length"
        if self.most_copied is not None and copied(answer, row.reference) > self.most_copied:
            return "copied"
        return None


def copied(answer: str, reference: str) -> float:
    """Return the share of an answer's runs of 8 words that stand in the reference; a shorter answer is one run."""
    words, others = rouge_words(answer), rouge_words(reference)
    size = min(NGRAM, len(words))
    if not size:
        return 0.0
    known = set(_runs(others, size))
    runs = _runs(words, size)
    return sum(run in known for run in runs) / len(runs)


def _runs(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
