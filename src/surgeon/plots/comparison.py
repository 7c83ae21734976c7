"""A picture that compares steps: each figure with its error bar, and the baseline as a line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.plots.figure import BLUE, RED, clean, entitle, new_figure, save

WIDE = 2.0  # standard errors to each side: about 95 %


@dataclass(frozen=True, slots=True)
class Point:
    """A figure of a step with its standard error, and the baseline's."""

    step: str
    figure: str
    value: float
    error: float | None
    baseline: float | None


def plot_comparison(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Draw a panel for each figure with a dot for each step, error bars of two standard errors, baselines dashed.

    `title` says what was measured, and on what.

    Raises OutputError where the file cannot be written.
    """
    kinds = list(dict.fromkeys(point.figure for point in points))
    most = max(sum(point.figure == kind for point in points) for kind in kinds)
    figure = new_figure(5.2 * len(kinds), 1.4 + 0.36 * most)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _panel(axes, [point for point in points if point.figure == kind])
        axes.set(xlabel=f"{kind.replace('_', ' ')}  (bars: ± {WIDE:g} standard errors)")
    entitle(figure, title)
    save(figure, path)


def _panel(axes: Any, points: Sequence[Point]) -> None:
    places = range(len(points))
    errors = [WIDE * (point.error or 0.0) for point in points]
    axes.errorbar([point.value for point in points], places, xerr=errors, fmt="o", color=BLUE, capsize=3)
    for value in dict.fromkeys(point.baseline for point in points if point.baseline is not None):
        axes.axvline(value, color=RED, linestyle="--", linewidth=1.2, label="baseline")
    axes.set_yticks(list(places), [point.step for point in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.25)
    clean(axes)
    if axes.get_legend_handles_labels()[0]:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[:1], labels[:1], frameon=False, loc="best")
