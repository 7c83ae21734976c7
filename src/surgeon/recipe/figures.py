"""The figures of results, as people read them: a line for each step, tables over steps, and what was lost."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from statistics import fmean, stdev
from typing import Any, TypeGuard

from surgeon.recipe.running import Outcome
from surgeon.text import plus_minus

TRAINED = {"train_loss": "training loss", "eval_loss": "validation loss"}
Table = tuple[list[str], list[list[str]]]  # the header, and the lines


def headline(result: Mapping[str, Any]) -> str:
    """Return the figures of a result that matter most, in a line."""
    if "fused" in result:
        return f"in one pass with {result['fused']}"
    said = [text for key, tell in _TOLD.items() if (text := _told(result, key, tell))]
    for name, words in TRAINED.items():
        if _is_number(value := result.get(name)):
            error = result.get(f"{name}_error")
            said.append(f"{words} {plus_minus(value, error if _is_number(error) else None)}")
    measured = [f"{name.replace('_', ' ')} {plus_minus(value, error)}" for name, value, error in measures(result)]
    return ", ".join([*said, *measured[:2], *_recovery(result)])


def measures(result: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Yield the figures that were measured with a standard error: name, value, error. A training's own are none."""
    for name, value in result.items():
        if f"{name}_error" in result and name not in ("recovery", *TRAINED) and _is_number(value):
            error = result[f"{name}_error"]
            yield name, float(value), float(error) if _is_number(error) else None


def evaluations(outcomes: Sequence[Outcome]) -> Table:
    """Return all figures with errors, a line each, beside those of the baseline."""
    lines = []
    for step, result in chain.from_iterable(map(_with_tasks, outcomes)):
        baseline = result.get("baseline")
        differences = result.get("differences")
        for number, (name, value, error) in enumerate(measures(result)):
            other = _measure(baseline, name)
            gap = differences.get(name) if isinstance(differences, Mapping) else None
            lines.append(
                [
                    step,
                    name.replace("_", " "),
                    plus_minus(value, error),
                    "" if other is None else plus_minus(*other),
                    "" if not isinstance(gap, Mapping) else plus_minus(gap["value"], gap["error"]),
                    "".join(_recovery(result)).removeprefix("recovery ") if number == 0 else "",
                ]
            )
    return ["step", "figure", "value", "baseline", "difference", "recovery"], lines


def _with_tasks(outcome: Outcome) -> list[tuple[str, Mapping[str, Any]]]:
    """Return a step with its result, and each of its tasks, where it evaluates several, with the task's."""
    tasks = outcome.result.get("tasks")
    own = tasks.items() if isinstance(tasks, Mapping) else ()
    return [(outcome.name, outcome.result), *((f"{outcome.name}: {name}", told) for name, told in own)]


def repeated(outcomes: Sequence[Outcome]) -> Table:
    """Return the mean over seeds for each figure, with the standard error of the mean: their spread, no row's."""
    lines = []
    grouped = sorted((outcome for outcome in outcomes if outcome.group), key=lambda outcome: outcome.group)
    for group, rounds in groupby(grouped, key=lambda outcome: outcome.group):
        values: dict[str, list[float]] = {}
        refused = False
        for outcome in rounds:
            figures = [(name, value) for name, value, _ in measures(outcome.result)]
            recovered = outcome.result.get("recovery")
            refused |= "recovery" in outcome.result and not _is_number(recovered)
            figures += [("recovery", float(recovered))] if _is_number(recovered) else []
            for name, value in figures:
                values.setdefault(name, []).append(value)
        if refused:  # the mean of those that are left would say too much
            values.pop("recovery", None)
        for name, found in values.items():
            error = stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
            lines.append([group, name.replace("_", " "), plus_minus(fmean(found), error), str(len(found))])
    return ["step", "figure", "mean ± standard error over seeds", "seeds"], lines


