"""Pictures of training runs: their losses against steps or tokens, drawn with matplotlib (the extra `plot`)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.receipt import public_text
from surgeon.errors import CheckpointError, PlanError
from surgeon.plots.figure import GREY, clean, entitle, line_style, new_figure, save, whole_numbers
from surgeon.text import few

LossRecord = Mapping[str, Any]  # a line of a run's metrics.jsonl, with "step" and "tokens"
AXES = ("steps", "tokens")
SERIES = {"training": "loss", "validation": "eval_loss", "trained text": "probe_loss"}
FEW = 20  # a training curve of at most so many points is not smoothed, and each point has a dot
WINDOW = 50  # per so many points, the smoothing mean takes one more neighbour on each side
EPSILON = 1e-6
WIDTH_OF_LEGEND = 84  # letters
MOST_EPOCHS = 12  # borders that are drawn; of more epochs each second one, and so on
TOP = 0.98  # the part of the raw losses that fits below the picture's top: one spike would flatten the rest


def plot_losses(runs: Sequence[tuple[Path, Sequence[LossRecord]]], path: Path, *, x: str = "steps") -> Path:
    """Draw the losses of runs, each a directory or metrics.jsonl and its records, and return `path`.

    Each run has a colour and a mark: the training loss is drawn raw and smoothed, the validation loss as marks on a
    dashed line, the loss of the probe (trained rows) as open marks on a dotted one. Where an epoch ends, a line stands.
    Raises PlanError where matplotlib is missing or a run has no losses, OutputError where the file cannot be written.
    """
    save(draw_losses(runs, x=x), path)
    return path


def draw_losses(runs: Sequence[tuple[Path, Sequence[LossRecord]]], *, x: str = "steps") -> Any:
    """Return the figure that `plot_losses` writes."""
    assert x in AXES, f"{x} is no axis"
    for run, records in runs:
        if not any(_finite(records, key, x)[0] for key in SERIES.values()):
            raise PlanError(f"{run} has no losses to draw", hint="The run ended, or was asked, before its first step.")
    labels = names([run for run, _ in runs])
    by_name = {name: list(records) for name, (_, records) in zip(labels, runs, strict=True)}
    figure = new_figure(8.0, 4.8)
    axes = figure.subplots()
    for number, (name, records) in enumerate(by_name.items()):
        _draw(axes, records, x=x, style=line_style(number), label=name if len(by_name) > 1 else None)
    axes.set(xlabel="tokens" if x == "tokens" else "step", ylabel="loss (nats)")
    axes.set_ylim(*_limits(list(by_name.values()), x))
    axes.set_xlim(left=-0.01 * axes.get_xlim()[1])  # so that a dot at the start is not clipped
    whole_numbers(axes.xaxis)
    _epochs(axes, list(by_name.values()), x)
    axes.grid(alpha=0.25)
    clean(axes)
    if x == "tokens":
        axes.xaxis.set_major_formatter(_short)
    _legend(figure, by_name)
    entitle(figure, _title(runs))
    return figure


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


def _draw(axes: Any, records: Sequence[LossRecord], *, x: str, style: Mapping[str, Any], label: str | None) -> None:
    places, losses = _finite(records, "loss", x)
    colour, mark = style["color"], style["marker"]
    if len(places) <= FEW:
        axes.plot(places, losses, "-", marker=mark, color=colour, alpha=0.7, linewidth=1.5, markersize=3.5, label=label)
    else:
        axes.plot(places, losses, color=colour, alpha=0.25, linewidth=0.8)
        every = max(1, len(places) // 8)
        seen = {"marker": mark, "markevery": (every // 2, every), "markersize": 4.5}
        axes.plot(places, smoothed(losses), color=colour, linewidth=1.8, label=label, **seen)
    edge = {"color": colour, "marker": mark, "markeredgecolor": "black", "markeredgewidth": 0.8, "markersize": 6.5}
    axes.plot(*_finite(records, "eval_loss", x), linestyle="--", linewidth=1.2, zorder=3, **edge)
    open_marks = edge | {"markerfacecolor": "white"}
    axes.plot(*_finite(records, "probe_loss", x), linestyle=":", linewidth=1.2, zorder=3, **open_marks)


def epoch_ends(records: Sequence[LossRecord], x: str) -> list[tuple[int, float]]:
    """Return the number of each epoch that a run has ended, and the place where it did; [] where no record says it."""
    ends: list[tuple[int, float]] = []
    before = 0.0
    for record in records:
        epoch, place = record.get("epoch"), record.get("tokens" if x == "tokens" else "step")
        if not isinstance(epoch, float | int) or not isinstance(place, float | int) or not math.isfinite(epoch):
            continue
        # A whole number is the end of an epoch; transformers reaches it with an error of rounding.
        if math.floor(epoch + EPSILON) > math.floor(before + EPSILON):
            ends.append((math.floor(epoch + EPSILON), place))
        before = max(before, epoch)
    return ends


def _epochs(axes: Any, runs: Sequence[Sequence[LossRecord]], x: str) -> None:
    """Draw a line where an epoch ends, with its number; of runs whose epochs end elsewhere, each in its colour."""
    every = [epoch_ends(records, x) for records in runs]
    differ = any(ends != every[0] for ends in every)
    for number, ends in enumerate(every if differ else every[:1]):
        colour = line_style(number)["color"] if differ else GREY
        skipped = max(1, math.ceil(len(ends) / MOST_EPOCHS))
        for epoch, place in ends[skipped - 1 :: skipped]:
            axes.axvline(place, color=colour, linestyle=(0, (1, 2)), linewidth=1.0, zorder=0)
            height = 0.995 - 0.045 * (number % 4)
            at = {"transform": axes.get_xaxis_transform(), "ha": "right", "va": "top", "fontsize": "x-small"}
            axes.text(place, height, f"epoch {epoch} ", color=colour, **at)


def _title(runs: Sequence[tuple[Path, Sequence[LossRecord]]]) -> str:
    """Return what was trained on what, as far as it holds for all runs, and for how long."""
    asked = [_asked(run) for run, _ in runs]
    models = list(dict.fromkeys(model for model, _ in asked))
    data = list(dict.fromkeys(data for _, data in asked))
    parts = [models[0] if len(models) == 1 and models[0] else f"{len(runs)} runs" if len(runs) > 1 else ""]
    parts += [f"on {data[0]}"] if len(data) == 1 and data[0] else []
    steps = max((record.get("step", 0) for _, records in runs for record in records), default=0)
    tokens = max((record.get("tokens", 0) for _, records in runs for record in records), default=0)
    return " ".join([part for part in parts if part] + [f"({steps:,} steps, {tokens:,} tokens)"])


def _asked(run: Path) -> tuple[str, str]:
    """Return the names of the model and of the data that a run was asked for; "" where its run.json does not say."""
    try:
        request = read_json((run.parent if run.suffix == ".jsonl" else run) / "run.json")
    except CheckpointError:  # none is there, or it is damaged: the picture has a shorter title
        return "", ""
    content = request if isinstance(request, Mapping) else {}
    model, data = content.get("model"), content.get("data")
    origin = model if isinstance(model, Mapping) else {}
    named = public_text(str(origin.get("id") or origin.get("path") or ""))
    return named, few([public_text(str(item)) for item in data]) if isinstance(data, list) and data else ""


def _legend(figure: Any, records: dict[str, list[LossRecord]]) -> None:
    """Add a legend: the colour of each run, and the kind of line of each loss."""
    from matplotlib.lines import Line2D

    several = len(records) > 1
    colour = GREY if several else line_style(0)["color"]
    mark = line_style(0)["marker"]
    edge: dict[str, Any] = {"marker": mark, "markeredgecolor": "black", "markeredgewidth": 0.8, "markersize": 6}
    kinds = {
        "training": Line2D([], [], color=colour, linewidth=1.8),
        "validation": Line2D([], [], color=colour, linestyle="--", **edge),
        "trained text": Line2D([], [], color=colour, linestyle=":", markerfacecolor="white", **edge),
    }
    drawn = [name for name, key in SERIES.items() if any(series(run, key)[0] for run in records.values())]
    handles, labels = [kinds[name] for name in drawn], list(drawn)
    if several:
        styles = [line_style(number) for number in range(len(records))]
        runs = [Line2D([], [], color=style["color"], marker=style["marker"], linewidth=2.5) for style in styles]
        handles, labels = runs + handles, list(records) + labels
    columns = max(1, min(len(labels), WIDTH_OF_LEGEND // (max(map(len, labels)) + 6)))
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns)  # it hides no line there


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
