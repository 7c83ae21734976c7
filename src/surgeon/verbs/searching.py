"""The search of `prune`: for a budget or a depth, the best cut by measurement, as a surgery with the record of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.config import positions_of
from surgeon.anatomy.halves import Pairing
from surgeon.checkpoint.source import Source
from surgeon.data.documents import check_there
from surgeon.errors import PlanError
from surgeon.measure.record import Scores, read_scores_of
from surgeon.models.loading import runs
from surgeon.search.budget import OVER, Budget, Pricing, full_sizes, pairing_of, planned_cut, width_options
from surgeon.search.cuts import Candidate, Space, Widths
from surgeon.search.journal import FILE, opened
from surgeon.search.loop import SCREEN, SEARCH, Search, Settings
from surgeon.search.record import Point, SearchRecord, Worth, name_of, read_search_of
from surgeon.surgery import Surgery
from surgeon.transforms.prune import pruned_sizes, removed_count
from surgeon.verbs.cut_options import PruneOptions
from surgeon.verbs.pruning import Pruning

if TYPE_CHECKING:
    from torch import Tensor

    from surgeon.measure.calibration import Calibration
    from surgeon.measure.search_text import SearchText
    from surgeon.measure.token_time import DeviceMeter
    from surgeon.measure.trials import Trials
    from surgeon.verbs.compensating import Texts

FIT = "rows that fit"
UNSEARCHED = "No search yet: the sizes are those of the fewest layers that meet the target, what goes is not decided."
ALONE = "only one text: give --eval-data, another kind of text, to see where the search fits its own rows"
AXIS_OPTIONS = {"hidden": "hidden_size", "ffn": "intermediate_size", "expert_ffn": "expert_intermediate_size"}
AXIS_OPTIONS |= {"heads": "attention_heads", "kv_heads": "key_value_heads", "experts": "experts"}


@dataclass(frozen=True)
class Found:
    """What a search decided: the scores of widths, the rows that fit and those that judge, and entries of the receipt.

    `texts` are those that a compensation is fitted to and chosen by. All are None for a search of earlier.
    """

    scores: Scores | None
    text: "Calibration | None"
    texts: "Texts | None"
    device: str
    step: Mapping[str, Any]


Planned = Callable[[Surgery, PruneOptions, Found | None], Pruning]


@dataclass(frozen=True, kw_only=True, repr=False)
class Searched(Pruning):
    """A surgery that a search decided; `record` holds every cut that was measured, `point` the one that is made.

    searched = surgeon.prune("gpt2-large", target_parameters="600M", data=["a.txt"], eval_data=["b.txt"])
    print(searched.record)
    searched.save("gpt2-600M")
    """

    record: SearchRecord
    point: Point

    @property
    def headline(self) -> str:
        """The source, and what goes."""
        return f"{self.source.label}, by search, {self.point.told(self.record.depth)}"

    def draw_search(self) -> Any:
        """Return a figure of matplotlib: sizes against the objective, a map of what went, singles and pairs."""
        from surgeon.plots.search import draw_search

        return draw_search(self.record, self.point, title=self._title())


def plan_search(begun: Surgery, options: PruneOptions, planned: Planned) -> Pruning:
    """Return the surgery that a search decides, or a point of one that was made; `planned` plans the cut itself.

    Raises PlanError, with the smallest result there can be, for a target that nothing meets: before any text is read.
    """
    if options.scores_from is not None:
        begun.check_saved()
        record = read_search_of(options.scores_from, begun.source)
        scores = None
        if record.point(options.point or 1).widths:
            place = Path(options.scores_from)
            scores = read_scores_of(place if place.is_dir() else place.parent, begun.source)
        return _made(begun, options, planned, record, _Kept(scores, None, options.device))
    task = _Task.of(begun, options)
    if task.is_met:
        return planned(begun, replace(options, **_plainly(begun, layers=begun.anatomy.depth)), None)
    if not options.measure:
        placeholder = planned(begun, replace(options, **_plainly(begun, layers=task.placeholder)), None)
        notes = (*placeholder.plan.notes, UNSEARCHED)
        return replace(placeholder, plan=replace(placeholder.plan, notes=notes), choice=None, score="search")
    begun.check_saved()
    check_there([*options.data, *options.eval_data])
    with runs(begun.source.label, trust_remote_code=options.trust_remote_code):
        found = task.run()
    if found is None:
        return planned(begun, replace(options, **_plainly(begun, layers=begun.anatomy.depth)), None)
    return _made(begun, options, planned, *found)


@dataclass(frozen=True)
class _Kept:
    """What a search leaves beside its record."""

    scores: Scores | None
    text: "SearchText | None"
    device: str


def _plainly(begun: Surgery, **more: Any) -> dict[str, Any]:
    """Return the options of an ordinary cut in place of those of a search."""
    none = ("target_parameters", "target_memory", "target_latency", "context", "over", "point", "scores_from")
    return {**dict.fromkeys(none), "score": "uniform", **more}


def _made(begun: Surgery, options: PruneOptions, planned: Planned, record: SearchRecord, kept: _Kept) -> Pruning:
    """Return the surgery of a point, with the record among its files."""
    point = record.point(options.point or 1)
    whole = Pairing.of_layers(range(begun.anatomy.depth))
    sizes: dict[str, Any] = {AXIS_OPTIONS[axis]: size for axis, size in point.widths.items()}
    changes = _plainly(begun, layers=None, score="angular", pairing=None if point.pairing == whole else point.pairing)
    step = {"score": "search", "objective": record.objective, "point": point.number, "value": point.worth.kl}
    if record.objective == "loss":
        step["value"] = point.worth.loss
    text, texts = (None, None) if kept.text is None else (_judging(kept.text), _fitting(kept.text))
    found = Found(kept.scores, text, texts if options.compensates else None, kept.device, step)
    cut = planned(begun, replace(options, **changes, **sizes), found)
    attachments = {**cut.attachments, FILE: record.to_bytes()}
    notes = () if kept.text is None or len(kept.text.confirm) > 1 else (ALONE,)
    values = {item.name: getattr(cut, item.name) for item in fields(Pruning)}
    values |= {"attachments": attachments, "score": "search", "is_named": False}
    values["plan"] = replace(cut.plan, notes=(*cut.plan.notes, *notes))
    return Searched(**values, record=record, point=point)


def _judging(text: "SearchText") -> "Calibration":
    """Return the rows that no step of the search saw, of all its texts, as the text of the perplexities."""
    import torch

    length = min(rows.shape[1] for rows in text.confirm.values())
    tokens = torch.cat([rows[:, :length] for rows in text.confirm.values()])
    return _part(text, tokens, "rows that the search did not see")


def _fitting(text: "SearchText") -> "Texts":
    """Return the rows that a repair is fitted to, and those that it is chosen by."""
    from surgeon.verbs.compensating import Texts

    return Texts(_part(text, text.fit, FIT), None if text.held is None else _part(text, text.held, "rows held out"))


def _part(text: "SearchText", tokens: "Tensor", part: str) -> "Calibration":
    """Return some rows of the texts of a search."""
    from surgeon.data.rows import digest
    from surgeon.measure.calibration import Calibration

    sources = [item for origin in text.origins.values() for item in origin["sources"]]
    shape = {"sha256": digest(tokens), "rows": tokens.shape[0], "sequence_length": tokens.shape[1]}
    return Calibration(tokens, {"sources": sources, **shape, "part": part}, text.notes)


# --- the task ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A search that can be made: what may change, and what of it meets the budget."""

    begun: Surgery
    options: PruneOptions
    budget: Budget
    over: tuple[str, ...]
    space: Space
    widths: tuple[Widths, ...]

    @classmethod
    def of(cls, begun: Surgery, options: PruneOptions) -> "_Task":
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

    def run(self) -> tuple[SearchRecord, _Kept] | None:
        """Return the record of the search, and what it leaves beside it; None where the model meets the target."""
        from surgeon.measure.search_text import search_text
        from surgeon.measure.trials import Trials
        from surgeon.models.device import resolve_device
        from surgeon.plan.planned import PlannedSource
        from surgeon.verbs.compensating import compensated

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
        scores = self._scores(text, device) if any(self.widths) else None
        values = None if scores is None else scores.widths.get("activation")
        texts = _fitting(text)

        def finish(candidate: Candidate) -> Source:
            sizes, pairing = full_sizes(anatomy, candidate.widths), pairing_of(anatomy, candidate)
            plan = planned_cut(anatomy, pairing, sizes, criterion="activation", values=values, seed=options.seed)
            source, whole, _ = compensated(begun.source, begun.plan, plan, anatomy, texts, device=device)
            return PlannedSource(source, whole)

        trials = Trials(
            begun.source,
            anatomy,
            text.rows,
            device=device,
            halves="halves" in self.over,
            values=values,
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
            search = Search(journal, pricing, self.space, self.widths, settings)
            ranked = search.run()
            journal.write()
            record = _record(search, ranked, self, text, trials)
        return record, _Kept(scores, text, device)

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
        """Return the importance of the positions that narrower cuts choose from, on the rows that fit."""
        from surgeon.measure.scoring import ScoreRequest, score

        request = ScoreRequest(widths=["activation"], device=device, seed=self.options.seed)
        return score(self.begun.source, text.fit, request, data=_part(text, text.fit, FIT).origin)

    def _request(self, text: "SearchText") -> dict[str, Any]:
        """Return what decides the figures: a state that was begun with another request is not gone on with."""
        return {
            "model": self.begun.source.provenance(),
            "texts": {name: origin["sha256"] for name, origin in text.origins.items()},
            "rows": {name: list(rows.shape) for name, rows in text.rows.items()} | {"fit": list(text.fit.shape)},
            "seed": self.options.seed,
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
            "compensate": options.compensates,
            "protect": list(options.protect or (0, 0)),
            "evaluations": options.evaluations,
            "seconds": options.seconds,
            "seed": options.seed,
        }


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
        sizes = pruned_sizes(anatomy, options.sizes) or {}
        fixed = tuple((axis, size) for axis, size in given.items() if size != anatomy.sizes[axis])
        assert sizes is not None
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
    search: Search, ranked: Sequence[Candidate], task: _Task, text: "SearchText", trials: "Trials"
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
        share = cost.parameters / whole.parameters
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
        texts={"used": text.origins, **{name: list(rows.shape) for name, rows in text.rows.items()}},
        whole=whole.to_dict(),
        points=tuple(points),
        singles={name_of(each.features[0]): cost for each, cost in screen.items() if len(each.features) == 1},
        pairs=[(*each.pieces, cost) for each, cost in screen.items() if len(each.pieces) == 2],
        factors={"scale": fitted.scale, "eta": fitted.eta},
        effort={"passes": trials.effort.passes, "heads": float(trials.effort.heads), "seconds": journal.seconds},
        stopped=search.stopped,
        tables=dict(journal.tables),
    )