def ranks(outcomes: Sequence[Outcome]) -> Table:
    """Return the rank of each value of a loop's settings, a column for each step that measures: 1 is the best.

    So a report shows where a ranking before healing is another after it. A step is ranked by its first figure; of
    perplexities and losses less is better.
    """
    columns: dict[str, dict[str, tuple[float, float | None]]] = {}
    for outcome in outcomes:
        first = next(measures(outcome.result), None)
        if first is not None and outcome.stem and outcome.output is None:  # what was made has figures of its own kind
            name, value, error = first
            sign = 1 if name in ("perplexity", "pseudo_perplexity", "loss") else -1
            column = columns.setdefault(f"{outcome.stem}, {name.replace('_', ' ')}", {})
            column[outcome.name.removeprefix(outcome.stem).removeprefix("-")] = (sign * value, error)
    columns = {name: column for name, column in columns.items() if len(column) > 1}
    values = dict.fromkeys(value for column in columns.values() for value in column)
    return ["", *columns], [[value, *(_rank(column, value) for column in columns.values())] for value in values]


def _rank(column: Mapping[str, tuple[float, float | None]], value: str) -> str:
    """Return the place of a value in a column of figures, of which less is better, with its figure; "" for none."""
    if value not in column:
        return ""
    figure, error = column[value]
    place = sorted(other for other, _ in column.values()).index(figure) + 1
    return f"{place} ({plus_minus(abs(figure), error)})"


def sentence(outcomes: Sequence[Outcome]) -> str | None:
    """Return what was lost, by the last comparison with a baseline; None where there is none."""
    judged = next((outcome for outcome in reversed(outcomes) if "baseline" in outcome.result), None)
    if judged is None:
        return None
    result = judged.result
    name, value, error = next(measures(result), ("", math.nan, None))
    other = _measure(result.get("baseline"), name)
    if other is None:
        return None
    figure = name.replace("_", " ")
    said = (
        f"{result.get('model')} has a {figure} of {plus_minus(value, error)}, where {result['baseline'].get('model')}"
    )
    said += f" has {plus_minus(*other)}"
    gaps = result.get("differences")
    for loss, gap in gaps.items() if isinstance(gaps, Mapping) else ():
        of = "" if loss == name else f" of {loss.replace('_', ' ')}"
        said += f" (a difference{of} of {plus_minus(gap['value'], gap['error'])})"
        break
    recovered = "".join(_recovery(result))
    said += f"; {recovered}" if recovered else ""
    cuts = [outcome.result["parameters"] for outcome in outcomes if _is_change(outcome.result.get("parameters"))]
    if len(cuts) == 1:  # of several surgeries it is not known which one led to this model
        before, after = cuts[0]["before"], cuts[0]["after"]
        said += f"; it has {100 * after / before:.1f} % of the parameters ({before:,} → {after:,})"
    return said + "."


def _recovery(result: Mapping[str, Any]) -> list[str]:
    value, error = result.get("recovery"), result.get("recovery_error")
    if not _is_number(value) or not _is_number(error):
        refused = result.get("recovery_refused")
        return [f"no recovery ({refused})"] if isinstance(refused, str) else []
    return [f"recovery {plus_minus(value, error)} %"]


def _measure(entries: Any, name: str) -> tuple[float, float | None] | None:
    found = (item for item in measures(entries) if item[0] == name) if isinstance(entries, Mapping) else iter(())
    return next(((value, error) for _, value, error in found), None)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _told(result: Mapping[str, Any], key: str, tell: Callable[[Any], str]) -> str:
    value = result.get(key)
    return "" if value is None or f"{key}_error" in result else tell(value)


def _is_change(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_number(value.get(key)) for key in ("before", "after"))


def _change(value: Any, form: str, unit: str) -> str:
    if not _is_change(value):
        return ""
    return f"{value['before']:{form}} → {value['after']:{form}}{unit}"


_TOLD: Mapping[str, Callable[[Any], str]] = {
    "layers": lambda value: _change(value, "d", " layers"),
    "parameters": lambda value: _change(value, ",d", " parameters"),
    "perplexity": lambda value: f"perplexity {told}" if (told := _change(value, ",.4g", "")) else "",
    "steps": lambda value: f"{value:,} steps" if _is_number(value) else "",
    "tokens": lambda value: f"{value:,} tokens" if _is_number(value) else "",
    "rows": lambda value: f"{value:,} rows" if _is_number(value) else "",
    "acceptance": lambda value: f"acceptance {100 * value:.1f} %" if _is_number(value) else "",
}
