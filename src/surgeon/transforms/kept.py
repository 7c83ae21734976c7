"""What a plan keeps of each source layer: its neurons, heads and experts, read off the expressions of the result."""

from collections.abc import Mapping
from dataclasses import dataclass

from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy
from surgeon.anatomy.axes import Axis, Dim, Product
from surgeon.plan.expressions import Expr, Gather, Read
from surgeon.plan.plan import Plan, children

AXES = ("heads", "ffn", "expert_ffn", "experts")


@dataclass(frozen=True, slots=True)
class Remains:
    """What stays of an axis: how many positions each layer of the source had, and by layer those that stay.

    A layer that goes keeps none. A layer without the axis is not in `kept`.
    """

    size: int
    kept: Mapping[int, frozenset[int]]


def remains(anatomy: Anatomy, plan: Plan) -> dict[str, Remains]:
    """Return what stays of each axis that the plan narrows, by the axis; {} where it narrows none.

    `anatomy` is of the source. Heads are query heads; all layers of both stacks are numbered through.
    """
    if anatomy.family is None:
        return {}
    found: dict[str, dict[int, frozenset[int]]] = {}
    narrowed: set[str] = set()
    layers_left: set[int] = set()
    experts: dict[int, set[int]] = {}
    for expr in plan.tensors.values():
        name, positions = gathered(expr)
        place = anatomy.locate(name) if name is not None else None
        if name is None or place is None:
            continue
        layers_left.add(place[0])
        if match := EXPERT_NUMBER.search(name):
            experts.setdefault(place[0], set()).add(int(match[0]))
        for dim, axes in enumerate(anatomy.row(name)[0].axes):
            axis, width = _axis_of(axes, anatomy.sizes)
            if axis not in AXES:
                continue
            size = anatomy.spec.tensors[name].shape[dim] // width
            stay = positions.get(dim)
            found.setdefault(axis, {})[place[0]] = frozenset(
                range(size) if stay is None else (position // width for position in stay)
            )
            narrowed |= {axis} if len(found[axis][place[0]]) < size else set()
    sizes = {axis: anatomy.sizes[axis] for axis in found}
    if experts and any(len(left) < anatomy.sizes["experts"] for left in experts.values()):
        found["experts"] = {layer: frozenset(left) for layer, left in experts.items()}
        sizes["experts"], narrowed = anatomy.sizes["experts"], narrowed | {"experts"}
    gone = set(range(anatomy.num_layers)) - layers_left
    lost = dict.fromkeys(found, gone)
    if plan.mlp_map is not None:  # a layer may have lost its MLP, with its neurons, or its attention, with its heads
        having = {axis: anatomy.layers_by_axis["kv_heads" if axis == "heads" else axis] for axis in found}
        lost = {axis: gone | (having[axis] - found[axis].keys()) for axis in found}
    return {
        axis: Remains(sizes[axis], {**found[axis], **dict.fromkeys(lost[axis], frozenset())})
        for axis in AXES
        if axis in narrowed
    }


def gathered(expr: Expr) -> tuple[str | None, dict[int, tuple[int, ...]]]:
    """Return the one tensor that an expression reads, and the positions that it keeps of each dimension it cuts."""
    if isinstance(expr, Read):
        return expr.name, {}
    parts = children(expr)
    if len(parts) != 1:
        return None, {}
    name, positions = gathered(parts[0])
    if isinstance(expr, Gather):
        before = positions.get(expr.dim)
        taken = tuple(expr.index)
        positions = {**positions, expr.dim: taken if before is None else tuple(before[place] for place in taken)}
    return name, positions


def _axis_of(dim: Dim, sizes: Mapping[str, int]) -> tuple[str, int]:
    """Return the axis whose positions a dimension holds, and how many numbers each of them is; "" for none of AXES."""
    if isinstance(dim, Axis):
        return dim.name, 1
    if isinstance(dim, Product) and [getattr(part, "name", "") for part in dim.factors[:2]] == ["kv_heads", "group"]:
        rest = 1
        for part in dim.factors[2:]:
            rest *= part.size(sizes)
        return "heads", rest
    return "", 1
