"""A picture of advice: the bits of a text against the parameters of a model, and what the two come to."""

from typing import Any

from surgeon.cost.laws import CAPACITY_BITS, LEARNS, MEMORISES
from surgeon.plots.figure import BLACK, BLUE, GREEN, RED, clean, entitle, new_figure

DECADES = 2.0  # to each side of the model and the text


def draw(parameters: float, bits: float, tokens: int, *, title: str) -> Any:
    """Return a figure: parameters to the right, bits that are not predicted upwards, and the three regions between.

    The dot is this model and text; the line is where the text fills 3.6 bits of each parameter.
    """
    figure = new_figure(6.6, 4.8)
    axes = figure.subplots()
    left, right = parameters / 10**DECADES, parameters * 10**DECADES
    held = [CAPACITY_BITS * side for side in (left, right)]
    low, high = min(bits / 10**DECADES, held[0]), max(bits * 10**DECADES, held[1])
    regions = (
        ("can memorise it", RED, "//", [low, low], [each / MEMORISES for each in held]),
        ("boundary", BLUE, "..", [each / MEMORISES for each in held], [each / LEARNS for each in held]),
        ("does not memorise", GREEN, "\\\\", [each / LEARNS for each in held], [high, high]),
    )
    for name, colour, hatch, bottom, top in regions:
        colours = {"facecolor": "none", "edgecolor": colour, "alpha": 0.35, "linewidth": 0.0}
        axes.fill_between([left, right], bottom, top, hatch=hatch, label=name, **colours)
    axes.plot([left, right], held, color=BLACK, linestyle="--", linewidth=1.2, label="3.6 bits a parameter")
    axes.plot([parameters], [bits], "o", color=BLACK, markersize=9, label=f"this model, {tokens:,} unique tokens")
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    axes.set(xlabel="trained parameters", ylabel="bits of the text that are not predicted")
    clean(axes)
    axes.legend(loc="upper left", framealpha=0.95, edgecolor="none", fontsize="small")
    entitle(figure, title)
    return figure
