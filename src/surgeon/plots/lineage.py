"""The picture of a layer map: which layer of which candidate each layer of a child is."""

from collections.abc import Mapping, Sequence
from typing import Any

from surgeon.plots.figure import GREY, MARKS, PALETTE, clean, entitle, new_figure, whole_numbers
from surgeon.text import printable

MOST = 6  # candidates in one picture


def draw_layer_map(
    maps: Mapping[str, Sequence[int | None]],
    depths: Mapping[str, int],
    *,
    sources: Sequence[str | None],
    child: str,
    title: str,
) -> Any:
    """Return a figure with a mark for each layer of the child, at the candidate's layer that it is.

    `sources` names the candidate of each layer: only there a mark is filled, of the others it is hollow. Layers that
    are none stand below the axis; the thin line is where a layer keeps its number.
    """
    depth, highest = len(sources), max([*depths.values(), 1])
    figure = new_figure(max(6.0, 0.14 * depth + 3.0), max(4.2, 0.1 * highest + 1.8))
    axes = figure.subplots()
    axes.plot([0, min(depth, highest) - 1], [0, min(depth, highest) - 1], color=GREY, linewidth=0.6, zorder=0)
    for number, (name, layers) in enumerate(list(maps.items())[:MOST]):
        colour, mark = PALETTE[number % len(PALETTE)], MARKS[number % len(MARKS)]
        places = [(j, layer) for j, layer in enumerate(layers) if layer is not None]
        own = [place for place in places if sources[place[0]] == name]
        others = [place for place in places if sources[place[0]] != name]
        if others:
            axes.plot(*zip(*others, strict=True), mark, color=colour, fillstyle="none", alpha=0.5, markersize=4)
        if own:
            axes.plot(*zip(*own, strict=True), mark, color=colour, markersize=5, label=printable(name))
    none = [j for j, name in enumerate(sources) if name is None]
    if none:
        axes.plot(none, [-1.5] * len(none), "x", color=GREY, markersize=6, label="none of them")
    axes.set_xlim(-0.8, depth - 0.2)
    axes.set_ylim(-2.2 if none else -0.6, highest - 0.2)
    axes.set(xlabel=f"layer of {printable(child)}", ylabel="layer of the candidate")
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    axes.grid(alpha=0.2)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper left", fontsize="small")
    clean(axes)
    entitle(figure, title)
    return figure
