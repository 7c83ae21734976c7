"""The search of `prune`: for a budget or a depth, the best cut by measurement, as a surgery with the record of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.anatomy.halves import Pairing
from surgeon.data.documents import check_there
from surgeon.measure.record import Scores, read_scores_of
from surgeon.models.loading import runs
from surgeon.search.journal import FILE
from surgeon.search.record import Point, SearchRecord, read_search_of
from surgeon.surgery import Surgery
from surgeon.verbs.cut_options import PruneOptions
from surgeon.verbs.pruning import Pruning
from surgeon.verbs.search_task import Kept, Task, fitting, part_of

if TYPE_CHECKING:
    from surgeon.measure.calibration import Calibration
    from surgeon.measure.search_text import SearchText
    from surgeon.verbs.compensating import Texts

UNSEARCHED = "No search yet: the sizes are those of the fewest layers that meet the target, what goes is not decided."
ALONE = "only one text: give --eval-data, another kind of text, to see where the search fits its own rows"
BARE = "the search measured this cut compensated, and here it is bare: give --data, or --repairs-from its result"
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

    def picture(self, *, curve: Sequence[float] | None = None) -> Any:
        """Return the figure of the search."""
        return self.draw_search()

    def searched(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return what the search found, as rows for people and as entries for JSON."""
        number = self.point.number
        rows = [("search", self.record.effort_told), *self.record.rows(chosen=number)]
        return rows, {"search": self.record.told(chosen=number)}

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
        return _made(begun, options, planned, record, Kept(scores, None, options.device))
    task = Task.of(begun, options)
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


def _plainly(begun: Surgery, **more: Any) -> dict[str, Any]:
    """Return the options of an ordinary cut in place of those of a search."""
    none = ("target_parameters", "target_memory", "target_latency", "context", "over", "point", "scores_from")
    return {**dict.fromkeys(none), "score": "uniform", **more}


def _made(begun: Surgery, options: PruneOptions, planned: Planned, record: SearchRecord, kept: Kept) -> Pruning:
    """Return the surgery of a point, with the record among its files."""
    point = record.point(options.point or 1)
    whole = Pairing.of_layers(range(begun.anatomy.depth))
    ranking = record.request.get("width_score", "activation")  # as records say since there is a choice
    sizes: dict[str, Any] = {"width_score": ranking} | {AXIS_OPTIONS[axis]: size for axis, size in point.widths.items()}
    changes = _plainly(begun, layers=None, score="angular", pairing=None if point.pairing == whole else point.pairing)
    step = {"score": "search", "objective": record.objective, "point": point.number, "value": point.worth.kl}
    if record.objective == "loss":
        step["value"] = point.worth.loss
    text, texts = (None, None) if kept.text is None else (_judging(kept.text), fitting(kept.text))
    found = Found(kept.scores, text, texts if options.compensates else None, kept.device, step)
    cut = planned(begun, replace(options, **changes, **sizes), found)
    attachments = {**cut.attachments, FILE: record.to_bytes()}
    notes: tuple[str, ...] = () if kept.text is None or len(kept.text.confirm) > 1 else (ALONE,)
    if record.request.get("compensate") and cut.compensation is None:
        notes += (BARE,)
    values = {item.name: getattr(cut, item.name) for item in fields(Pruning)}
    values |= {"attachments": attachments, "score": "search", "is_named": False}
    values["plan"] = replace(cut.plan, notes=(*cut.plan.notes, *notes))
    return Searched(**values, record=record, point=point)


def _judging(text: "SearchText") -> "Calibration":
    """Return the rows that no step of the search saw, of all its texts, as the text of the perplexities."""
    import torch

    length = min(rows.shape[1] for rows in text.confirm.values())
    tokens = torch.cat([rows[:, :length] for rows in text.confirm.values()])
    return part_of(text, tokens, "rows that the search did not see")
