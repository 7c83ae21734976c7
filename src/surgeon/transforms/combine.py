"""Make one model of several: each tensor of all of them by one rule, or layers of several in an order.

The first model gives the config, the dtypes and all files beside the weights. Experts of one model are merged
elsewhere, in `transforms/merging.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from surgeon.anatomy.anatomy import Anatomy
from surgeon.errors import PlanError
from surgeon.options import OptionError
from surgeon.plan.expressions import Cast, Expr, Mix
from surgeon.plan.plan import FLOAT_DTYPES, Plan, substitute
from surgeon.plan.rules import KINDS, Rule
from surgeon.transforms.alike import INCIDENTAL, check_alike
from surgeon.transforms.layers import keep_layers
from surgeon.transforms.portions import Portions

APPROXIMATE = "what is made of several models computes something else than each of them; measure it"
MOST_PARENTS = 26  # one for each letter of the slices
_SLICE = re.compile(r"([0-9]{1,6})\s*(?:-\s*([0-9]{1,6}))?")


@dataclass(frozen=True)
class Parent:
    """A model that a merge reads: its name, its anatomy, and the expression of each of its tensors over all sources.

    `identity` is the same wherever the model stands in the list: it orders sums and names random streams.
    """

    label: str
    anatomy: Anatomy
    tensors: Mapping[str, Expr]
    identity: str


@dataclass(frozen=True)
class Shares:
    """The weight of each model for each tensor, and which part of its difference from the base stays."""

    weights: Portions
    densities: Portions


def combine(parents: Sequence[Parent], base: Parent | None, rule: Rule, shares: Shares) -> Plan:
    """Return the plan that makes each tensor of those of the parents, in float32 or wider, rounded once.

    Tensors that hold no floating numbers are the first parent's. The parents stand in the expressions in the order of
    their identities, so that any order of them gives the same bytes. Raises PlanError for models that are not alike.
    """
    first = parents[0]
    for other in (*parents[1:], *(() if base is None else (base,))):
        check_alike((first.label, first.anatomy.spec), (other.label, other.anatomy.spec))
    order = sorted(range(len(parents)), key=lambda number: parents[number].identity)
    tensors: dict[str, Expr] = {}
    for name, spec in first.anatomy.spec.tensors.items():
        if spec.dtype not in FLOAT_DTYPES:
            tensors[name] = first.tensors[name]
            continue
        weights, densities = shares.weights(name), shares.densities(name)
        if rule.normalize and not sum(weights):
            raise OptionError("weights", f"the weights of {name!r} sum to 0", hint="Give at least one above 0.")
        alone = [number for number, weight in enumerate(weights) if weight]
        if rule.name == "linear" and rule.normalize and len(alone) == 1:  # of one model: its bytes
            parent = parents[alone[0]]
            is_same = parent.anatomy.spec.tensors[name].dtype == spec.dtype
            tensors[name] = parent.tensors[name] if is_same else Cast(parent.tensors[name], spec.dtype)
            continue
        tensors[name] = Mix(
            parts=tuple(parents[number].tensors[name] for number in order),
            base=None if base is None else base.tensors[name],
            weights=tuple(weights[number] for number in order),
            rule=rule,
            dtype=spec.dtype,
            densities=tuple(densities[number] for number in order) if KINDS[rule.name].thins else (),
            streams=tuple(f"{name}/{parents[number].identity}" for number in order) if KINDS[rule.name].drops else (),
        )
    config, depth = first.anatomy.spec.config, first.anatomy.depth
    return Plan(config, tensors, tuple(range(depth)), approximate=(APPROXIMATE,))


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers of a parent, one after the other."""

    parent: int
    layers: range


def read_slices(text: str, labels: Sequence[str]) -> tuple[Slice, ...]:
    """Return the slices in "A:0-11,B:8-23", where A is the first model; its name is good too.

    Raises OptionError for anything else.
    """
    found = []
    for word in text.split(","):
        name, _, span = word.strip().rpartition(":")
        letters = {chr(ord("A") + number): number for number in range(min(len(labels), MOST_PARENTS))}
        known = {label: number for number, label in enumerate(labels)} | letters
        ends = _SLICE.fullmatch(span.strip())
        if name not in known or ends is None:
            hint = f"Write --slices A:0-11,B:8-23, with A to {list(letters)[-1]} for the models in their order."
            raise OptionError("slices", f"cannot read {word.strip()!r} as layers of a model", hint=hint)
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise OptionError("slices", f"{word.strip()!r} runs backwards", hint=f"Write {name}:{last}-{first}")
        found.append(Slice(known[name], range(first, last + 1)))
    return tuple(found)


def stack_slices(parents: Sequence[Parent], slices: Sequence[Slice]) -> Plan:
    """Return the plan of a model whose layers are those of the slices, in their order, each copied byte for byte.

    What comes before the layers is that of the first slice's parent; the last norm and a head of its own, the last
    one's. Raises PlanError for layers that do not exist, and for models that are not alike.
    """
    for each in slices:
        parent = parents[each.parent]
        if each.layers[-1] >= parent.anatomy.depth:
            raise PlanError(
                f"{parent.label} has no layer {each.layers[-1]}", hint=f"It has layers 0 to {parent.anatomy.depth - 1}."
            )
    deepest = max(parents, key=lambda parent: parent.anatomy.depth)
    for parent in parents:
        if parent is not deepest:
            as_deep = keep_layers(deepest.anatomy, range(parent.anatomy.depth)).result(deepest.anatomy.spec)
            check_alike((deepest.label, as_deep), (parent.label, parent.anatomy.spec), dtypes=True)
    order = [(each.parent, layer) for each in slices for layer in each.layers]
    plan = keep_layers(deepest.anatomy, [layer for _, layer in order])
    stacks = [replace(stack, depth=len(order)) for stack in deepest.anatomy.stacks]
    tensors: dict[str, Expr] = {}
    for name, expr in plan.tensors.items():
        located = next((place for stack in stacks if (place := stack.locate(name))), None)
        giver = order[located[0]][0] if located else order[-1][0] if _is_behind(deepest.anatomy, name) else order[0][0]
        tensors[name] = substitute(expr, parents[giver].tensors.__getitem__)
    first = parents[0].anatomy.spec.config
    config = dict(plan.config) | {key: value for key, value in first.items() if INCIDENTAL.fullmatch(key)}
    layer_map = tuple(layer if giver == 0 else None for giver, layer in order)
    return Plan(config, tensors, layer_map, notes=plan.notes, approximate=(*plan.approximate, APPROXIMATE))


def _is_behind(anatomy: Anatomy, name: str) -> bool:
    """Return whether a tensor outside of the layers is used behind them: the last norm, or a head."""
    if anatomy.family is None or name not in anatomy.spec.tensors:
        return False
    row, part = anatomy.row(name)
    return row.kind == "head" or part == "norm"
