"""The search: singles and telling pairs, what scores would cut, the surrogate's best cuts, then moves from the best.

Measured cuts decide, the surrogate says which to measure next. A second text is watched: a move that is better on the
rows of the search and worse there is refused, because some dozens of measurements fit a few thousand tokens of a text.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from surgeon.errors import MeasureError
from surgeon.search.budget import Pricing
from surgeon.search.cuts import Candidate, Pieces, Space, Widths
from surgeon.search.figures import Figures
from surgeon.search.journal import Journal
from surgeon.search.openings import Openings
from surgeon.search.surrogate import STARTS, Surrogate, best_cuts, telling_pairs

SCREEN, SEARCH, WATCH = "screen", "search", "watch"
FIRST = 16  # of the cuts that scores would make, and of the surrogate's best, are measured before any move
SHARE = 3  # one of so many evaluations is the most that each of these two takes
APART = 2  # pieces in which the first ones differ: near ones are what moves are for
AGAIN = 6  # descents that propose beside the moves
BATCH = 4  # moves that are measured together, in the surrogate's order
REFUSED = 3  # improvements in a row that the second text refuses: the search then fits its own rows
ON_THE_WAY = (0.25, 0.5, 0.75)  # shares of what has to go, at each of which one cut is measured
FINAL = 3  # cuts that are confirmed
LOOKED_AT = 12  # sets of widths whose cuts in depth are looked into, of all in the order of their prediction
PAIRS = 300  # at most


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How far a search goes: so many evaluations on the rows of the search, and so many seconds (None: any)."""

    objective: str = "kl"
    evaluations: int = 60
    seconds: float | None = None
    seed: int = 0
    watches: bool = False  # whether there is a second text
    texts: tuple[str, ...] = ()  # on which the best are confirmed


