"""Pictures of a pruning: its scores, a map of what goes, and the perplexity against layers removed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgeon.anatomy.halves import ATTENTION, MLP, Half
from surgeon.errors import PlanError
from surgeon.measure.record import Scores, perplexities
from surgeon.plots.figure import BLUE, GREY, MAP, RED, clean, entitle, new_figure, scale, whole_numbers
from surgeon.transforms.kept import Remains
from surgeon.transforms.scores import METHODS

NOTHING = "there is nothing to draw: nothing goes, and no layer has a score"
NOTHING_HINT = "Leave out --plot, or add --curve with --data."
NARROWEST = 6.4  # inches: the title has to fit
STAYS, GOES = "0.88", "0.2"  # greys of the map
GONE = "//"  # the hatch of what goes
HALVES: Mapping[Half, str] = {ATTENTION: "attention", MLP: "MLP"}
AXES = {"heads": "heads", "ffn": "MLP neurons", "expert_ffn": "expert neurons", "experts": "experts"}


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What a pruning removes: layers of `depth`, and of each narrowed axis all but what `axes` say. None: not known.

    `halves` are the layers of which the attention goes and the MLP stays, and the reverse, where layers were re-paired.
    """

    depth: int
    layers: Sequence[int] = ()
    halves: Mapping[Half, Sequence[int]] = field(default_factory=dict)
    axes: Mapping[str, Remains] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.layers or self.halves or self.axes)


def draw_pruning(
    score: str | None, scores: Scores | None, removed: Removed, *, title: str, curve: Sequence[float] | None = None
) -> Any:
    """Return a figure of matplotlib: the values of the score `score`, a map of what goes, and the `curve`.

    Of a score with a matrix every start and size of a block is drawn, with the one that was chosen; of other scores a
    bar per layer; of a greedy removal the perplexity after each removed layer. The map has a row for each layer, and
    in it what stays and goes of its heads, neurons and experts. Raises PlanError where there is nothing to draw.
    """
    values = None if scores is None or score is None else scores.layers.get(score)
    if scores is not None and score is not None and values is None and curve is None:
        curve = _greedy_curve(score, scores)
    widths = [6.4] * (values is not None)
    widths += [1.7 + 1.9 * len(removed.axes) + 0.6 * len(removed.halves)] if removed else []
    widths += [5.2] * (curve is not None)
    if not widths:
        raise PlanError(NOTHING, hint=NOTHING_HINT)
    figure = new_figure(max(sum(widths), NARROWEST), max(4.6, 1.5 + 0.11 * removed.depth))
    parts = list(figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0])
    if values is not None:
        part = parts.pop(0)
        assert score is not None
        draw = _blocks if METHODS[score].matrix else _bars
        draw(part, part.subplots(), values, removed.layers, METHODS[score].label or f"{score}: {METHODS[score].help}")
    if removed:
        _map(parts.pop(0), removed)
    if curve is not None:
        _curve(parts.pop(0).subplots(), curve, len(removed.layers))
    entitle(figure, title)
    return figure


def _greedy_curve(score: str, scores: Scores) -> list[float] | None:
    """Return the perplexity with 0, 1, 2 ... layers gone as a greedy removal found it, None where there was none."""
    if METHODS[score].greedy is None or scores.greedy is None:
        return None
    whole = [math.nan] if scores.loss is None else perplexities([scores.loss])
    return [*whole, *scores.greedy["perplexity"]]


def _blocks(figure: Any, axes: Any, values: Sequence[Sequence[Any]], dropped: Sequence[int], label: str) -> None:
    depth = len(values)
    sizes = range(1, max(depth, 2))
    grid = [
        [values[start][start + size] if start + size <= depth else float("nan") for start in range(depth)]
        for size in sizes
    ]
    shown = axes.imshow(
        grid, origin="lower", aspect="auto", cmap=MAP, extent=(-0.5, depth - 0.5, 0.5, sizes.stop - 0.5)
    )
    figure.colorbar(shown, ax=axes, label=label)
    best = [min((values[start][start + size], start) for start in range(depth - size + 1))[1] for size in sizes]
    mark = {"color": "white", "markeredgecolor": "black", "linestyle": "none"}
    axes.plot(best, list(sizes), "o", markersize=4, label="closest block of each size", **mark)
    if dropped:
        block = tuple(dropped) == tuple(range(dropped[0], dropped[-1] + 1))
        removed = [(dropped[0], len(dropped))] if block else [(layer, 1) for layer in dropped]
        axes.plot(*zip(*removed, strict=True), "X", markersize=11, label="goes", **mark | {"color": RED})
    axes.legend(loc="upper right", framealpha=1.0)
    axes.set(xlabel="first layer of the block", ylabel="layers in the block", title="distance across a block")
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)


