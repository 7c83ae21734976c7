"""What a search found, as search.json in a result: every cut that was measured, in its order, each of which can be cut.

Pure data: no torch, no weights.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from surgeon import text
from surgeon.anatomy.halves import Pairing
from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.receipt import to_bytes, versions
from surgeon.checkpoint.source import Source, inside
from surgeon.cost.drafting import DraftSpeed, draft_speed
from surgeon.errors import CheckpointError, MeasureError, PlanError
from surgeon.mistyped import hint_beside
from surgeon.search.budget import Cost
from surgeon.search.figures import Figures
from surgeon.search.journal import FILE, FORMAT, MOST_BYTES
from surgeon.showing import Shown

AGAIN = "Search again: leave out --scores-from."
SHOWN = 5  # points of the table for people


@dataclass(frozen=True, kw_only=True)
class Worth:
    """The means of a cut on one text, per token: loss and KL in nats, acceptance and agreement as shares.

    `above` is by how much its objective is above that of the chosen cut on the same rows, `error` the error of this
    paired difference; None for the chosen one, and where one row has no error.
    """

    loss: float
    kl: float
    acceptance: float
    agreement: float
    above: float | None = None
    error: float | None = None

    @classmethod
    def of(cls, figures: Figures, chosen: Figures | None, objective: str) -> "Worth":
        """Return the means of figures, beside those of the chosen cut on the same rows (None: it is the chosen)."""
        above, error = (None, None) if chosen is None else figures.over(chosen, objective)
        return cls(
            loss=figures.mean("loss"),
            kl=figures.mean("kl"),
            acceptance=figures.acceptance,
            agreement=figures.mean("agreeing"),
            above=above,
            error=error if error is not None and error < float("inf") else None,
        )


@dataclass(frozen=True, kw_only=True)
class Point:
    """A cut that was measured: its halves, its widths where they changed, what it costs, and what it is worth.

    `worth` is on the rows of the search, `confirmed` on texts that the search did not see, by their names. `share` is
    the time of its token beside the source's: measured, or by parameters.
    """

    number: int
    pairing: Pairing
    widths: Mapping[str, int]
    cost: Cost
    worth: Worth
    confirmed: Mapping[str, Worth] = field(default_factory=dict)
    share: float = 1.0
    refused: bool = False  # by the second text
    within: bool = True  # the budget; the others are on the way to it

    @property
    def acceptance(self) -> float:
        """The share of its tokens that the source would accept: on texts that the search did not see, where known."""
        known = [worth.acceptance for worth in self.confirmed.values()] or [self.worth.acceptance]
        return sum(known) / len(known)

    @property
    def draft(self) -> DraftSpeed:
        """How fast the source would write with this cut as its draft."""
        return draft_speed(self.acceptance, self.share)

    def to_dict(self) -> dict[str, Any]:
        """Return this as search.json and --json hold it."""
        draft = self.draft
        return {
            "point": self.number,
            "attention": list(self.pairing.attention),
            "mlp": list(self.pairing.mlp),
            "widths": dict(self.widths),
            **self.cost.to_dict(),
            **asdict(self.worth),
            "confirmed": [{"data": name, **asdict(worth)} for name, worth in self.confirmed.items()],
            "time_share": self.share,
            "draft": {"speed": draft.times, "tokens": draft.tokens, "pays": draft.times > 1.0},
            "refused": self.refused,
            "within": self.within,
        }

    def told(self, depth: int) -> str:
        """Return in words what goes, and what becomes narrower: "without layers 3-5, with ffn 1024"."""
        attention, mlp = set(range(depth)) - set(self.pairing.attention), set(range(depth)) - set(self.pairing.mlp)
        both = attention & mlp
        parts = [f"layers {text.layers(sorted(both))}"] if both else []
        parts += [f"attention {text.layers(sorted(attention - both))}"] if attention - both else []
        parts += [f"MLP {text.layers(sorted(mlp - both))}"] if mlp - both else []
        widths = [f"{axis} {size}" for axis, size in self.widths.items()]
        told = [f"without {', '.join(parts)}"] if parts else []
        told += [f"with {', '.join(widths)}"] if widths else []
        return ", ".join(told) or "unchanged"


@dataclass(frozen=True, repr=False, kw_only=True)
class SearchRecord(Shown):
    """A finished search. `points` are all cuts that were measured, the chosen one first; their numbers begin at 1.

    The last ones are larger than the budget: the surrogate's best at a few sizes on the way to it.

    `texts` say where the rows were from, and their hashes. `whole` is the source's cost. `singles` are what each piece
    and each width costs alone on a few rows, by its name, `pairs` what two layers cost together, in nats of the
    objective.
    """

    model: Mapping[str, Any]
    depth: int
    request: Mapping[str, Any]
    texts: Sequence[Mapping[str, Any]]
    whole: Mapping[str, Any]
    points: tuple[Point, ...]
    singles: Mapping[str, float]
    pairs: Sequence[tuple[int, int, float]]
    factors: Mapping[str, float]
    effort: Mapping[str, float]
    stopped: str
    tables: Mapping[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> Point:
        """The best cut."""
        return self.points[0]

    @property
    def objective(self) -> str:
        """What was minimised: "kl" or "loss"."""
        return str(self.request["objective"])

    @property
    def headline(self) -> str:
        """How many cuts were measured, and what goes in the best."""
        return f"{len(self.points)} cuts measured; the best is {self.chosen.told(self.depth)}"

    def point(self, number: int) -> Point:
        """Return a cut by its number. Raises PlanError where there is none."""
        if not 1 <= number <= len(self.points):
            raise PlanError(
                f"there is no point {number}", hint=f"The search measured {len(self.points)}: --point 1 is the chosen."
            )
        return self.points[number - 1]

    def to_text(self) -> str:
        """Return the best points for people."""
        return f"{text.rows([('search', self.headline)])}\n\n{self.table()}"

    def table(self, most: int = SHOWN) -> str:
        """Return the best points as a table: size, time, KL, loss, acceptance, speed as a draft."""
        timed = any(point.cost.milliseconds is not None for point in self.points)
        unseen = list(self.points[0].confirmed)
        header = ["point", "cut", "parameters", *(["ms a token"] if timed else []), "KL", "loss"]
        header += [f"{self.objective} on {Path(name).name}" for name in unseen] + ["acceptance", "as a draft"]
        lines = [self._line(point, timed=timed, unseen=unseen) for point in self.points[:most]]
        return text.table(header, lines)

    def _line(self, point: Point, *, timed: bool, unseen: Sequence[str]) -> list[str]:
        worths = [point.confirmed.get(name) for name in unseen]
        return [
            str(point.number),
            point.told(self.depth),
            f"{point.cost.parameters:,}",
            *([f"{point.cost.milliseconds:.3g}" if point.cost.milliseconds is not None else "-"] if timed else []),
            _with_error(point.worth, "kl", self.objective),
            _with_error(point.worth, "loss", self.objective),
            *(("-" if worth is None else _with_error(worth, self.objective, self.objective)) for worth in worths),
            f"{point.acceptance:.3f}",
            point.draft.told,
        ]

    @property
    def effort_told(self) -> str:
        """How much was measured, and why the search ended."""
        passes, seconds = self.effort["passes"], self.effort["seconds"]
        told = f"{len(self.points)} cuts measured in {text.duration(seconds)}, {passes:.0f} passes of the whole model"
        return f"{told}; it ended because {self.stopped}" if self.stopped else told

    def rows(self, *, chosen: int = 1, most: int = 3) -> list[tuple[str, str]]:
        """Return the cut that is made and the next best ones, a row each, for people."""
        numbers = [chosen, *(point.number for point in self.points if point.number != chosen)][:most]
        return [(f"point {number}", self._told(self.point(number))) for number in numbers]

    def _told(self, point: Point) -> str:
        parts = [point.told(self.depth), f"{point.cost.parameters:,} parameters"]
        parts += [f"{point.cost.milliseconds:.3g} ms a token"] if point.cost.milliseconds is not None else []
        parts += [f"KL {_with_error(point.worth, 'kl', self.objective)}"]
        parts += [f"loss {_with_error(point.worth, 'loss', self.objective)}"]
        for name, worth in point.confirmed.items():
            shown = f"{self.objective if self.objective == 'loss' else 'KL'} on {Path(name).name}"
            parts += [f"{shown} {_with_error(worth, self.objective, self.objective)}"]
        parts += [f"acceptance {point.acceptance:.3f}", f"as a draft {point.draft.told}"]
        return "; ".join(parts)

    def told(self, *, chosen: int = 1, most: int = SHOWN) -> dict[str, Any]:
        """Return the record as --json prints it: the cut that is made, and the best few."""
        return {
            "objective": self.objective,
            "chosen": self.point(chosen).to_dict(),
            "best": [point.to_dict() for point in self.points[:most]],
            "points": len(self.points),
            "whole": dict(self.whole),
            "effort": dict(self.effort),
            "stopped": self.stopped,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the record as search.json holds it."""
        return {
            "format": FORMAT,
            "finished": True,
            "model": dict(self.model),
            "depth": self.depth,
            "request": dict(self.request),
            "texts": [dict(text) for text in self.texts],
            "whole": dict(self.whole),
            "points": [point.to_dict() for point in self.points],
            "singles": dict(self.singles),
            "pairs": [list(pair) for pair in self.pairs],
            "factors": dict(self.factors),
            "effort": dict(self.effort),
            "stopped": self.stopped,
            "tables": dict(self.tables),
            "versions": versions(),
        }

    def to_bytes(self) -> bytes:
        """Return the record as a file."""
        return to_bytes(self.to_dict())


