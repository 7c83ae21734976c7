"""The scores of a model on a text, as the record in scores.json. Pure data: no torch, no weights."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon import text
from surgeon.checkpoint.json_files import read_json
from surgeon.checkpoint.receipt import to_bytes, versions
from surgeon.checkpoint.source import SCORES, Source, inside
from surgeon.errors import CheckpointError, MeasureError, PlanError
from surgeon.mistyped import hint_beside
from surgeon.showing import Shown
from surgeon.transforms.scores import METHODS

FORMAT = 1
MOST_BYTES = 100_000_000  # of a record: 80 layers of 28,672 neurons take half of it
AGAIN = "Score again: leave out --scores-from."


@dataclass(frozen=True, repr=False)
class Scores(Shown):
    """Scores of layers and widths, with the model and the text that they were taken on.

    `layers` maps each score to one number per layer, or to a matrix where its row in METHODS says so. That of
    "angular": entry [s][e] is the distance in units of π between the states before layer s and before layer e, None
    where e <= s. `widths` maps rankings of WIDTHS to nested lists by axis, as `surgeon.measure.activations`
    and `magnitude` return them. `greedy` is the order in which layers go, with the perplexity after each. `loss` is
    that of the whole model on the text, in nats per token.
    """

    model: Mapping[str, Any]  # provenance: an id and a commit, or a path and a fingerprint
    depth: int
    data: Mapping[str, Any] | None  # the text, None for scores that read none
    tokens: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)  # of the numbers: tokens, dtype, device
    layers: Mapping[str, list[Any]] = field(default_factory=dict)
    widths: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    greedy: Mapping[str, Any] | None = None
    loss: float | None = None

    @property
    def headline(self) -> str:
        """Which scores of how many layers, on how many tokens."""
        names = [*self.layers, *(f"widths by {name}" for name in self.widths), *(["greedy"] if self.greedy else [])]
        on = f", on {self.tokens:,} tokens" if self.tokens else ""
        return f"{', '.join(names) or 'none'}, of {self.depth} layers{on}"

    def to_text(self) -> str:
        """Return the scores of single layers for people; blocks and widths are in the attributes."""
        plain = [name for name in self.layers if not METHODS[name].matrix] if self.layers else []
        lines = [[str(i), *(f"{self.layers[name][i]:.6g}" for name in plain)] for i in range(self.depth)]
        told = [text.rows([("scores", self.headline)])]
        return "\n\n".join([*told, text.table(["layer", *plain], lines)] if plain else told)

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
    """Return the record in a file. Raises MeasureError for a file that holds none."""
    try:
        content = read_json(path, most=MOST_BYTES)
    except CheckpointError as error:
        raise MeasureError(
            str(error), hint=AGAIN if path.exists() else hint_beside(path, "surgeon prune writes scores.json.")
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MeasureError(f"{path} is no file of scores that this surgeon wrote", hint=AGAIN)
    depth, layers, widths = content.get("depth"), content.get("scores"), content.get("widths")
    if type(depth) is not int or depth < 1 or not isinstance(content.get("model"), dict):
        raise MeasureError(f"{path} does not say which model was scored", hint=AGAIN)
    if not isinstance(layers, dict) or not isinstance(widths, dict):
        raise MeasureError(f"{path} holds no scores", hint=AGAIN)
    for name, values in layers.items():
        if not _fits(values, depth, matrix=name in METHODS and METHODS[name].matrix):
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
        data=content.get("data"),
        tokens=content["tokens"],
        seed=content["seed"],
        options=content["options"],
        layers=layers,
        widths=widths,
        greedy=greedy,
        loss=content.get("loss"),
    )


def check_model(scores: Scores, provenance: Mapping[str, Any], label: str) -> None:
    """Raises MeasureError when the scores are of another model than the one of this provenance."""
    for key in ("fingerprint", "commit"):
        scored, present = scores.model.get(key), provenance.get(key)
        if scored is not None and present is not None:
            if scored != present:
                raise MeasureError(f"the scores are of other weights than those of {label}", hint=AGAIN)
            return
    raise MeasureError(f"the scores do not say that they are of {label}", hint=AGAIN)


def read_scores_of(path: str | os.PathLike[str], source: Source) -> Scores:
    """Return the scores in a file, or in the scores.json of a directory. Raises MeasureError for another model's."""
    place = Path(path)
    scores = read_scores(inside(place, SCORES) if place.is_dir() else place)
    check_model(scores, source.provenance(), source.label)
    return scores


def check_ranking(
    scores: Scores, name: str, *, all_tokens: bool = False, greedy_protect: tuple[int, int] | None = None
) -> None:
    """Raises PlanError when the record does not hold the score `name` as it is needed.

    `greedy_protect` is the number of first and last layers that a greedy removal protects, None without one.
    """
    if greedy_protect is not None and scores.greedy is None:
        raise PlanError("the scores hold no greedy order", hint=AGAIN)
    if greedy_protect is not None and scores.greedy and list(greedy_protect) != scores.greedy.get("protect"):
        raise PlanError(
            f"the greedy order was found with --protect {scores.greedy.get('protect')}, not {list(greedy_protect)}",
            hint=AGAIN,
        )
    if greedy_protect is None and name not in scores.layers:
        there = ", ".join(scores.layers) or "none"
        raise PlanError(f"there are no {name} scores (there are: {there})", hint="Leave out --scores-from.")
    recorded = scores.options.get("tokens", "last")
    needed = "all" if all_tokens else "last"
    if METHODS[name].token_choice and recorded != needed:
        raise PlanError(
            f"the scores were taken with --tokens {recorded}, not {needed}",
            hint=f"Use --tokens {recorded}, or leave out --scores-from.",
        )


def perplexities(losses: Sequence[float]) -> list[float]:
    """Return exp of each loss; infinite where that is beyond a float."""
    return [math.exp(loss) if loss < 700 else math.inf for loss in losses]


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
    """Return whether these are the scores of an axis: of the whole model for "hidden", else of each stack's layers."""
    if axis == "hidden":
        return _are_numbers(values, nested=0)
    return (
        isinstance(values, list)
        and len(values) in (depth, 2 * depth)
        and _are_numbers(values, nested=2 if axis == "heads" else 1)
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


# The other entries of a record.
_REST: Mapping[str, Callable[[object], bool]] = {
    "tokens": lambda value: type(value) is int,
    "seed": lambda value: type(value) is int,
    "options": lambda value: isinstance(value, dict),
    "data": lambda value: value is None or isinstance(value, dict),
    "loss": lambda value: value is None or _is_number(value),
}
