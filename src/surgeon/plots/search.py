"""Pictures of a search: its cuts by size and worth, a map of what went, what layers cost alone and in pairs."""

import math
import re
from collections.abc import Sequence
from typing import Any

from surgeon.plots.figure import BLUE, GREY, ORANGE, RED, clean, entitle, new_figure, scale, whole_numbers
from surgeon.plots.pruning import GOES, STAYS
from surgeon.search.record import Point, SearchRecord

NAMES = {"kl": "KL from the unpruned model, nats", "loss": "loss, nats"}
_LAYER, _SHIFTED = re.compile(r"layer (\d+)"), re.compile(r"MLP (\d+) \+ attention \d+")


def draw_search(record: SearchRecord, made: Point, *, title: str) -> Any:
    """Return a figure of matplotlib with four parts; `made` is the point that is cut.

    Above: every cut by its size, or its time where tokens were timed, against the objective, with the frontier; and the
    halves of each layer that stay and go. Below: what layers, and pieces between two, cost alone; and what pairs of
    layers cost beyond that.
    """
    figure = new_figure(13.0, 9.6)
    above, below = figure.subfigures(2, 1)
    left, right = above.subfigures(1, 2, width_ratios=(1.35, 1.0))
    _pareto(left.subplots(), record, made)
    _map(right.subplots(), record, made)
    left, right = below.subfigures(1, 2, width_ratios=(1.35, 1.0))
    _singles(left.subplots(), record)
    _pairs(right, right.subplots(), record)
    entitle(figure, title)
    return figure