def _with_error(worth: Worth, of: str, objective: str) -> str:
    """Return a mean, and beside the objective's how far above the chosen cut's it is, with the error."""
    value = f"{getattr(worth, of):.4f}"
    if of != objective or worth.above is None:
        return value
    return f"{value} ({worth.above:+.4f}" + (f" ± {worth.error:.4f})" if worth.error is not None else ")")


def name_of(feature: object) -> str:
    """Return the name of a piece, or of a width, in a record: "layer 3", "MLP 3 + attention 4", "ffn 1024"."""
    if isinstance(feature, tuple):
        return f"{feature[0]} {feature[1]}"
    assert isinstance(feature, int)
    layer = feature // 2
    return f"layer {layer}" if feature % 2 == 0 else f"MLP {layer} + attention {layer + 1}"


# --- reading ----------------------------------------------------------------------------------------------------


def read_search_of(place: str | os.PathLike[str], source: Source) -> SearchRecord:
    """Return the record in a file or in a result. Raises MeasureError for another model's, or a search not finished."""
    path = Path(place)
    path = inside(path, FILE) if path.is_dir() else path
    record = read_search(path)
    provenance = source.provenance()
    for key in ("fingerprint", "commit"):
        if record.model.get(key) is not None and provenance.get(key) is not None:
            if record.model[key] != provenance[key]:
                raise MeasureError(f"{path} is of other weights than those of {source.label}", hint=AGAIN)
            return record
    raise MeasureError(f"{path} does not say that it is of {source.label}", hint=AGAIN)


