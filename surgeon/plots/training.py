"""Pictures of runs: their losses against steps or tokens, drawn with matplotlib (the extra `plot`)."""

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from surgeon.errors import OutputError, PlanError
from surgeon.plots.figure import require_matplotlib
from surgeon.train.run_dir import METRICS, Record, numbers, read_metrics

AXES = ("steps", "tokens")
SERIES = {"training": "loss", "validation": "eval_loss", "trained text": "probe_loss"}
FEW = 20  # points of a training curve that is drawn as it is, each with a dot
WINDOW = 50  # of so many points, one to each side is in the mean that smooths
TOP = 0.98  # the part of all raw losses that the picture's top leaves room for: a spike would flatten the rest


def plot_runs(runs: Sequence[Path], path: Path, *, x: str = "steps") -> Path:
    """Draw the losses of runs (their directories, or metrics.jsonl files) and return `path`.

    One colour a run: the training loss as it was and smoothed, the validation loss as dots on a line, that of the
    probe, rows that were trained, as open ones. Raises PlanError where matplotlib is missing or nothing is there to
    draw, DataError for what is no run, OutputError where the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    assert x in AXES, f"{x} is no axis"
    records = {name: comparable(read_metrics(run)) for name, run in zip(names(runs), runs, strict=True)}
    for run, found in zip(runs, records.values(), strict=True):
        if not any(_finite(found, key, x)[0] for key in SERIES.values()):
            raise PlanError(f"{run} has no losses to draw", hint="The run ended, or was asked, before its first step.")
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.subplots()
    for number, (name, found) in enumerate(records.items()):
        _draw(axes, found, x=x, colour=f"C{number % 10}", label=name if len(records) > 1 else None)
    axes.set(xlabel="tokens" if x == "tokens" else "step", ylabel="loss (nats a token)")
    axes.set_ylim(*_limits(list(records.values()), x))
    axes.set_xlim(left=-0.01 * axes.get_xlim()[1])  # a dot at the start is drawn whole
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if x == "tokens":
        axes.xaxis.set_major_formatter(_short)
    _legend(axes, records)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="Name another file.") from error
    except ValueError as error:  # a suffix that matplotlib does not know
        raise OutputError(
            f"cannot write {path}: {error}", hint="Name a file that ends in .png, .svg or .pdf."
        ) from error
    return path


def comparable(records: Sequence[Record]) -> list[Record]:
    """Return the records with the cross-entropy as the loss, whatever else a run was trained for: a divergence, say."""
    return [{**record, "loss": record["cross_entropy"]} if "cross_entropy" in record else record for record in records]


def names(runs: Sequence[Path]) -> list[str]:
    """Return a short name for each run, each another: the last parts of its path, as many as that takes."""
    places = [run.resolve().parent if run.name == METRICS else run.resolve() for run in runs]
    for count in range(1, max((len(place.parts) for place in places), default=1) + 1):
        found = ["/".join(place.parts[-count:]) for place in places]
        if len(set(found)) == len(found):
            return found
    return [f"{place} ({number})" for number, place in enumerate(places, start=1)]  # the same one twice


def smoothed(values: Sequence[float]) -> list[float]:
    """Return each value's mean with its neighbours; at the ends with those that there are."""
    reach = max(1, len(values) // WINDOW)
    sums = list(accumulate(values, initial=0.0))
    ends = [(max(0, index - reach), min(len(values), index + reach + 1)) for index in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]


def _draw(axes: Any, records: Sequence[Record], *, x: str, colour: str, label: str | None) -> None:
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


def _legend(axes: Any, records: dict[str, list[Record]]) -> None:
    """Say which colour is which run, and which kind of line is which loss."""
    from matplotlib.lines import Line2D

    grey = "0.35" if len(records) > 1 else "C0"
    edge: dict[str, Any] = {"markeredgecolor": "black", "markeredgewidth": 0.8, "markersize": 6}
    kinds = {
        "training": Line2D([], [], color=grey, linewidth=1.8),
        "validation": Line2D([], [], color=grey, linestyle="--", marker="o", **edge),
        "trained text": Line2D([], [], color=grey, linestyle=":", marker="o", markerfacecolor="white", **edge),
    }
    there = [name for name, key in SERIES.items() if any(numbers(found, key)[0] for found in records.values())]
    handles, labels = [kinds[name] for name in there], list(there)
    if len(records) > 1:
        colours = [Line2D([], [], color=f"C{number % 10}", linewidth=4) for number in range(len(records))]
        handles, labels = colours + handles, list(records) + labels
    axes.legend(handles, labels, frameon=False)


def _limits(runs: Sequence[Sequence[Record]], x: str) -> tuple[float, float]:
    """Return the lowest and highest loss to show: all but a few spikes of training, and every evaluation."""
    raw = sorted(value for records in runs for value in _finite(records, "loss", x)[1])
    others = [value for records in runs for key in ("eval_loss", "probe_loss") for value in _finite(records, key, x)[1]]
    kept = raw[: math.ceil(TOP * len(raw))] + others
    low, high = min(raw[:1] + others), max(kept)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _finite(records: Sequence[Record], key: str, x: str) -> tuple[list[float], list[float]]:
    """Return the places and values of a loss, without those that are no numbers: they have no place in a picture."""
    pairs = zip(*numbers(records, key, x="tokens" if x == "tokens" else "step"), strict=True)
    kept = [(place, value) for place, value in pairs if isinstance(value, float | int) and math.isfinite(value)]
    return [place for place, _ in kept], [value for _, value in kept]


def _short(number: float, _: object = None) -> str:
    """Return a number of tokens as an axis shows it: 250k, 1.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
