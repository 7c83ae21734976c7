"""The scores of a model on a text, as a record: what scores.json holds. Pure data; neither torch nor weights."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.checkpoint.receipt import to_bytes, versions
from surgeon.errors import MeasureError

FORMAT = 1
AGAIN = "Score again: leave out --scores-from."


@dataclass(frozen=True)
class Scores:
    """Scores of layers and widths, and what they were taken from.

    `layers` maps each score to one number a layer, and "angular" to a matrix: entry [s][e] is the distance in units of
    π between the states before layer s and before layer e, None where e <= s. `widths` maps "activation" and
    "magnitude" to nested lists by axis, as `surgeon.measure.activations` and `magnitude` give them. `greedy` is the
    order in which layers go, with the perplexity behind each. `loss` is the whole model's on the text, in nats.
    """

    model: Mapping[str, Any]  # provenance: an id and a commit, or a path and a fingerprint
    depth: int
    data: Mapping[str, Any] | None  # what was read, None for scores that read no text
    tokens: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)  # what else decides the numbers: tokens, dtype, device
    layers: Mapping[str, list[Any]] = field(default_factory=dict)
    widths: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    greedy: Mapping[str, Any] | None = None
    loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record as scores.json holds it."""
        return {
            "format": FORMAT,
            "model": dict(self.model),
            "depth": self.depth,
            "data": None if self.data is None else dict(self.data),
            "tokens": self.tokens,
            "seed": self.seed,
            "options": dict(self.options),
            "scores": dict(self.layers),
            "widths": {criterion: dict(axes) for criterion, axes in self.widths.items()},
            "greedy": None if self.greedy is None else dict(self.greedy),
            "loss": self.loss,
            "versions": versions(),
        }

    def to_bytes(self) -> bytes:
        """Return the record as a file."""
        return to_bytes(self.to_dict())


def read_scores(path: Path) -> Scores:
    """Return the record in a file. Raises MeasureError when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MeasureError(f"cannot read {path}: {error.strerror}", hint="surgeon prune writes scores.json.") from error
    except (ValueError, RecursionError) as error:
        raise MeasureError(f"{path} is not JSON: {error}", hint=AGAIN) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MeasureError(f"{path} is no file of scores that this surgeon wrote", hint=AGAIN)
    depth, layers, widths = content.get("depth"), content.get("scores"), content.get("widths")
    if type(depth) is not int or depth < 1 or not isinstance(content.get("model"), dict):
        raise MeasureError(f"{path} does not say which model was scored", hint=AGAIN)
    if not isinstance(layers, dict) or not isinstance(widths, dict):
        raise MeasureError(f"{path} holds no scores", hint=AGAIN)
    for name, values in layers.items():
        if not _fits(values, depth, matrix=name == "angular"):
            raise MeasureError(f"{path}: the scores {name!r} are not those of {depth} layers", hint=AGAIN)
    for criterion, axes in widths.items():
        if not isinstance(axes, dict) or not all(_fits_axis(axis, values, depth) for axis, values in axes.items()):
            raise MeasureError(f"{path}: the widths by {criterion!r} are not those of {depth} layers", hint=AGAIN)
    for key, fits in _REST.items():
        if not fits(content.get(key)):
            raise MeasureError(f"{path}: {key!r} cannot be {content.get(key)!r:.40}", hint=AGAIN)
    greedy = content.get("greedy")
    if greedy is not None and not (isinstance(greedy, dict) and _are_layers(greedy.get("order"), depth)):
        raise MeasureError(f"{path}: the greedy order is none of {depth} layers", hint=AGAIN)
    return Scores(
        model=content["model"],
        depth=depth,
        data=content["data"],
        tokens=content["tokens"],
        seed=content["seed"],
        options=content["options"],
        layers=layers,
        widths=widths,
        greedy=greedy,
        loss=content["loss"],
    )


def check_model(scores: Scores, provenance: Mapping[str, Any], label: str) -> None:
    """Raises MeasureError when the scores are of another model than the one of this provenance."""
    for key in ("fingerprint", "commit"):
        known, found = scores.model.get(key), provenance.get(key)
        if known is not None and found is not None:
            if known != found:
                raise MeasureError(f"the scores are of other weights than those of {label}", hint=AGAIN)
            return
    raise MeasureError(f"the scores do not say that they are of {label}", hint=AGAIN)


def _fits(values: object, depth: int, *, matrix: bool) -> bool:
    if not isinstance(values, list) or len(values) != depth:
        return False
    if not matrix:
        return all(_is_number(value) for value in values)
    return all(
        isinstance(row, list) and len(row) == depth + 1 and all(map(_is_number, row[start + 1 :]))
        for start, row in enumerate(values)
    )


def _fits_axis(axis: str, values: object, depth: int) -> bool:
    """Return whether these are the scores of an axis: a number each, of each layer but for those of "hidden"."""
    if axis == "hidden":
        return _are_numbers(values, nested=0)
    return (
        isinstance(values, list) and len(values) == depth and _are_numbers(values, nested=2 if axis == "heads" else 1)
    )


def _are_numbers(values: object, *, nested: int) -> bool:
    if not isinstance(values, list) or not values:
        return False
    if not nested:
        return all(map(_is_number, values))
    return all(_are_numbers(row, nested=nested - 1) and len(row) == len(values[0]) for row in values)


def _is_number(value: object) -> bool:
    return (type(value) is float and not math.isnan(value)) or (type(value) is int and abs(value) < 2**53)


def _are_layers(order: object, depth: int) -> bool:
    return (
        isinstance(order, Sequence)
        and all(type(layer) is int and 0 <= layer < depth for layer in order)
        and len(set(order)) == len(order)
    )


# What else a record holds.
_REST: Mapping[str, Callable[[object], bool]] = {
    "tokens": lambda value: type(value) is int,
    "seed": lambda value: type(value) is int,
    "options": lambda value: isinstance(value, dict),
    "data": lambda value: value is None or isinstance(value, dict),
    "loss": lambda value: value is None or _is_number(value),
}
