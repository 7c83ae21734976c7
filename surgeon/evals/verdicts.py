"""What a judge's verdicts on pairs of answers come to: a win rate, and whether the judge can be believed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon import text
from surgeon.evals.compare import Estimate, estimate
from surgeon.evals.table import cell, plus_minus, short

FIRST, SECOND, NEITHER = "first", "second", "neither"  # what a judge takes when it is asked
WIN, TIE, LOSS = "win", "tie", "loss"  # of the one answer over the other
SCORES: Mapping[str, float] = {WIN: 1.0, TIE: 0.5, LOSS: 0.0}
AGREED = {(FIRST, SECOND): WIN, (SECOND, FIRST): LOSS, (NEITHER, NEITHER): TIE}
WIN_RATE = "win_rate"
BEYOND_CHANCE = 2  # standard errors


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge took of two answers: when the one was shown first, and when it was shown second.

    Each is "first", "second" or "neither", None of two answers that are the same: it was not asked.
    """

    ahead: str | None = None
    behind: str | None = None

    @property
    def asked(self) -> bool:
        return self.ahead is not None

    @property
    def agreed(self) -> bool:
        """Whether the judge said the same in both orders."""
        return (self.ahead, self.behind) in AGREED

    @property
    def outcome(self) -> str:
        """Whether the one is a "win" or a "loss", as both orders say; a "tie" where they do not agree."""
        return AGREED.get((self.ahead or NEITHER, self.behind or NEITHER), TIE)

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.outcome, "taken": [self.ahead, self.behind] if self.asked else None}


@dataclass(frozen=True)
class Judgement:
    """What a judge says of pairs of answers, pair by pair."""

    judge: str
    verdicts: tuple[Verdict, ...]

    @property
    def scores(self) -> tuple[float, ...]:
        """What each pair counts: 1 for a win, 1/2 for a tie, 0 for a loss."""
        return tuple(SCORES[verdict.outcome] for verdict in self.verdicts)

    @property
    def win_rate(self) -> Estimate:
        """(wins + ties / 2) / pairs, with its standard error over pairs."""
        return estimate(self.scores)

    def count(self, outcome: str) -> int:
        """Return how many pairs came out as "win", "tie" or "loss"."""
        return sum(verdict.outcome == outcome for verdict in self.verdicts)

    @property
    def num_asked(self) -> int:
        """How many pairs the judge was asked about: those that are not the same."""
        return sum(verdict.asked for verdict in self.verdicts)

    @property
    def consistent(self) -> float | None:
        """The share of pairs, of those asked about, on which it said the same in both orders; None where none was."""
        agreed = sum(verdict.agreed for verdict in self.verdicts)
        return agreed / self.num_asked if self.num_asked else None

    def share(self, taken: str) -> float | None:
        """Return in how many of all askings it took the "first" answer, the "second", or "neither"; 0 to 1."""
        said = [one for verdict in self.verdicts if verdict.asked for one in (verdict.ahead, verdict.behind)]
        return said.count(taken) / len(said) if said else None

    @property
    def chance(self) -> float | None:
        """How consistent a judge is that takes each place as often as this one, whatever stands there.

        With shares f, s and n of first, second and neither: 2·f·s + n².
        """
        first, second, neither = map(self.share, (FIRST, SECOND, NEITHER))
        return None if first is None or second is None or neither is None else 2 * first * second + neither**2

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be known of the judge before its win rate is believed."""
        consistent, chance = self.consistent, self.chance
        if consistent is None or chance is None:
            return ("both answers of every pair are the same: the judge was not asked",)
        if consistent - chance > BEYOND_CHANCE * math.sqrt(chance * (1 - chance) / self.num_asked):
            return ()
        same = f"the judge says the same of {consistent:.0%} of pairs when the answers change places"
        return (f"{same}; one that looks at the places alone would of {chance:.0%}: these verdicts say nothing",)

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints of it."""
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

    def told(self) -> str:
        """Return the counts, and how far the judge can be believed, in a line."""
        counts = f"{self.count(WIN)} wins, {self.count(TIE)} ties, {self.count(LOSS)} losses"
        if self.consistent is None:
            return counts
        places = f"takes the first in {self.share(FIRST):.0%}, the second in {self.share(SECOND):.0%}"
        return f"{counts}; the same when swapped in {self.consistent:.0%} (chance {self.chance:.0%}); {places}"

    def to_text(self) -> str:
        """Return the judgement for people."""
        rate = plus_minus(self.win_rate.value, self.win_rate.error)
        rows = [("judge", self.judge), ("win rate", rate), ("verdicts", self.told())]
        return text.rows(rows + [("note", note) for note in self.notes])


def card_sentences(judgements: Mapping[str, Judgement]) -> str:
    """Return a sentence or two for each comparison, by what was compared, for a model card."""
    told: list[str] = []
    for what, one in judgements.items():
        told.append(f"Judged by {short(one.judge)}, {what}: {one.told()}.")
        told += [f"{note[0].upper()}{note[1:]}." for note in one.notes]
    return "".join(f" {cell(sentence)}" for sentence in told)
