"""Pictures of a pruning: its scores, the layers that go, and the perplexity against layers removed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgeon.errors import PlanError
from surgeon.measure.record import Scores, perplexities
from surgeon.plots.figure import save
from surgeon.transforms.scores import METHODS

NOTHING = "{} has nothing to draw"
NOTHING_HINT = "Leave out --plot, or add --curve with --data."


def has_picture(score: str, scores: Scores | None) -> bool:
    """Return whether a score has something to draw beside a curve."""
    return scores is not None and (score in scores.layers or _greedy_curve(score, scores) is not None)


def plot_pruning(
    path: Path,
    score: str,
    scores: Scores | None,
    *,
    dropped: Sequence[int] = (),
    curve: Sequence[float] | None = None,
) -> None:
    """Draw the values of the score `score`, and the perplexity against layers removed where there is a `curve`.

    Of a score with a matrix every start and size of a block, with the one that was chosen; of other scores a bar per
    layer; of a greedy removal the perplexity after each removed layer.
    """
    from matplotlib.figure import Figure

    values = None if scores is None else scores.layers.get(score)
    if scores is not None and values is None and curve is None:
        curve = _greedy_curve(score, scores)
    num_panels = (values is not None) + (curve is not None)
    if not num_panels:
        raise PlanError(NOTHING.format(score), hint=NOTHING_HINT)
    figure = Figure(figsize=(6.4 * num_panels, 4.6), layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    if values is not None:
        draw = _blocks if METHODS[score].matrix else _bars
        draw(figure, panels.pop(0), values, dropped, METHODS[score].label or score)
    if curve is not None:
        _curve(panels.pop(0), curve, len(dropped))
    save(figure, path)


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
        grid, origin="lower", aspect="auto", cmap="viridis", extent=(-0.5, depth - 0.5, 0.5, sizes.stop - 0.5)
    )
    figure.colorbar(shown, ax=axes, label=label)
    best = [min((values[start][start + size], start) for start in range(depth - size + 1))[1] for size in sizes]
    axes.plot(
        best, list(sizes), "o", color="white", markeredgecolor="black", markersize=4, label="closest block of each size"
    )
    if dropped:
        block = tuple(dropped) == tuple(range(dropped[0], dropped[-1] + 1))
        removed = [(dropped[0], len(dropped))] if block else [(layer, 1) for layer in dropped]
        axes.plot(*zip(*removed, strict=True), "o", color="red", markersize=7, label="removed")
    axes.legend(loc="upper right")
    axes.set(xlabel="first layer of the block", ylabel="layers in the block", title="distance across a block")


def _bars(figure: Any, axes: Any, values: Sequence[float], dropped: Sequence[int], label: str) -> None:
    colours = ["tab:red" if layer in set(dropped) else "tab:blue" for layer in range(len(values))]
    finite = [value for value in values if math.isfinite(value)]
    axes.bar(range(len(values)), [value if math.isfinite(value) else math.nan for value in values], color=colours)
    for layer, value in enumerate(values):
        if not math.isfinite(value):
            axes.text(
                layer, 0.98, "∞", ha="center", va="top", color=colours[layer], transform=axes.get_xaxis_transform()
            )
    if finite and min(finite) > 0 and max(finite) > 50 * min(finite):
        axes.set_yscale("log")
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set(xlabel="layer", ylabel=label, title="removed layers in red" if dropped else label)


def _curve(axes: Any, curve: Sequence[float], count: int) -> None:
    axes.plot(range(len(curve)), curve, ".-")
    if count < len(curve):
        axes.plot([count], [curve[count]], "o", color="red", label="this cut")
        axes.legend()
    axes.set_yscale("log")
    axes.set(xlabel="layers removed", ylabel="perplexity", title="before healing")