def read_search(path: Path) -> SearchRecord:
    """Return the record in a file. Raises MeasureError for a file that holds none, or a search that is not finished."""
    try:
        content = read_json(path, most=MOST_BYTES)
    except CheckpointError as error:
        hint = AGAIN if path.exists() else hint_beside(path, "surgeon prune --target-parameters writes search.json.")
        raise MeasureError(str(error), hint=hint) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MeasureError(f"{path} is no record of a search that this surgeon wrote", hint=AGAIN)
    if not content.get("finished"):
        raise MeasureError(
            f"the search in {path} is not finished", hint="Give the command that began it again: it goes on."
        )
    try:
        return _parsed(content)
    except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
        raise MeasureError(f"{path} is damaged: {type(error).__name__} {error}", hint=AGAIN) from error


def _parsed(content: Mapping[str, Any]) -> SearchRecord:
    depth = content["depth"]
    if type(depth) is not int or not isinstance(content["model"], dict) or not content["points"]:
        raise ValueError("it names no model, or no point")
    points = tuple(_point(entry, number, depth) for number, entry in enumerate(content["points"], 1))
    return SearchRecord(
        model=content["model"],
        depth=depth,
        request=dict(content["request"]),
        texts=[dict(text) for text in content["texts"]],
        whole=dict(content["whole"]),
        points=points,
        singles={str(name): float(value) for name, value in content["singles"].items()},
        pairs=[(int(one), int(other), float(cost)) for one, other, cost in content["pairs"]],
        factors=dict(content["factors"]),
        effort=dict(content["effort"]),
        stopped=str(content["stopped"]),
        tables=dict(content["tables"]),
    )


def _point(entry: Mapping[str, Any], number: int, depth: int) -> Point:
    pairing = Pairing(tuple(map(int, entry["attention"])), tuple(map(int, entry["mlp"])))
    pairing.check(depth)
    widths = {str(axis): int(size) for axis, size in entry["widths"].items()}
    return Point(
        number=number,
        pairing=pairing,
        widths=widths,
        cost=Cost(int(entry["parameters"]), int(entry["bytes"]), entry.get("cache_bytes"), entry.get("milliseconds")),
        worth=_worth(entry),
        confirmed={str(worth["data"]): _worth(worth) for worth in entry["confirmed"]},
        share=float(entry["time_share"]),
        refused=bool(entry["refused"]),
        within=bool(entry["within"]),
    )


def _worth(entry: Mapping[str, Any]) -> Worth:
    names = ("loss", "kl", "acceptance", "agreement")
    above, error = entry.get("above"), entry.get("error")
    return Worth(**{name: float(entry[name]) for name in names}, above=above, error=error)
