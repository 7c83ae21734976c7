"""Choose which neurons, heads, channels and experts stay, from their importance: pure, as the choice of layers is.

Sources: Minitron (arXiv:2407.14679) ranks neurons and heads in each layer and channels once for the residual stream;
heads are ranked inside their group, so that every key-value head keeps as many. Weight selection (arXiv:2311.18823)
takes evenly spaced positions instead, whole heads, and one set of channels everywhere.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.errors import PlanError
from surgeon.transforms.narrow import Kept, layers_with
from surgeon.transforms.uniform import uniform, uniform_head_dim

# What ranks the positions of an axis, for each score of layers that a user may name.
CRITERIA = ("activation", "magnitude", "uniform", "random")


def choose_widths(
    anatomy: Anatomy,
    sizes: Mapping[str, int],
    criterion: str,
    *,
    values: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Kept:
    """Return what stays of each axis when `anatomy` shrinks to `sizes`; an axis that keeps its size stays whole.

    `values` holds the importance of positions, by axis: "hidden" (D,), and for each layer of the scored model "ffn",
    "heads" (kv_heads, group), "kv_heads" and "experts". `layers` are the layers of the scored model that this one has.

    Raises PlanError when an axis has no scores, or cannot have that size.
    """
    check_criterion(anatomy, sizes, criterion)
    picker = _Picker(criterion, values or {}, seed)
    numbers = range(anatomy.depth) if layers is None else layers
    old = anatomy.sizes
    options: dict[str, Any] = {}
    if sizes["hidden"] != old["hidden"]:
        options["hidden"] = picker.pick("hidden", None, old["hidden"], sizes["hidden"])
    for axis in ("ffn", "experts"):
        if axis in old and sizes.get(axis, old[axis]) != old[axis]:
            having = layers_with(anatomy, axis)
            options[axis] = {
                new: picker.pick(axis, layer, old[axis], sizes[axis])
                for new, layer in enumerate(numbers)
                if new in having
            }
    kv_heads, group = sizes["kv_heads"], sizes["heads"] // sizes["kv_heads"]
    kept_kv = {new: picker.pick("kv_heads", layer, old["kv_heads"], kv_heads) for new, layer in enumerate(numbers)}
    if kv_heads != old["kv_heads"]:
        options["kv_heads"] = kept_kv
    if group != old["group"]:
        if group > old["group"]:
            raise PlanError(
                f"{sizes['heads']} heads on {kv_heads} key-value heads are {group} a group, more than {old['group']}",
                hint="Cut key-value heads and heads in one proportion, or only heads.",
            )
        options["heads"] = {
            new: tuple(picker.pick("heads", layer, old["group"], group, inside=kv) for kv in kept_kv[new])
            for new, layer in enumerate(numbers)
        }
    if sizes["head_dim"] != old["head_dim"]:
        options["head_dim"] = uniform_head_dim(anatomy, sizes["head_dim"])
    return Kept(**options)


def check_criterion(anatomy: Anatomy, sizes: Mapping[str, int], criterion: str) -> None:
    """Raises PlanError where a criterion has no scores for what shrinks; known before anything is scored."""
    old = anatomy.sizes
    if sizes["head_dim"] != old["head_dim"] and criterion != "uniform":
        raise PlanError(
            f"heads keep their size of {old['head_dim']}: its dims turn in pairs",
            hint="--score uniform takes every n-th pair.",
        )
    rows = {name: anatomy.row(name)[0] for name in anatomy.spec.tensors if ".experts." in name}
    in_experts = any("ffn" in axes_of(dim) for row in rows.values() for dim in row.axes)
    if sizes["ffn"] != old["ffn"] and criterion == "activation" and in_experts:
        raise PlanError(
            "the neurons of experts have no activation scores",
            hint="Keep fewer experts: --experts; or --score magnitude.",
        )


class _Picker:
    """Picks positions by one criterion."""

    def __init__(self, criterion: str, values: Mapping[str, Any], seed: int) -> None:
        self._criterion, self._values, self._seed = criterion, values, seed

    def pick(self, axis: str, layer: int | None, old: int, new: int, *, inside: int | None = None) -> tuple[int, ...]:
        """Return `new` of `old` positions, ascending: of a layer's axis, and of one group inside it."""
        if new == old:
            return tuple(range(old))
        if not 0 < new < old:
            raise PlanError(
                f"cannot prune {axis} from {old} to {new}", hint=f"Ask for 1 to {old}; to grow: surgeon grow."
            )
        if self._criterion == "uniform":
            return uniform(old, new)
        if self._criterion == "random":
            drawn = random.Random(f"{self._seed}/{axis}/{layer}/{inside}")  # noqa: S311  (no secret)
            return tuple(sorted(drawn.sample(range(old), new)))
        found = self._values.get(axis)
        if found is None:
            raise PlanError(
                f"there are no {self._criterion} scores of {axis}", hint="Score the model again, without --scores-from."
            )
        row = found if layer is None else found[layer]
        row = row if inside is None else row[inside]
        ranked = sorted(range(old), key=lambda i: (-row[i], i))
        return tuple(sorted(ranked[:new]))
