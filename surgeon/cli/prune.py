"""`surgeon prune`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon import text
from surgeon.cli import command as options
from surgeon.cli.command import Writing
from surgeon.errors import OutputError, PlanError
from surgeon.options import numbers
from surgeon.plots.pruning import NOTHING, NOTHING_HINT, has_picture
from surgeon.verbs.prune import Pruning

GROUP = "surgery"
EXAMPLE = "surgeon prune gpt2-large --score angular --layers 27 --data text.txt -o gpt2-27"

if TYPE_CHECKING:
    from surgeon.measure.scoring import Meter


_FEWER = "Default: as many as there are."


@options.spread
def prune(
    model: options.Model,
    score: Annotated[
        str,
        typer.Option(
            metavar="SCORE",
            help="What decides: angular, block-influence, relative-magnitude, perplexity, taylor, magnitude, random, "
            "last, or uniform (weight selection).",
        ),
    ] = "angular",
    layers: Annotated[
        str | None, typer.Option(metavar="N", help="Layers of the result: 24, or 75% of the source's.")
    ] = None,
    target_parameters: Annotated[
        float | None, typer.Option(metavar="N", help="Remove layers until so many parameters are left: 6.7e9.")
    ] = None,
    target_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Remove layers until the weights take no more: 12GB.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(metavar="N", help=f"Hidden size. {_FEWER}")] = None,
    intermediate_size: Annotated[int | None, typer.Option(metavar="N", help=f"Neurons of each MLP. {_FEWER}")] = None,
    attention_heads: Annotated[int | None, typer.Option(metavar="N", help=f"Attention heads. {_FEWER}")] = None,
    key_value_heads: Annotated[
        int | None, typer.Option(metavar="N", help="Key-value heads; whole groups of heads go with them.")
    ] = None,
    experts: Annotated[int | None, typer.Option(metavar="N", help=f"Experts of each layer. {_FEWER}")] = None,
    like: Annotated[
        str | None, typer.Option(metavar="SMALL", help="Take all sizes from this model; goes with --score uniform.")
    ] = None,
    contiguous: Annotated[
        bool | None,
        typer.Option("--contiguous/--free", help="Remove one block, or any layers. Default: as the method has it."),
    ] = None,
    protect: Annotated[
        str | None,
        typer.Option(metavar="FIRST,LAST", help="How many first and last layers stay. Default: as the method has it."),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="With --score perplexity: score anew after every removal (SLEB).")
    ] = False,
    tokens: Annotated[
        str, typer.Option(metavar="last|all", help="With --score angular: the last token of a sample, or all.")
    ] = "last",
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA",
            help="Text to measure on: .txt, .jsonl, .parquet or a Hub dataset. Default: the model writes one.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="How many rows of the text.")] = 32,
    sequence_length: Annotated[int, typer.Option(metavar="T", help="Tokens of a row.")] = 256,
    scores_from: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Cut by the scores in this scores.json; runs no model.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure perplexity on the text, before and after.")
    ] = True,
    curve: Annotated[
        bool, typer.Option("--curve", help="Measure perplexity for every number of layers up to half of them.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the scores, and the curve, to this .png, .svg or .pdf.")
    ] = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    revision: options.Revision = None,
    *,
    writing: Writing,
) -> None:
    """Remove the layers, neurons, heads and experts that matter least."""
    import surgeon
    from surgeon.cli import command as write
    from surgeon.cli.terminal import TokenMeter

    if tokens not in ("last", "all"):
        raise typer.BadParameter(f"{tokens!r} is neither last nor all", param_hint="--tokens")
    guard = None if protect is None else _numbers(protect)
    if guard is not None and len(guard) != 2:
        raise typer.BadParameter(f"{protect!r} is not two numbers such as 1,1", param_hint="--protect")
    if plot is not None:
        check_plot(plot)
    meter = TokenMeter(quiet=writing.quiet)
    plan = partial(
        surgeon.prune,
        surgeon.open_model(model, revision=revision),
        score=score,
        layers=layers,
        target_parameters=target_parameters,
        target_memory=target_memory,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        attention_heads=attention_heads,
        key_value_heads=key_value_heads,
        experts=experts,
        like=like,
        contiguous=contiguous,
        protect=None if guard is None else (guard[0], guard[1]),
        greedy=greedy,
        all_tokens=tokens == "all",
        data=data or (),
        samples=samples,
        sequence_length=sequence_length,
        scores_from=scores_from,
        evaluate=evaluate,
        device=device,
        seed=seed,
        meter=meter,
    )
    surgery = plan(measure=False)
    if not writing.dry_run:
        write.check(surgery, writing)  # before what may take an hour
        surgery = plan()
    report = PruneReport(surgery, evaluate=evaluate, curve=curve, plot=plot, meter=meter)
    if not writing.dry_run:
        report.check()
    write.run(surgery, writing, report=report)


FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is measured."""
    if path.suffix.lower() not in FORMATS:
        raise PlanError(f"cannot draw to {path}", hint=f"Name a file that ends in {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise OutputError(f"no such directory: {path.parent}", hint=f"mkdir -p {path.parent}")
    from surgeon.plots.figure import require_matplotlib

    require_matplotlib()


@dataclass(frozen=True)
class PruneReport:
    """Says what was chosen before the result is written, and what it costs once it is."""

    surgery: Pruning
    evaluate: bool
    curve: bool
    plot: Path | None
    meter: "Meter"

    def check(self) -> None:
        """Refuse a curve or a picture that there is nothing for, before anything is written."""
        if self.curve and self.surgery.text is None:
            raise PlanError("a curve is measured on a text, and none was read", hint="Give one: --data FILE.")
        if self.plot is not None and not self.curve and not has_picture(self.surgery):
            raise PlanError(NOTHING.format(self.surgery.score), hint=NOTHING_HINT)

    def preview(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return rows for people, and entries for JSON, that are known before anything is written."""
        surgery, choice = self.surgery, self.surgery.choice
        entries: dict[str, Any] = {
            "score": surgery.score,
            "scores": {} if surgery.scores is None else dict(surgery.scores.layers),
            "dropped": None if choice is None else list(choice.dropped),
            "value": None if choice is None else choice.score,
            "next_best": None if choice is None or choice.next_best is None else list(choice.next_best),
            "next_value": None if choice is None else choice.next_score,
        }
        rows: list[tuple[str, str]] = []
        if choice is not None and choice.dropped:
            rows.append(
                ("dropped", f"layers {text.layers(choice.dropped)}  (by {surgery.score}{_value(choice.score)})")
            )
            if choice.next_best is not None:
                rows.append(("next best", f"layers {text.layers(choice.next_best)}{_value(choice.next_score)}"))
        if surgery.text is not None:
            rows.append(("text", str(surgery.text)))
        return rows, entries

    def after(self, output: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return the same for what is known once the result is there: perplexity, the curve, the picture."""
        surgery = self.surgery
        rows: list[tuple[str, str]] = []
        entries: dict[str, Any] = {}
        found = surgery.evaluate(output, meter=self.meter) if self.evaluate else None
        if found is not None:
            before, after = found
            rows.append(("perplexity", f"{_number(before)} → {_number(after)}  (on this text)"))
            entries["perplexity"] = {"before": before, "after": after}
        curve = surgery.curve(meter=self.meter) if self.curve else None
        if curve is not None:
            rows += [(f"without {count}", _number(value)) for count, value in enumerate(curve)]
            entries["curve"] = curve
        if self.plot is not None:
            from surgeon.plots.pruning import plot_pruning

            plot_pruning(surgery, self.plot, curve=curve)
            rows.append(("picture", str(self.plot)))
        return rows, entries


def _value(score: float | None) -> str:
    return "" if score is None else f", {score:.6g}"


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def _numbers(text: str) -> list[int]:
    try:
        return numbers(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--protect") from error