def frontier(sizes: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Return the places of the points that no other one beats in both, by size."""
    best, found = math.inf, []
    for place in sorted(range(len(sizes)), key=lambda place: (sizes[place], costs[place])):
        if costs[place] < best:
            best = costs[place]
            found.append(place)
    return found


def _pareto(axes: Any, record: SearchRecord, made: Point) -> None:
    timed = all(point.cost.milliseconds is not None for point in record.points)
    unit, label = (1.0, "milliseconds a token") if timed else _unit(made.cost.parameters)

    def size(point: Point) -> float:
        return point.cost.milliseconds or 0.0 if timed else point.cost.parameters / unit

    sizes = [size(point) for point in record.points]
    costs = [getattr(point.worth, record.objective) for point in record.points]
    seen = [(s, c) for s, c, point in zip(sizes, costs, record.points, strict=True) if not point.refused]
    axes.plot(*zip(*seen, strict=True), "o", color=BLUE, alpha=0.55, markersize=5, label="measured")
    if refused := [(s, c) for s, c, point in zip(sizes, costs, record.points, strict=True) if point.refused]:
        axes.plot(*zip(*refused, strict=True), "x", color=GREY, markersize=6, label="refused by the second text")
    best = frontier(sizes, costs)
    axes.step([sizes[i] for i in best], [costs[i] for i in best], where="post", color=ORANGE, label="frontier")
    mark = {"color": RED, "markeredgecolor": "black", "linestyle": "none"}
    axes.plot([size(made)], [getattr(made.worth, record.objective)], "X", markersize=11, label="made", **mark)
    scale(axes, costs)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.2 if axes.get_yscale() == "log" else high + 0.2 * (high - low))
    axes.set(
        xlabel=label, ylabel=NAMES[record.objective], title=f"{len(record.points)} cuts, on the rows of the search"
    )
    axes.grid(alpha=0.25, color=GREY)
    axes.legend(frameon=False, ncols=4, loc="upper right", fontsize="small")
    clean(axes)


def _unit(parameters: int) -> tuple[float, str]:
    for unit, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if parameters >= unit:
            return unit, f"parameters, {name}"
    return 1.0, "parameters"


def _map(axes: Any, record: SearchRecord, made: Point) -> None:
    """Draw a row for each half and a column for each layer: of the cut that is made, and how often others drop it."""
    from matplotlib.colors import ListedColormap

    halves = (("attention", made.pairing.attention), ("MLP", made.pairing.mlp))
    rows = [[float(layer not in kept) for layer in range(record.depth)] for _, kept in halves]
    axes.imshow(
        rows,
        aspect="auto",
        cmap=ListedColormap([STAYS, GOES]),
        vmin=0,
        vmax=1,
        extent=(-0.5, record.depth - 0.5, 1.5, -0.5),
    )
    few = [point for point in record.points if point.within and not point.refused][:10]
    for at, half in enumerate(("attention", "mlp")):
        for layer in range(record.depth):
            share = sum(layer not in getattr(point.pairing, half) for point in few) / len(few)
            colour = "white" if rows[at][layer] else "black"
            if share:
                axes.text(layer, at, f"{10 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.axhline(0.5, color="white", linewidth=2)
    for edge in range(record.depth - 1):
        axes.axvline(edge + 0.5, color="white", linewidth=0.8)
    axes.set_yticks([0, 1], [name for name, _ in halves])
    widths = ", ".join(f"{axis} {size}" for axis, size in made.widths.items())
    axes.set(
        xlabel=f"layer{f'   (widths: {widths})' if widths else ''}",
        title="dark: goes; number: in how many of the ten best",
    )
    whole_numbers(axes.xaxis)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _singles(axes: Any, record: SearchRecord) -> None:
    gone = set(range(record.depth)) - set(record.chosen.pairing.attention) - set(record.chosen.pairing.mlp)
    layers = {int(found[1]): cost for name, cost in record.singles.items() if (found := _LAYER.fullmatch(name))}
    shifted = {
        int(found[1]) + 0.5: cost for name, cost in record.singles.items() if (found := _SHIFTED.fullmatch(name))
    }
    for goes, colour, hatch, label in ((False, BLUE, "", "layer, stays"), (True, RED, "//", "layer, goes")):
        places = [layer for layer in layers if (layer in gone) == goes]
        if places:
            heights = [layers[layer] for layer in places]
            axes.bar(places, heights, 0.8, color=colour, hatch=hatch, edgecolor="white", label=label)
    if shifted:
        axes.plot(
            list(shifted),
            list(shifted.values()),
            "D",
            color=ORANGE,
            markersize=4.5,
            markeredgecolor="black",
            markeredgewidth=0.5,
            linestyle="none",
            label="MLP and the next attention",
        )
    scale(axes, [*layers.values(), *shifted.values()])
    if axes.get_yscale() != "log" and layers:
        axes.set_ylim(bottom=min(0.0, *layers.values(), *(shifted.values() or [0.0])))
    axes.set(xlabel="layer", ylabel=NAMES[record.objective], title="what goes alone costs")
    axes.legend(frameon=False, ncols=3, loc="upper right", fontsize="small")
    whole_numbers(axes.xaxis)
    clean(axes)


def _pairs(figure: Any, axes: Any, record: SearchRecord) -> None:
    """Draw what two layers cost together beyond what they cost alone; pairs that were not measured stay white."""
    alone = {int(found[1]): cost for name, cost in record.singles.items() if (found := _LAYER.fullmatch(name))}
    grid = [[math.nan] * record.depth for _ in range(record.depth)]
    for one, other, cost in record.pairs:
        if one % 2 == 0 and other % 2 == 0:
            beyond = cost - alone[one // 2] - alone[other // 2]
            grid[one // 2][other // 2] = grid[other // 2][one // 2] = beyond
    values = sorted(abs(value) for row in grid for value in row if not math.isnan(value))
    if not values:
        axes.text(0.5, 0.5, "no pairs were measured", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    most = values[int(0.98 * (len(values) - 1))] or 1.0
    shown = axes.imshow(grid, origin="lower", cmap="PuOr_r", vmin=-most, vmax=most)
    figure.colorbar(shown, ax=axes, label="nats beyond the sum", extend="both")
    axes.set(xlabel="layer", ylabel="layer", title="what two layers cost beyond both alone")
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
