"""`surgeon prune`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgeon import text
from surgeon.cli import clock, command
from surgeon.cli.command import Model, Writing, spread
from surgeon.errors import PlanError
from surgeon.options import Checked, OptionError, option, reads_of
from surgeon.plots.figure import check_picture, save
from surgeon.plots.pruning import NOTHING, NOTHING_HINT
from surgeon.processes import speaks, together
from surgeon.search.journal import remove
from surgeon.surgery import open_model
from surgeon.transforms.choose import Choice
from surgeon.verbs import prune as verb
from surgeon.verbs.cut_options import CutOptions, PruneOptions, RunOptions
from surgeon.verbs.pruning import Pruning
from surgeon.verbs.search_options import SEARCH, SearchOptions

GROUP = "surgery"
EXAMPLE = "surgeon prune gpt2-large --score angular --layers 27 --data text.txt -o gpt2-27"


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Checked):
    """The options for what is drawn, and measured to be drawn."""

    curve: bool = option(
        "Measure the perplexity for every number of layers removed, up to half of them.", False, group="text"
    )
    plot: Path | None = option(
        "Draw the scores, a map of what goes, and the curve, to this .png, .svg or .pdf.",
        None,
        metavar="FILE",
        writes=True,
        group="output",
    )


@spread
def prune(
    model: Model,
    *,
    cut: CutOptions,
    search: SearchOptions,
    running: RunOptions,
    writing: Writing,
    pictures: PictureOptions,
) -> None:
    """Remove the layers, neurons, heads and experts that matter least."""
    options = PruneOptions(**vars(cut), **vars(search), **vars(running))
    curve, plot = pictures.curve, pictures.plot
    if plot is not None:
        check_picture(plot, reads_of(options) | {"MODEL": (model,)}, overwrite=writing.overwrite, option="plot")
    if curve and options.keep_pattern:
        raise OptionError(
            "curve", "a curve removes layers one by one, not in whole periods", hint="Leave out --keep-pattern."
        )
    if curve and options.names_layers:
        raise OptionError(
            "curve", "no score says which layers would go next: they are named", hint="Leave out --curve."
        )
    if curve and options.score == SEARCH:
        raise OptionError(
            "curve", "a search measures what it needs, and a curve removes layers by a score", hint="Leave out --curve."
        )
    with together(options.device):
        _prune(model, options, writing, curve=curve, plot=plot)


def _prune(model: str, options: PruneOptions, writing: Writing, *, curve: bool, plot: Path | None) -> None:
    """Measure, write and report. Processes that a launcher started do this together."""
    own: Path | None = None  # the state of a search, which ends with its result
    begun = open_model(model, revision=options.revision)
    surgery = verb.plan_pruning(begun, replace(options, measure=False))
    if not writing.dry_run:
        command.check(surgery, writing)  # before scoring, which may take an hour
        if options.score == SEARCH and options.search_dir is None:
            output = surgery.summary(writing.output).output
            own = output.with_name(f"{output.name}.search")
            options = replace(options, search_dir=own)
        with clock.part("searching" if options.score == SEARCH else "scoring"):
            surgery = verb.plan_pruning(begun, options)
    report = PruneReport(surgery, evaluate=options.evaluate, curve=curve, plot=plot)
    if not writing.dry_run:
        report.check()
        with clock.part("measuring"):
            if options.evaluate:  # what cannot be run is known before anything is written
                report = replace(report, before=surgery.perplexity())
            if curve:
                report = replace(report, without=surgery.curve())
    command.run(surgery, writing, report=report, columns=options.columns)
    if own is not None:
        remove(own)


@dataclass(frozen=True)
class PruneReport:
    """Reports the choice before the result is written, and its cost in perplexity afterwards."""

    surgery: Pruning
    evaluate: bool
    curve: bool
    plot: Path | None
    before: float | None = None  # the perplexity of the source
    without: Sequence[float] | None = None  # the curve

    def check(self) -> None:
        """Raises PlanError for a curve or a picture without data, before anything is written."""
        if self.curve and self.surgery.text is None:
            raise OptionError(
                "curve", "a curve is measured on a text, and there is none", hint="Give one: --data FILE."
            )
        if self.curve:
            from surgeon.models.skeleton import predicts_next

            if not predicts_next(self.surgery.source):
                raise PlanError("this model has no perplexity to draw a curve of", hint="Leave out --curve.")
        if self.plot is not None and not self.curve and not self.surgery.removed and self.surgery.scores is None:
            raise PlanError(NOTHING, hint=NOTHING_HINT)

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the choice, as rows for people and as entries for JSON."""
        surgery, choice = self.surgery, self.surgery.choice
        entries: dict[str, Any] = {
            "score": surgery.score,
            "scores": {} if surgery.scores is None else dict(surgery.scores.layers),
            "dropped": None if choice is None else list(choice.dropped),
            **({} if choice is None or choice.pairing is None else _halves(choice)),
            "value": None if choice is None else choice.score,
            "next_best": None if choice is None or choice.next_best is None else list(choice.next_best),
            "next_value": None if choice is None else choice.next_score,
        }
        rows: list[tuple[str, str]] = []
        if choice is not None and choice.words:
            by = f"by {surgery.score}{_value(choice.score)}" if not surgery.is_named else "as named"
            rows.append(("dropped", f"{choice.words}  ({by})"))
            if choice.next_best is not None:
                rows.append(("next best", f"layers {text.layers(choice.next_best)}{_value(choice.next_score)}"))
        if surgery.text is not None:
            rows.append(("text", str(surgery.text)))
        searched, found = surgery.searched()
        rows, entries = rows + searched, entries | found
        if surgery.compensation is not None:
            rows += surgery.compensation.rows()
            entries["compensation"] = surgery.compensation.to_dict()
        if surgery.merging is not None:
            rows += surgery.merging.rows()
            entries["merging"] = surgery.merging.to_dict()
        return rows, entries

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the perplexity, the curve and the picture, measured once the result is there."""
        surgery = self.surgery
        rows: list[tuple[str, str]] = []
        entries: dict[str, Any] = {}
        perplexity = surgery.evaluate(output, before=self.before) if self.evaluate else None
        if perplexity is not None:
            before, after = perplexity
            same = surgery.judged is surgery.text
            where = "on this text" if same else f"on {surgery.judged}, which no fit saw"
            rows.append(("perplexity", f"{_number(before)} → {_number(after)}  ({where})"))
            entries["perplexity"] = {"before": before, "after": after}
        curve = None if self.without is None else list(self.without)
        if curve is not None:
            rows += [(f"without {count}", _number(value)) for count, value in enumerate(curve)]
            entries["curve"] = curve
        if self.plot is not None and speaks():
            save(surgery.picture(curve=curve), self.plot)
            rows.append(("picture", str(self.plot)))
            entries["pictures"] = [str(self.plot)]
        return rows, entries


def _halves(choice: Choice) -> dict[str, list[int]]:
    """Return the entries for JSON of layers of which one half goes and the other stays."""
    return {f"dropped_{half}": list(layers) for half, layers in choice.dropped_halves.items()}


def _value(score: float | None) -> str:
    return "" if score is None else f", {score:.6g}"


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"
