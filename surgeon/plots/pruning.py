"""Pictures of what was measured, drawn with matplotlib (the extra `plot`)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.errors import OutputError, PlanError

if TYPE_CHECKING:
    from surgeon.verbs.prune import Pruning

NOTHING = "{} has nothing to draw"
NOTHING_HINT = "Leave out --plot, or add --curve with --data."


def has_picture(surgery: "Pruning") -> bool:
    """Return whether a pruning has something to draw beside a curve."""
    scored = surgery.scores is not None and surgery.score in surgery.scores.layers
    return scored or _greedy_curve(surgery) is not None


def plot_pruning(surgery: "Pruning", path: Path, *, curve: Sequence[float] | None = None) -> None:
    """Draw the scores that decided a cut, and the perplexity against layers removed where there is a `curve`.

    Of "angular" every start and size of a block, with the one that was chosen; of other scores a bar a layer; of a
    greedy removal the perplexity behind each layer that went.
    """
    from matplotlib.figure import Figure

    values = None if surgery.scores is None else surgery.scores.layers.get(surgery.score)
    dropped = () if surgery.choice is None else surgery.choice.dropped
    if values is None and curve is None:
        curve = _greedy_curve(surgery)
    num_panels = (values is not None) + (curve is not None)
    if not num_panels:
        raise PlanError(NOTHING.format(surgery.score), hint=NOTHING_HINT)
    figure = Figure(figsize=(6.4 * num_panels, 4.6), layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    if values is not None:
        draw = _blocks if surgery.score == "angular" else _bars
        draw(figure, panels.pop(0), values, dropped, surgery.score)
    if curve is not None:
        _curve(panels.pop(0), curve, len(dropped))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="Name another file.") from error


def _greedy_curve(surgery: "Pruning") -> list[float] | None:
    """Return the perplexity with 0, 1, 2 ... layers gone as a greedy removal found it, None where there was none."""
    scores = surgery.scores
    if surgery.score != "perplexity" or scores is None or scores.greedy is None:
        return None
    from surgeon.measure.removal import perplexities

    whole = [math.nan] if scores.loss is None else perplexities([scores.loss])
    return [*whole, *scores.greedy["perplexity"]]


def _blocks(figure: Any, axes: Any, values: Sequence[Sequence[Any]], dropped: Sequence[int], _: str) -> None:
    depth = len(values)
    sizes = range(1, max(depth, 2))
    grid = [
        [values[start][start + size] if start + size <= depth else float("nan") for start in range(depth)]
        for size in sizes
    ]
    shown = axes.imshow(
        grid, origin="lower", aspect="auto", cmap="viridis", extent=(-0.5, depth - 0.5, 0.5, sizes.stop - 0.5)
    )
    figure.colorbar(shown, ax=axes, label="angular distance / π")
    best = [min((values[start][start + size], start) for start in range(depth - size + 1))[1] for size in sizes]
    axes.plot(
        best, list(sizes), "o", color="white", markeredgecolor="black", markersize=4, label="closest block of each size"
    )
    if dropped:
        block = tuple(dropped) == tuple(range(dropped[0], dropped[-1] + 1))
        gone = [(dropped[0], len(dropped))] if block else [(layer, 1) for layer in dropped]
        axes.plot(*zip(*gone, strict=True), "o", color="red", markersize=7, label="removed")
    axes.legend(loc="upper right")
    axes.set(xlabel="first layer of the block", ylabel="layers in the block", title="distance across a block")


def _bars(figure: Any, axes: Any, values: Sequence[float], dropped: Sequence[int], name: str) -> None:
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
    axes.set(xlabel="layer", ylabel=name, title="removed layers in red" if dropped else name)


def _curve(axes: Any, curve: Sequence[float], count: int) -> None:
    axes.plot(range(len(curve)), curve, ".-")
    if count < len(curve):
        axes.plot([count], [curve[count]], "o", color="red", label="this cut")
        axes.legend()
    axes.set_yscale("log")
    axes.set(xlabel="layers removed", ylabel="perplexity", title="before healing")