def _bars(figure: Any, axes: Any, values: Sequence[float], dropped: Sequence[int], label: str) -> None:
    finite = [value for value in values if math.isfinite(value)]
    heights = [value if math.isfinite(value) else math.nan for value in values]
    for goes, colour, hatch, name in ((False, BLUE, "", "stays"), (True, RED, GONE, "goes")):
        places = [layer for layer in range(len(values)) if (layer in set(dropped)) == goes]
        if places:
            axes.bar(
                places, [heights[layer] for layer in places], color=colour, hatch=hatch, edgecolor="white", label=name
            )
        for layer in (layer for layer in places if not math.isfinite(values[layer])):
            axes.text(layer, 0.98, "∞", ha="center", va="top", color=colour, transform=axes.get_xaxis_transform())
    scale(axes, finite)
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set(xlabel="layer", ylabel=label, title="the lower, the less its removal changes")
    if dropped:
        axes.legend(frameon=False, ncols=2, loc="upper right")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.15 if axes.get_yscale() == "log" else high + 0.15 * (high - low))
    whole_numbers(axes.xaxis)
    clean(axes)


def _map(figure: Any, removed: Removed) -> None:
    """Draw a row for each layer, in a column for whole layers and one for each narrowed axis."""
    from matplotlib.colors import ListedColormap

    gone = set(removed.layers)
    columns: dict[str, tuple[int, list[list[float]]]] = {}
    halves = {name: gone | set(removed.halves[half]) for half, name in HALVES.items() if half in removed.halves}
    for name, going in (halves or {"layer": gone}).items():
        if going:
            columns[name] = (1, [[float(layer in going)] for layer in range(removed.depth)])
    for axis, left in removed.axes.items():
        rows = []
        for layer in range(removed.depth):
            stays = left.kept.get(layer)
            rows.append([math.nan if stays is None else float(place not in stays) for place in range(left.size)])
        columns[AXES[axis]] = (left.size, rows)
    ratios = [0.35 if size == 1 else 1.0 for size, _ in columns.values()]
    grid = figure.subplots(1, len(columns), sharey=True, squeeze=False, width_ratios=ratios)[0]
    for place, (axes, (name, (size, rows))) in enumerate(zip(grid, columns.items(), strict=True)):
        colours = ListedColormap([STAYS, GOES])
        axes.imshow(rows, aspect="auto", origin="lower", cmap=colours, vmin=0, vmax=1, interpolation_stage="rgba")
        axes.set_title(name if size == 1 else f"{name} (0 to {size - 1})", fontsize="medium")
        axes.set_xlabel("dark: goes" if place == len(columns) - 1 else "")
        axes.set_ylabel("layer" if place == 0 else "")
        if size == 1:
            axes.set_xticks([])
        else:
            whole_numbers(axes.xaxis, most=4)
        for edge in range(removed.depth - 1):
            axes.axhline(edge + 0.5, color="white", linewidth=0.8)
        whole_numbers(axes.yaxis)


def _curve(axes: Any, curve: Sequence[float], count: int) -> None:
    axes.plot(range(len(curve)), curve, ".-", color=BLUE)
    if count < len(curve):
        axes.plot([count], [curve[count]], "X", color=RED, markersize=9, markeredgecolor="black", label="this cut")
        axes.legend(frameon=False)
    scale(axes, curve)
    axes.set(xlabel="layers removed", ylabel="perplexity", title="before healing")
    axes.grid(alpha=0.25, color=GREY)
    whole_numbers(axes.xaxis)
    clean(axes)
