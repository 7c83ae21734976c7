"""What `surgeon prune` says beside the plan: what goes and why, what it costs in perplexity, and the picture of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon import text
from surgeon.errors import OutputError, PlanError
from surgeon.plots import NOTHING, NOTHING_HINT, has_picture
from surgeon.pruning import Pruning

if TYPE_CHECKING:
    from surgeon.measure.score import Meter

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is measured."""
    if path.suffix.lower() not in FORMATS:
        raise PlanError(f"cannot draw to {path}", hint=f"Name a file that ends in {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise OutputError(f"no such directory: {path.parent}", hint=f"mkdir -p {path.parent}")
    from surgeon.plots import require_matplotlib

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
            from surgeon.plots import plot_pruning

            plot_pruning(surgery, self.plot, curve=curve)
            rows.append(("picture", str(self.plot)))
        return rows, entries


def _value(score: float | None) -> str:
    return "" if score is None else f", {score:.6g}"


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"
