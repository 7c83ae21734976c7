"""The picture of a diagnosis: the rank and the sink of every head, and what each layer is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.plots.figure import BLACK, MAP, clean, new_figure, scale, spans_decades, whole_numbers
from surgeon.text import printable

LEAST = 0.01  # nats: rises of the loss between minus and plus this much stand on a linear part of the axis


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What is drawn of a model. `heads` holds the measures of each head of each layer, none where it has no attention.

    `rises` are series of (value, error) a layer, by name: None where there is none. `low_rank` is the rank below which
    a head is marked.
    """

    title: str
    heads: Sequence[Sequence[Mapping[str, float]]]
    influence: Sequence[float]
    rises: Mapping[str, Sequence[tuple[float, float | None] | None]]
    length: int
    low_rank: float


def draw_diagnosis(panels: Sequence[Panel]) -> Any:
    """Return a figure with a column for each model: heat maps of its heads over layers, and its layers' worth below.

    Both models have the same scales, so that they can be compared by eye.
    """
    from matplotlib.colors import LogNorm, Normalize

    has_rises = any(panel.rises for panel in panels)
    heads = max(len(layer) for panel in panels for layer in panel.heads)
    heights = [max(2.0, 0.17 * heads)] * 2 + [2.2] * (2 if has_rises else 1)
    depth = max(len(panel.heads) for panel in panels)
    width = max(6.0, 0.2 * depth + 1.8)
    figure = new_figure(width * len(panels), sum(heights) + 1.2)
    grid = figure.subplots(len(heights), len(panels), squeeze=False, sharey="row", height_ratios=heights)
    most = max(head["rank"] for panel in panels for layer in panel.heads for head in layer)
    # Ranks are compared by their ratio, and most lie between 1 and 10: a linear scale would paint them all alike.
    scales = {"rank": LogNorm(1, max(most, 2.0)), "sink": Normalize(0, 1)}
    influences = [value for panel in panels for value in panel.influence]  # rows of panels have one axis
    points = [point for panel in panels for series in panel.rises.values() for point in series if point is not None]
    largest = max((abs(value) for value, _ in points), default=0.0)
    labels = {"rank": "rank of the map", "sink": "attention on token 0"}
    for column, panel in enumerate(panels):
        for row, measure in enumerate(scales):
            axes = grid[row][column]
            shown = _heat_map(axes, panel, measure, scales[measure])
            axes.set(ylabel="head" if column == 0 else "", title=_title(panel.title) if row == 0 else "")
            if column == len(panels) - 1:
                bar = figure.colorbar(shown, ax=grid[row].tolist(), label=labels[measure], pad=0.01)
                if measure == "rank":
                    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= most]
                    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks], minor=False)
                    bar.ax.minorticks_off()
        if has_rises:
            _rises(grid[2][column], panel, largest)
        _influence(grid[-1][column], panel, influences)
        grid[-1][column].set(xlabel="layer")
    return figure


def _heat_map(axes: Any, panel: Panel, measure: str, scale: Any) -> Any:
    rows = max(len(layer) for layer in panel.heads)
    missing = float("nan")
    cells = [[layer[head][measure] if head < len(layer) else missing for layer in panel.heads] for head in range(rows)]
    shown = axes.imshow(cells, aspect="auto", interpolation="nearest", cmap=MAP, norm=scale, origin="lower")
    if measure == "rank":
        low = [
            (number, head)
            for number, layer in enumerate(panel.heads)
            for head, figures in enumerate(layer)
            if figures["rank"] < panel.low_rank
        ]
        if low:  # the lowest ranks are the darkest cells
            axes.plot(*zip(*low, strict=True), "x", color="white", markersize=3.5, markeredgewidth=1.0)
        axes.set_xlabel(f"x: rank below {panel.low_rank}, T = {panel.length}", fontsize="small")
    whole_numbers(axes.yaxis)
    whole_numbers(axes.xaxis)
    return shown


def _rises(axes: Any, panel: Panel, most: float) -> None:
    styles = ({"marker": "o", "color": BLACK}, {"marker": "s", "color": "0.55", "markerfacecolor": "white"})
    for (name, series), style in zip(panel.rises.items(), styles, strict=False):
        places = [number for number, point in enumerate(series) if point is not None]
        values = [point[0] for point in series if point is not None]
        errors = [2 * (point[1] or 0.0) for point in series if point is not None]
        axes.errorbar(places, values, yerr=errors, label=name, linestyle="none", markersize=4, linewidth=1, **style)
    if spans_decades([LEAST, most]):
        axes.set_yscale("symlog", linthresh=LEAST)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper center")
    _finish(axes, panel, "rise of the loss\n(nats, ± 2 errors)")


def _influence(axes: Any, panel: Panel, values: Sequence[float]) -> None:
    axes.bar(range(len(panel.influence)), panel.influence, color="0.35", width=0.7)
    scale(axes, values)
    _finish(axes, panel, "block influence (1 - cosine)")


def _finish(axes: Any, panel: Panel, label: str) -> None:
    axes.set_xlim(-0.5, len(panel.influence) - 0.5)
    clean(axes)
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel(label, fontsize="small")
    whole_numbers(axes.xaxis)


def _title(title: str) -> str:
    return "\n".join(map(printable, title.split("\n")))
