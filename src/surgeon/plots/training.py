"""Pictures of training runs: their losses against steps or tokens, drawn with matplotlib (the extra `plot`)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from surgeon.errors import OutputError, PlanError
from surgeon.plots.figure import require_matplotlib

LossRecord = Mapping[str, Any]  # a line of a run's metrics.jsonl, with "step" and "tokens"
AXES = ("steps", "tokens")
SERIES = {"training": "loss", "validation": "eval_loss", "trained text": "probe_loss"}
FEW = 20  # a training curve of at most so many points is not smoothed, and each point has a dot
WINDOW = 50  # per so many points, the smoothing mean takes one more neighbour on each side
TOP = 0.98  # the part of the raw losses that fits below the picture's top: one spike would flatten the rest


def plot_losses(runs: Sequence[tuple[Path, Sequence[LossRecord]]], path: Path, *, x: str = "steps") -> Path:
    """Draw the losses of runs, each a directory or metrics.jsonl and its records, and return `path`.

    Each run has a colour: the training loss is drawn raw and smoothed, the validation loss as dots on a line, the loss
    of the probe (trained rows) as open dots. Raises PlanError where matplotlib is missing or a run has no losses,
    OutputError where the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        require_matplotlib()
        raise

    assert x in AXES, f"{x} is no axis"
    for run, records in runs:
        if not any(_finite(records, key, x)[0] for key in SERIES.values()):
            raise PlanError(f"{run} has no losses to draw", hint="The run ended, or was asked, before its first step.")
    labels = names([run for run, _ in runs])
    by_name = {name: list(records) for name, (_, records) in zip(labels, runs, strict=True)}
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.subplots()
    for number, (name, records) in enumerate(by_name.items()):
        _draw(axes, records, x=x, colour=f"C{number % 10}", label=name if len(by_name) > 1 else None)
    axes.set(xlabel="tokens" if x == "tokens" else "step", ylabel="loss")
    axes.set_ylim(*_limits(list(by_name.values()), x))
    axes.set_xlim(left=-0.01 * axes.get_xlim()[1])  # so that a dot at the start is not clipped
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if x == "tokens":
        axes.xaxis.set_major_formatter(_short)
    _legend(axes, by_name)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="Name another file.") from error
    except ValueError as error:  # of an unknown suffix
        raise OutputError(
            f"cannot write {path}: {error}", hint="Name a file that ends in .png, .svg or .pdf."
        ) from error
    return path


def series(records: Iterable[LossRecord], key: str, *, x: str = "step") -> tuple[list[float], list[float]]:
    """Return the places and the values of `key`, of all records that have both."""
    pairs = [(record[x], record[key]) for record in records if key in record and x in record]
    return [place for place, _ in pairs], [value for _, value in pairs]


def names(runs: Sequence[Path]) -> list[str]:
    """Return a short and unique name for each run: the last parts of its directory's path, as many as that takes."""
    places = [run.resolve().parent if run.suffix == ".jsonl" else run.resolve() for run in runs]
    for count in range(1, max((len(place.parts) for place in places), default=1) + 1):
        short = ["/".join(place.parts[-count:]) for place in places]
        if len(set(short)) == len(short):
            return short
    return [f"{place} ({number})" for number, place in enumerate(places, start=1)]  # the same run twice


def smoothed(values: Sequence[float]) -> list[float]:
    """Return each value's mean with its neighbours; at the ends there are fewer of them."""
    reach = max(1, len(values) // WINDOW)
    sums = list(accumulate(values, initial=0.0))
    ends = [(max(0, index - reach), min(len(values), index + reach + 1)) for index in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]


def _draw(axes: Any, records: Sequence[LossRecord], *, x: str, colour: str, label: str | None) -> None:
    places, losses = _finite(records, "loss", x)
    if len(places) <= FEW:
        axes.plot(places, losses, ".-", color=colour, alpha=0.6, linewidth=1.5, markersize=5, label=label)
    else:
        axes.plot(places, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(places, smoothed(losses), color=colour, linewidth=1.8, label=label)
    dot: dict[str, Any] = {
        "color": colour,
        "markeredgecolor": "black",
        "markeredgewidth": 0.8,
        "markersize": 6,
        "linewidth": 1.2,
    }
    axes.plot(*_finite(records, "eval_loss", x), "o--", zorder=3, **dot)
    axes.plot(*_finite(records, "probe_loss", x), "o:", zorder=3, markerfacecolor="white", **dot)


def _legend(axes: Any, records: dict[str, list[LossRecord]]) -> None:
    """Add a legend: the colour of each run, and the kind of line of each loss."""
    from matplotlib.lines import Line2D

    grey = "0.35" if len(records) > 1 else "C0"
    edge: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.8, "markersize": 6}
    kinds = {
        "training": Line2D([], [], color=grey, linewidth=1.8),
        "validation": Line2D([], [], color=grey, linestyle="--", marker="o", **edge),
        "trained text": Line2D([], [], color=grey, linestyle=":", marker="o", markerfacecolor="white", **edge),
    }
    drawn = [name for name, key in SERIES.items() if any(series(run, key)[0] for run in records.values())]
    handles, labels = [kinds[name] for name in drawn], list(drawn)
    if len(records) > 1:
        colours = [Line2D([], [], color=f"C{number % 10}", linewidth=4) for number in range(len(records))]
        handles, labels = colours + handles, list(records) + labels
    axes.legend(handles, labels, frameon=False)


def _limits(runs: Sequence[Sequence[LossRecord]], x: str) -> tuple[float, float]:
    """Return the lowest and highest loss to show: all but a few spikes of training, and every evaluation."""
    raw = sorted(value for records in runs for value in _finite(records, "loss", x)[1])
    others = [value for records in runs for key in ("eval_loss", "probe_loss") for value in _finite(records, key, x)[1]]
    shown = raw[: math.ceil(TOP * len(raw))] + others
    low, high = min(raw[:1] + others), max(shown)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _finite(records: Sequence[LossRecord], key: str, x: str) -> tuple[list[float], list[float]]:
    """Return the places and values of a loss, without values that are not finite."""
    pairs = zip(*series(records, key, x="tokens" if x == "tokens" else "step"), strict=True)
    finite = [(place, value) for place, value in pairs if isinstance(value, float | int) and math.isfinite(value)]
    return [place for place, _ in finite], [value for _, value in finite]


def _short(number: float, _: object = None) -> str:
    """Return a number of tokens as text for an axis: 250k, 1.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
