"""A judge's verdicts on pairs of answers: their win rate, and whether the judge is better than chance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon import text
from surgeon.evals.compare import Estimate, estimate, short_label, table_cell
from surgeon.showing import Shown
from surgeon.text import plus_minus

FIRST, SECOND, NEITHER = "first", "second", "neither"  # the preference of a judge in one order of two answers
WIN, TIE, LOSS = "win", "tie", "loss"  # of the one answer over the other
SCORES: Mapping[str, float] = {WIN: 1.0, TIE: 0.5, LOSS: 0.0}
AGREED = {(FIRST, SECOND): WIN, (SECOND, FIRST): LOSS, (NEITHER, NEITHER): TIE}
WIN_RATE = "win_rate"
BEYOND_CHANCE = 2  # standard errors


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's preference between an answer and another: with the answer shown first, and with it shown second.

    Each is "first", "second" or "neither"; None for equal answers, about which the judge is not asked.
    """

    ahead: str | None = None
    behind: str | None = None

    @property
    def asked(self) -> bool:
        return self.ahead is not None

    @property
    def agreed(self) -> bool:
        """Whether the judge prefers the same answer in both orders."""
        return (self.ahead, self.behind) in AGREED

    @property
    def outcome(self) -> str:
        """A "win" or a "loss" of the answer where both orders agree, else a "tie"."""
        return AGREED.get((self.ahead or NEITHER, self.behind or NEITHER), TIE)

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.outcome, "taken": [self.ahead, self.behind] if self.asked else None}


@dataclass(frozen=True, repr=False)
class Judgement(Shown):
    """A judge's verdicts on pairs of answers.

    For example:

        judgement = surgeon.judge_answers("SmolLM2-135M", ["2 + 2?", "3 + 3?"], ["4", "6"], ["5", "6"])
        print(judgement.win_rate.value, judgement.consistent, judgement.notes)
    """

    judge: str
    verdicts: tuple[Verdict, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """The score of each pair: 1 for a win, 1/2 for a tie, 0 for a loss."""
        return tuple(SCORES[verdict.outcome] for verdict in self.verdicts)

    @property
    def win_rate(self) -> Estimate:
        """(wins + ties / 2) / pairs, with its standard error over pairs."""
        return estimate(self.scores)

    def count(self, outcome: str) -> int:
        """Return the number of pairs with an outcome: "win", "tie" or "loss"."""
        return sum(verdict.outcome == outcome for verdict in self.verdicts)

    @property
    def num_asked(self) -> int:
        """The number of pairs that the judge was asked about: those of different answers."""
        return sum(verdict.asked for verdict in self.verdicts)

    @property
    def consistent(self) -> float | None:
        """The share of the pairs asked about with the same verdict in both orders; None where none was asked about."""
        agreed = sum(verdict.agreed for verdict in self.verdicts)
        return agreed / self.num_asked if self.num_asked else None

    def share(self, taken: str) -> float | None:
        """Return the share of questions answered with "first", "second" or "neither"; None without questions."""
        replies = [reply for verdict in self.verdicts if verdict.asked for reply in (verdict.ahead, verdict.behind)]
        return replies.count(taken) / len(replies) if replies else None

    @property
    def chance(self) -> float | None:
        """The expected consistency of a judge with the same shares of replies, at random: 2·f·s + n².

        f, s and n are the shares of first, second and neither.
        """
        first, second, neither = map(self.share, (FIRST, SECOND, NEITHER))
        return None if first is None or second is None or neither is None else 2 * first * second + neither**2

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the judge."""
        consistent, chance = self.consistent, self.chance
        if consistent is None or chance is None:
            return ("both answers of every pair are the same: the judge was not asked",)
        if consistent - chance > BEYOND_CHANCE * math.sqrt(chance * (1 - chance) / self.num_asked):
            return ()
        agreement = f"the judge agrees with itself on {consistent:.0%} of pairs when the answers are swapped"
        return (f"{agreement}; by chance it would on {chance:.0%}: these verdicts say nothing",)

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return {
            "win_rate": self.win_rate.value,
            "win_rate_error": self.win_rate.error,
            "wins": self.count(WIN),
            "ties": self.count(TIE),
            "losses": self.count(LOSS),
            "asked": self.num_asked,
            "consistent": self.consistent,
            "chance": self.chance,
            "first": self.share(FIRST),
            "second": self.share(SECOND),
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """Return the counts, and the consistency of the judge, in a line."""
        counts = f"{self.count(WIN)} wins, {self.count(TIE)} ties, {self.count(LOSS)} losses"
        if self.consistent is None:
            return counts
        places = f"prefers the first in {self.share(FIRST):.0%}, the second in {self.share(SECOND):.0%}"
        return f"{counts}; the same when swapped in {self.consistent:.0%} (chance {self.chance:.0%}); {places}"

    @property
    def headline(self) -> str:
        """The judge, the number of pairs and the win rate."""
        rate = plus_minus(self.win_rate.value, self.win_rate.error)
        return f"{len(self.verdicts)} pairs by {short_label(self.judge)}, win rate {rate}"

    def to_text(self) -> str:
        """Return the judgement for people."""
        rate = plus_minus(self.win_rate.value, self.win_rate.error)
        rows = [("judge", self.judge), ("win rate", rate), ("verdicts", self.summary())]
        return text.rows(rows + [("note", note) for note in self.notes])


def card_sentences(judgements: Mapping[str, Judgement]) -> str:
    """Return a sentence or two per comparison, by its name, for a model card."""
    sentences: list[str] = []
    for comparison, judgement in judgements.items():
        sentences.append(f"Judged by {short_label(judgement.judge)}, {comparison}: {judgement.summary()}.")
        sentences += [f"{note[0].upper()}{note[1:]}." for note in judgement.notes]
    return "".join(f" {table_cell(sentence)}" for sentence in sentences)
