"""The work of a search: what may change, what of it meets the budget, on which rows it is measured, and its record."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.config import positions_of
from surgeon.anatomy.halves import Pairing
from surgeon.checkpoint.source import Source
from surgeon.cost.drafting import time_share
from surgeon.errors import PlanError
from surgeon.measure.record import Scores
from surgeon.search.budget import OVER, Budget, Pricing, full_sizes, pairing_of, planned_cut, width_options
from surgeon.search.cuts import Candidate, Space, Widths
from surgeon.search.journal import FILE, opened
from surgeon.search.loop import SCREEN, SEARCH, Search, Settings
from surgeon.search.openings import Openings
from surgeon.search.record import Point, SearchRecord, Worth, name_of
from surgeon.surgery import Surgery
from surgeon.transforms.layers import planned
from surgeon.transforms.prune import pruned_sizes, removed_count
from surgeon.verbs.compensating import Texts, compensated
from surgeon.verbs.cut_options import PruneOptions

if TYPE_CHECKING:
    from torch import Tensor

    from surgeon.measure.calibration import Calibration
    from surgeon.measure.search_text import SearchText
    from surgeon.measure.token_time import DeviceMeter
    from surgeon.measure.trials import Trials

FIT = "rows that fit"
BLOCK = "angular"  # the score of blocks by which a search begins
SINGLE = ("block-influence", "relative-magnitude")  # and those of single layers


@dataclass(frozen=True)
class Kept:
    """What a search leaves beside its record."""

    scores: Scores | None
    text: "SearchText | None"
    device: str


@dataclass(frozen=True)
class Task:
    """A search that can be made: what may change, and what of it meets the budget."""

    begun: Surgery
    options: PruneOptions
    budget: Budget
    over: tuple[str, ...]
    space: Space
    widths: tuple[Widths, ...]

    @classmethod
    def of(cls, begun: Surgery, options: PruneOptions) -> "Task":
        """Return the task of the options. Raises PlanError for what cannot change, and for a budget beyond reach."""
        anatomy = begun.anatomy
        layers = None
        if options.layers is not None:
            layers = anatomy.depth - removed_count(anatomy, options.layers)
        budget = Budget(
            parameters=options.parameters,
            memory=options.nbytes,
            milliseconds=options.target_latency,
            layers=layers,
        )
        over, widths = _over(anatomy, options, has_depth=layers is not None)
        depth = Space.of(
            anatomy.depth,
            layers="layers" in over,
            halves="halves" in over,
            protect=options.protect or (0, 0),
        )
        task = cls(begun, options, budget, over, depth, widths)
        if layers is None and options.target_latency is None and options.context is None:
            Pricing(anatomy, budget).check(depth, widths)
        elif layers is not None and anatomy.depth - layers > depth.most:
            raise PlanError(
                f"{anatomy.depth - layers} of {anatomy.depth} layers cannot go: {depth.most} can",
                hint="Ask for more layers, or protect fewer.",
            )
        return task

    @property
    def is_met(self) -> bool:
        """Whether the model is within the budget as it is, by its headers alone."""
        if self.budget.layers is not None:
            return self.budget.layers == self.begun.anatomy.depth and self.widths == ((),)
        if self.options.target_latency is not None or self.options.context is not None:
            return False
        return self.budget.allows(Pricing(self.begun.anatomy, self.budget).cost(Candidate(())))

    @property
    def placeholder(self) -> int:
        """The depth of the result while nothing was measured."""
        if self.budget.layers is not None:
            return self.budget.layers
        pricing = Pricing(self.begun.anatomy, replace(self.budget, milliseconds=None))
        fewest = [count for each in self.widths if (count := pricing.fewest(each, self.space)) is not None]
        plain = pricing.fewest((), self.space)
        return self.begun.anatomy.depth - (plain if plain is not None else min(fewest, default=0))

    def run(self) -> tuple[SearchRecord, Kept] | None:
        """Return the record of the search, and what it leaves beside it; None where the model meets the target."""
        from surgeon.measure.search_text import search_text
        from surgeon.measure.trials import Trials
        from surgeon.models.device import resolve_device
        from surgeon.plan.planned import PlannedSource

        begun, options, anatomy = self.begun, self.options, self.begun.anatomy
        device = resolve_device(options.device)
        meter = self._meter(device)
        text = search_text(
            begun.source,
            options.data,
            options.eval_data,
            samples=options.samples,
            sequence_length=options.sequence_length,
            device=device,
            seed=options.seed,
            columns=options.columns,
        )
        scores = self._scores(text, device)
        values = scores.widths.get(options.width_ranking) if any(self.widths) else None
        texts = fitting(text)

        def finish(candidate: Candidate) -> Source:
            sizes, pairing = full_sizes(anatomy, candidate.widths), pairing_of(anatomy, candidate)
            plan = planned_cut(
                anatomy, pairing, sizes, criterion=options.width_ranking, values=values, seed=options.seed
            )
            source, whole, _ = compensated(begun.source, begun.plan, plan, anatomy, texts, device=device)
            return PlannedSource(source, whole)

        trials = Trials(
            begun.source,
            anatomy,
            text.rows,
            device=device,
            halves="halves" in self.over,
            values=values,
            criterion=options.width_ranking,
            fit=texts.rows() if options.compensates else None,
            finish=finish,
            bare=(SCREEN,),
        )
        place = None if options.search_dir is None else options.search_dir / FILE
        with opened(place, self._request(text), trials.measure) as journal:
            journal.repaired, journal.bare = options.compensates, (SCREEN,)
            pricing = Pricing(anatomy, self.budget, meter, repairs=options.compensates)
            if meter is not None:
                meter.known = journal.tables
                pricing.check(self.space, self.widths)
                if pricing.meets(Candidate(())):
                    return None
            settings = Settings(
                objective=options.objective,
                evaluations=options.evaluations,
                seconds=options.seconds,
                seed=options.seed,
                watches=text.watch is not None,
                texts=tuple(text.confirm),
            )
            search = Search(journal, pricing, self.space, self.widths, settings, _openings(scores))
            ranked = search.run()
            journal.write()
            record = _record(search, ranked, self, text, trials)
        return record, Kept(scores if any(self.widths) else None, text, device)

    def _meter(self, device: str) -> "DeviceMeter | None":
        if self.options.context is None and self.options.target_latency is None:
            return None
        from surgeon.measure.token_time import DeviceMeter, check_context
        from surgeon.models.device import compute_dtype

        if self.options.context is not None:
            check_context(self.begun.anatomy, self.options.context, positions_of(self.begun.source))
        return DeviceMeter(
            self.begun.anatomy,
            device,
            compute_dtype(self.begun.source, device),
            context=self.options.context,
            times=self.options.target_latency is not None,
        )

    def _scores(self, text: "SearchText", device: str) -> Scores:
        """Return the scores of layers, and of the positions that narrower cuts choose from, on the rows that fit."""
        from surgeon.measure.scoring import ScoreRequest, score

        layers = (BLOCK, *SINGLE) if self.space.free else ()
        widths = [self.options.width_ranking] if any(self.widths) else []
        request = ScoreRequest(layers=layers, widths=widths, device=device, seed=self.options.seed)
        return score(self.begun.source, text.fit, request, data=part_of(text, text.fit, FIT).origin)

    def _request(self, text: "SearchText") -> dict[str, Any]:
        """Return what decides the figures: a state that was begun with another request is not gone on with."""
        return {
            "model": self.begun.source.provenance(),
            "texts": {name: origin["sha256"] for name, origin in text.origins.items()},
            "rows": {name: list(rows.shape) for name, rows in text.rows.items()} | {"fit": list(text.fit.shape)},
            "seed": self.options.seed,
            "width_score": self.options.width_ranking,
        }

    @property
    def goal(self) -> dict[str, Any]:
        """What was searched for, as the record holds it."""
        options = self.options
        return {
            "objective": options.objective,
            "target_parameters": self.budget.parameters,
            "target_memory": self.budget.memory,
            "target_latency": self.budget.milliseconds,
            "layers": self.budget.layers,
            "context": options.context,
            "over": list(self.over),
            "width_score": options.width_ranking,
            "compensate": options.compensates,
            "protect": list(options.protect or (0, 0)),
            "evaluations": options.evaluations,
            "seconds": options.seconds,
            "seed": options.seed,
        }


def _openings(scores: Scores) -> Openings:
    """Return what scores say of layers; nothing where none was taken."""
    layers = scores.layers
    return Openings(layers.get(BLOCK, ()), [layers[name] for name in SINGLE if name in layers])


def fitting(text: "SearchText") -> Texts:
    """Return the rows that a repair is fitted to, and those that it is chosen by."""
    return Texts(part_of(text, text.fit, FIT), None if text.held is None else part_of(text, text.held, "rows held out"))


def part_of(text: "SearchText", tokens: "Tensor", part: str) -> "Calibration":
    """Return some rows of the texts of a search."""
    from surgeon.data.rows import digest
    from surgeon.measure.calibration import Calibration

    sources = [item for origin in text.origins.values() for item in origin["sources"]]
    shape = {"sha256": digest(tokens), "rows": tokens.shape[0], "sequence_length": tokens.shape[1]}
    return Calibration(tokens, {"sources": sources, **shape, "part": part}, text.notes)


def _over(anatomy: Anatomy, options: PruneOptions, *, has_depth: bool) -> tuple[tuple[str, ...], tuple[Widths, ...]]:
    """Return what a search may change, and the widths that it may give the result.

    Raises PlanError for a part that this model cannot change, where it was named.
    """
    asked = None if options.over is None else tuple(word for word in OVER if word in options.over.split(","))
    given = {axis: size for axis, size in options.sizes.items() if size is not None}
    over = asked or tuple(word for word in OVER if not (OVER[word] and (has_depth or given)))
    if "halves" in over and (reason := halves_refused(anatomy)) is not None:
        if asked is not None:
            raise reason
        over = tuple(word for word in over if word != "halves")
    if given:
        if asked is not None and any(OVER[word] for word in asked):
            raise PlanError("sizes are given beside widths to search over", hint="Leave out the sizes, or --over.")
        pruned_sizes(anatomy, options.sizes)  # refuses what cannot be
        fixed = tuple((axis, size) for axis, size in given.items() if size != anatomy.sizes[axis])
        return over, (fixed,)
    options_of = width_options(anatomy, over)
    if asked is not None:
        for word in asked:
            if OVER[word] and not any(axis in OVER[word] for widths in options_of for axis, _ in widths):
                raise PlanError(
                    f"this {anatomy.model_type} has no other legal {word}", hint=f"Leave {word} out of --over."
                )
    if "layers" not in over and "halves" not in over and len(options_of) < 2:
        raise PlanError("nothing of this model may change", hint="Add layers to --over.")
    return over, options_of


def halves_refused(anatomy: Anatomy) -> PlanError | None:
    """Return why no half layer of this model can go alone; None where it can."""
    refusal: PlanError | None = None
    for first in range(anatomy.depth - 1):  # an MLP and the next attention; families may refuse some layers only
        attention = tuple(layer for layer in range(anatomy.depth) if layer != first + 1)
        mlp = tuple(layer for layer in range(anatomy.depth) if layer != first)
        try:
            planned_cut(anatomy, Pairing(attention, mlp), None)
        except PlanError as error:
            refusal = error
        else:
            return None
    return refusal or PlanError("a model of one layer has no half that can go", hint="Leave halves out of --over.")


# --- the record -------------------------------------------------------------------------------------------------


def _record(
    search: Search, ranked: Sequence[Candidate], task: Task, text: "SearchText", trials: "Trials"
) -> SearchRecord:
    """Return the record of a search that is over: the confirmed cuts first, then all others by their objective."""
    begun = task.begun
    journal, pricing, objective = search.journal, search.pricing, search.settings.objective
    costs, all_costs = search.measured(), search.measured(all_sizes=True)
    order = [*ranked, *sorted((each for each in costs if each not in ranked), key=lambda each: (costs[each], each))]
    order += sorted((each for each in all_costs if each not in costs), key=lambda each: pricing.cost(each).parameters)
    whole = pricing.cost(Candidate(()))
    figures = journal.measured(SEARCH)
    confirmed = {name: journal.measured(name) for name in search.settings.texts}
    best = ranked[0]
    points = []
    for number, each in enumerate(order, 1):
        cost = pricing.cost(each)
        share = _share(begun.anatomy, pricing, each)
        if cost.milliseconds is not None and whole.milliseconds:
            share = cost.milliseconds / whole.milliseconds
        points.append(
            Point(
                number=number,
                pairing=pairing_of(begun.anatomy, each),
                widths=dict(each.widths),
                cost=cost,
                worth=Worth.of(figures[each], None if each == best else figures[best], objective),
                confirmed={
                    name: Worth.of(own[each], None if each == best else own[best], objective)
                    for name, own in confirmed.items()
                    if each in own
                },
                share=share,
                refused=each in search.refused,
                within=each in costs,
            )
        )
    screened = journal.measured(SCREEN)
    screen = {each: search.cost(SCREEN, each, own) for each, own in screened.items() if each.features}
    fitted = search.fitted
    return SearchRecord(
        model=begun.source.provenance(),
        depth=begun.anatomy.depth,
        request=task.goal,
        texts=[{"data": name, **origin} for name, origin in text.origins.items()],
        whole=whole.to_dict(),
        points=tuple(points),
        singles={name_of(each.features[0]): cost for each, cost in screen.items() if len(each.features) == 1},
        pairs=[(*each.pieces, cost) for each, cost in screen.items() if len(each.pieces) == 2],
        factors={"scale": fitted.scale, "eta": fitted.eta, **fitted.widths},
        effort={"passes": trials.effort.passes, "heads": float(trials.effort.heads), "seconds": journal.seconds},
        stopped=search.stopped,
        tables=dict(journal.tables),
    )


def _share(anatomy: Anatomy, pricing: Pricing, candidate: Candidate) -> float:
    """Return the time of a cut's token beside the model's, as far as the weights that it reads say."""
    plan = planned_cut(anatomy, pairing_of(anatomy, candidate), pricing.sizes(candidate.widths))
    return time_share(planned(anatomy, plan), anatomy)
