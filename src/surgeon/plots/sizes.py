"""A picture of what models of several sizes are worth: a figure of each, with its error, against the bytes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.plots.figure import BLUE, clean, entitle, new_figure, save

WIDE = 2.0  # standard errors to each side: about 95 %


@dataclass(frozen=True, slots=True)
class Sized:
    """A figure of a model with its standard error, and the bytes of its weight files."""

    step: str
    figure: str
    value: float
    error: float | None
    nbytes: int


def plot_sizes(points: Sequence[Sized], path: Path, *, title: str) -> None:
    """Draw a dot with its error bar of two standard errors for each model; all have the figure of the first one.

    Raises OutputError where the file cannot be written.
    """
    kind = points[0].figure
    figure = new_figure(8.4, 5.0)
    axes = figure.subplots()
    shown = sorted((point for point in points if point.figure == kind), key=lambda point: point.nbytes)
    sizes = [point.nbytes / 1000 for point in shown]
    errors = [WIDE * (point.error or 0.0) for point in shown]
    axes.errorbar(sizes, [point.value for point in shown], yerr=errors, fmt="o", color=BLUE, capsize=3)
    for number, (size, point, error) in enumerate(zip(sizes, shown, errors, strict=True)):
        side = 1 if number % 2 else -1  # neighbours in size are named above and below their bars
        place = {"xytext": (0, 5 * side), "va": "bottom" if side > 0 else "top"}
        axes.annotate(
            point.step, (size, point.value + side * error), textcoords="offset points", ha="center", fontsize=8, **place
        )
    axes.set_xscale("log")
    axes.set(xlabel="weight files, kB", ylabel=f"{kind.replace('_', ' ')}  (bars: ± {WIDE:g} standard errors)")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:,g}" if f"{x:e}"[0] in "25" else "")
    axes.margins(x=0.14, y=0.14)
    axes.grid(alpha=0.25)
    clean(axes)
    entitle(figure, title)
    save(figure, path)