@dataclass
class Search:
    """A search of one model for a budget; `options` are the widths that a result may have."""

    journal: Journal
    pricing: Pricing
    space: Space
    options: Sequence[Widths]
    settings: Settings
    openings: Openings = field(default_factory=Openings)
    refused: list[Candidate] = field(default_factory=list)  # by the second text
    stopped: str = ""  # why it ended
    fitted: Surrogate = field(default_factory=lambda: Surrogate({}))  # to all that was measured
    _fewest: dict[Widths, int] = field(default_factory=dict)

    # --- costs ------------------------------------------------------------------------------------------------

    def cost(self, stage: str, candidate: Candidate, figures: Figures) -> float:
        """Return what a cut costs by the objective, in nats: its KL, or its loss over that of the whole model."""
        if self.settings.objective == "kl":
            value = figures.mean("kl")
        else:
            value = figures.over(self.journal.measured(stage)[Candidate(())], "loss")[0]
        return value if not math.isnan(value) else math.inf

    def _measure(self, stage: str, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
        whole = [Candidate(())] if self.settings.objective == "loss" else []
        figures = self.journal.measure(stage, [*whole, *candidates])[len(whole) :]
        return {each: self.cost(stage, each, own) for each, own in zip(candidates, figures, strict=True)}

    def measured(self, *, all_sizes: bool = False) -> dict[Candidate, float]:
        """Return the cost of every cut that was measured on the rows of the search and is within the budget.

        With `all_sizes` of those too that are larger: cuts on the way to the budget.
        """
        known = {each: own for each, own in self.journal.measured(SEARCH).items() if each.features}
        fitting = {each: own for each, own in known.items() if all_sizes or self.pricing.meets(each)}
        return {each: self.cost(SEARCH, each, own) for each, own in fitting.items()}

    # --- the order of work ------------------------------------------------------------------------------------

    def run(self) -> list[Candidate]:
        """Return the cuts that were confirmed, the best first. Raises MeasureError where none can be measured."""
        surrogate = self._screened()
        best = self._proposed(surrogate)
        self._on_the_way(surrogate)
        best = self._improved(surrogate, best)
        self.fitted = surrogate.fitted(self.measured(all_sizes=True))
        return self._confirmed(best)

    def _screened(self) -> Surrogate:
        """Return the surrogate of what single pieces and widths, and telling pairs of layers, cost on a few rows."""
        pieces = [Candidate((piece,)) for piece in self.space.free]
        widths = [Candidate((), (one,)) for one in dict.fromkeys(item for each in self.options for item in each)]
        singles = [each for each in (*pieces, *widths) if self._can_be_alone(each)]
        alone: dict[object, float] = {
            each.features[0]: cost for each, cost in self._measure(SCREEN, singles).items() if math.isfinite(cost)
        }
        self.space = Space(self.space.depth, tuple(piece for piece in self.space.free if piece in alone))
        most = max((count for count in self._counts().values()), default=0)
        layers = {piece: alone[piece] for piece in self.space.free}
        pairs = telling_pairs(layers, most, limit=PAIRS) if most > 1 else []
        cuts = [Candidate(pair) for pair in pairs]
        together = {
            (each.pieces[0], each.pieces[1]): cost
            for each, cost in self._measure(SCREEN, [cut for cut in cuts if self._can_be_alone(cut)]).items()
            if math.isfinite(cost)
        }
        return Surrogate(alone, together)

    def _proposed(self, surrogate: Surrogate) -> Candidate:
        """Return the best of the first cuts, by measurement: those that scores would make, then the surrogate's."""
        first = min(FIRST, max(1, self.settings.evaluations // SHARE))
        opened = [each for each in self.openings.cuts(self.space, self._counts()) if self._can_be(each)][:first]
        if opened:
            self._measure(SEARCH, opened)
        fitted = surrogate.fitted(self.measured())
        proposals = [each for each in self._proposals(fitted, most=8 * FIRST) if each not in opened]
        apart: list[Candidate] = []
        for each in proposals:
            if len(apart) < first // 2 and all(_distance(each, other) >= APART for other in (*opened, *apart)):
                apart.append(each)
        chosen = list(dict.fromkeys([*apart, *proposals]))[: 2 * first - len(opened)]
        if chosen:
            self._measure(SEARCH, chosen)
        costs = self.measured()
        if not costs:
            raise MeasureError("no cut that meets the target can be measured", hint="Let more change: --over.")
        return min(costs, key=lambda each: (costs[each], each))

    def _on_the_way(self, surrogate: Surrogate) -> None:
        """Measure a cut at each of a few sizes between the whole model and the budget: they show the trade."""
        fitted = surrogate.fitted(self.measured())
        found: list[Candidate] = []
        for share in ON_THE_WAY:
            eased = replace(self, pricing=self.pricing.eased(share), _fewest={})
            found += list(eased._proposals(fitted, most=1))
        left = self.settings.evaluations - len(self.measured())
        few = [each for each in dict.fromkeys(found) if not self.pricing.meets(each)][: max(0, left)]
        if few:
            self._measure(SEARCH, few)

    def _improved(self, surrogate: Surrogate, best: Candidate) -> Candidate:
        """Return the best cut after moves, a few at a time, in the order of the surrogate as fitted so far."""
        in_a_row = 0
        watched = self._watched(best)
        while not self._is_over():
            known = self.measured(all_sizes=True)
            fitted = surrogate.fitted(known)
            left = self.settings.evaluations - len(known)
            batch = self._next_moves(fitted, best, min(BATCH, left))
            if not batch:
                self.stopped = "every move was measured"
                break
            costs = self._measure(SEARCH, batch)
            mine = self.measured()[best]
            for each in sorted(costs, key=lambda each: (costs[each], each)):
                if costs[each] >= mine:
                    break
                if (seen := self._watched(each)) is not None and watched is not None:
                    worse, error = seen.over(watched, "kl" if self.settings.objective == "kl" else "loss")
                    if worse > error:
                        self.refused.append(each)
                        in_a_row += 1
                        continue
                best, watched, in_a_row = each, seen, 0
                break
            if in_a_row >= REFUSED:
                self.stopped = "the second text got worse with what was better on the first"
                break
        return best

    def _watched(self, candidate: Candidate) -> Figures | None:
        return self.journal.measure(WATCH, [candidate])[0] if self.settings.watches else None

    def _is_over(self) -> bool:
        if len(self.measured(all_sizes=True)) >= self.settings.evaluations:
            self.stopped = f"{self.settings.evaluations} evaluations were made"
        elif self.settings.seconds is not None and self.journal.seconds >= self.settings.seconds:
            self.stopped = "its time was over"
        return bool(self.stopped)

    def _confirmed(self, best: Candidate) -> list[Candidate]:
        """Return the best few, the best first, by the mean of the objective over texts that the search did not see."""
        costs = self.measured()
        ranked = sorted((each for each in costs if each not in self.refused), key=lambda each: (costs[each], each))
        few = list(dict.fromkeys([best, *ranked]))[:FINAL]
        if not self.settings.texts:
            return few
        found = [self._measure(text, few) for text in self.settings.texts]
        return sorted(few, key=lambda each: (math.fsum(costs[each] for costs in found), few.index(each)))

    # --- proposals --------------------------------------------------------------------------------------------

    def _counts(self) -> dict[Widths, int]:
        """Return the fewest pieces that have to go with each set of widths, of those that can meet the budget.

        Each has as many neurons as then fit, unless the sizes of the result were given. Where more of every width could
        stay with as few gone, a set is left out.
        """
        if not self._fewest:
            counts = {each: self.pricing.fewest(each, self.space) for each in self.options}
            known = {each: count for each, count in counts.items() if count is not None}
            if () in self.options:
                known = {self.pricing.filled(each, self.space, count): count for each, count in known.items()}
            self._fewest = {each: count for each, count in known.items() if not self._is_dominated(each, count, known)}
        return self._fewest

    def _is_dominated(self, widths: Widths, count: int, known: Mapping[Widths, int]) -> bool:
        sizes = self.pricing.anatomy.sizes
        own = dict(widths)
        for other, gone in known.items():
            if other != widths and gone <= count:
                wider = dict(other)
                axes = own.keys() | wider.keys()
                if all(wider.get(axis, sizes[axis]) >= own.get(axis, sizes[axis]) for axis in axes):
                    return True
        return False

    def _proposals(self, surrogate: Surrogate, *, most: int, starts: int = STARTS) -> Iterator[Candidate]:
        """Yield the cuts that the surrogate ranks first, of all sets of widths, the best first."""
        found: list[tuple[float, Candidate]] = []
        counts = self._counts()
        depths: dict[int, list[Pieces]] = {}
        order: list[tuple[float, Widths, int]] = []
        for widths, count in counts.items():
            if count not in depths:
                depths[count] = best_cuts(
                    surrogate, self.space, count, most=most, seed=self.settings.seed, starts=starts
                )
            if depths[count]:
                order.append((surrogate(Candidate(depths[count][0], widths)), widths, count))
        for _, widths, count in sorted(order)[:LOOKED_AT]:
            found += [(surrogate(each), each) for pieces in depths[count] if (each := Candidate(pieces, widths))]
        taken = 0
        for _, each in sorted(found):
            if taken < most and self._can_be(each):
                taken += 1
                yield each

    def _next_moves(self, surrogate: Surrogate, best: Candidate, most: int) -> list[Candidate]:
        """Return the moves from the best cut that the surrogate ranks first, of those that were not measured.

        Other widths come with the surrogate's best cuts in depth. One in a batch is the surrogate's best of all.
        """
        known = self.measured(all_sizes=True)
        moves = [Candidate(pieces, best.widths) for pieces in self.space.moves(best.pieces)]
        ranked = sorted((surrogate(each), each) for each in moves if each not in known)
        others = [
            each for each in self._proposals(surrogate, most=2 * most + len(known), starts=AGAIN) if each not in known
        ]
        chosen: list[Candidate] = others[:1]
        if len(self._counts()) > 1:
            chosen += [each for each in others if each.widths != best.widths][:1]
        for _, each in ranked:
            if len(chosen) >= most:
                break
            if each not in chosen and self._can_be(each):
                chosen.append(each)
        return list(dict.fromkeys([*chosen, *others]))[:most]

    def _can_be(self, candidate: Candidate) -> bool:
        return bool(candidate.features) and self.pricing.can_be(candidate)

    def _can_be_alone(self, candidate: Candidate) -> bool:
        return self.pricing.can_express(candidate)


def _distance(one: Candidate, other: Candidate) -> int:
    """Return how many pieces of one cut another lacks; one more for each width that differs."""
    widths = len(set(one.widths) ^ set(other.widths))
    return len(set(one.pieces) - set(other.pieces)) + widths
