"""The picture of a model's layers: what kind each is, and its parameters by part."""

from collections.abc import Sequence
from typing import Any

from surgeon.anatomy.layer_table import LayerRow, layer_lines
from surgeon.plots.figure import (
    BLUE,
    GREEN,
    GREY,
    HATCHES,
    ORANGE,
    PINK,
    SKY,
    clean,
    entitle,
    new_figure,
    whole_numbers,
)
from surgeon.text import printable

PARTS = {"attention": (BLUE, ""), "mlp": (ORANGE, "//"), "norm": (GREEN, ".."), "other": (PINK, "xx")}
MOST = 60  # kinds that have a line of their own height
UNITS = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"), (1.0, ""))


def draw_layers(rows: Sequence[LayerRow], *, title: str, outside: int) -> Any:
    """Return a figure: above, a field for each layer that shows its kind; below, a bar with its parameters by part.

    The kinds are named beside the fields. `outside` are the parameters of the model outside its layers.
    """
    _, lines, _ = layer_lines(rows)
    kinds = list(dict.fromkeys(row.kind for row in rows))
    figure = new_figure(max(7.0, 0.17 * len(rows) + 3.0), 4.0 + 0.24 * min(len(kinds), MOST))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(0.24 * min(len(kinds), MOST) + 0.2, 3))
    for place, row in enumerate(rows):
        number = kinds.index(row.kind)
        style = {"facecolor": _shade(number), "edgecolor": "black", "linewidth": 0.6, "hatch": _hatch(number)}
        above.bar(place, 0.8, bottom=number - 0.4, width=0.9, **style)
    several = len({row.stack for row in rows}) > 1
    named = [_named(line, with_place=several) for line in lines]
    above.set_yticks(range(len(kinds)), named, fontsize="small")
    above.set_ylim(len(kinds) - 0.4, -0.6)
    above.tick_params(axis="both", length=0)
    above.spines[:].set_visible(False)
    size, word = next(unit for unit in UNITS if unit[0] <= max((row.parameters for row in rows), default=1))
    bottom = [0.0] * len(rows)
    names = [name for name in (*PARTS, "layers") if any(row.parts.get(name) for row in rows)]
    for name in names:
        colour, hatch = PARTS.get(name, (SKY, ""))
        heights = [row.parts.get(name, 0) / size for row in rows]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        below.bar(range(len(rows)), heights, bottom=bottom, width=0.9, label=_part(name), **style)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    below.set_xlim(-0.6, len(rows) - 0.4)
    below.set_ylim(0, 1.22 * max(bottom, default=1.0))  # room for the legend
    below.set(xlabel=f"layer   (outside of layers: {outside:,} parameters)", ylabel=f"parameters{word}")
    _numbers(below, rows)
    below.legend(frameon=False, ncols=len(names), loc="upper left", fontsize="small")
    clean(below)
    entitle(figure, title)
    return figure


def _numbers(axes: Any, rows: Sequence[LayerRow]) -> None:
    """Mark the layers by their numbers: in each stack from 0 on, where a model has two."""
    if len({row.stack for row in rows}) == 1:
        whole_numbers(axes.xaxis)
        return
    shown = [place for place, row in enumerate(rows) if row.layer % max(1, len(rows) // 16) == 0]
    axes.set_xticks(shown, [str(rows[place].layer) for place in shown])
    for place, row in enumerate(rows):
        if place and row.layer == 0:
            axes.axvline(place - 0.5, color=GREY, linewidth=0.8)


def _named(line: Sequence[str], *, with_place: bool) -> str:
    """Return a kind in words, out of its line in the table; of two stacks with the stack and the layers."""
    *place, attention, mlp, _ = line
    words = f"{attention} | {mlp}"
    return printable(f"{place[0]}: {words}" if len(place) > 1 or with_place else words)


def _part(name: str) -> str:
    return {"mlp": "MLP", "layers": "whole layer"}.get(name, name)


def _shade(number: int) -> str:
    """Return a grey that a hatch can be seen on."""
    return ("0.95", "0.7", "0.85", "0.6")[number % 4]


def _hatch(number: int) -> str:
    return HATCHES[number % len(HATCHES)]
