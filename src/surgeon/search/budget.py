"""Budgets, what a cut costs of them, and the widths that can meet one. All from headers, but for measured times."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

from surgeon import text
from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy
from surgeon.anatomy.config import spelled
from surgeon.anatomy.halves import Pairing
from surgeon.errors import PlanError
from surgeon.plan.plan import Plan
from surgeon.search.cuts import Candidate, Space, Widths, kept_halves
from surgeon.transforms.choose import check_criterion
from surgeon.transforms.prune import prune, pruned_sizes
from surgeon.transforms.scores import CONTRIBUTION
from surgeon.transforms.seams import find_sites

# What --over names, and the axes of each.
OVER: Mapping[str, tuple[str, ...]] = {
    "layers": (),
    "halves": (),
    "hidden-size": ("hidden",),
    "intermediate-size": ("ffn", "expert_ffn"),
    "heads": ("heads", "kv_heads"),
    "experts": ("experts",),
}
STEPS = (128, 64, 32, 16, 8, 4, 2, 1)  # a width is a multiple of the first of these that gives it enough values
VALUES = 8  # of a width, its own size included
BOUND = ("hidden", "heads", "kv_heads")  # sizes that a family's code may derive from one another
LEAST = 0.5  # of its own size that a width keeps
FILLING = ("ffn", "expert_ffn")  # the axes whose sizes may be any multiple of a fine step
FINE = 32  # neurons: the smallest group of the usual quantisers


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs: parameters, bytes of weights, of its cache at the context asked for, milliseconds a token.

    The last two are None where no budget asks for them.
    """

    parameters: int
    nbytes: int
    cache: int | None = None
    milliseconds: float | None = None

    @property
    def memory(self) -> int:
        """Bytes of weights and of the cache."""
        return self.nbytes + (self.cache or 0)

    def to_dict(self) -> dict[str, Any]:
        """Return this as search.json holds it."""
        return {"parameters": self.parameters, "bytes": self.nbytes} | {
            name: value
            for name, value in (("cache_bytes", self.cache), ("milliseconds", self.milliseconds))
            if value is not None
        }


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a result may cost; None: no such limit. `layers` is a depth that it must have, and no budget."""

    parameters: int | None = None
    memory: int | None = None
    milliseconds: float | None = None
    layers: int | None = None

    def allows(self, cost: Cost) -> bool:
        """Return whether a result of this cost is within the budget."""
        return self.share(cost) <= 1.0

    def share(self, cost: Cost) -> float:
        """Return the part of the budget that a cost takes: of several limits the largest part."""
        limits = (
            (cost.parameters, self.parameters),
            (cost.memory, self.memory),
            (cost.milliseconds, self.milliseconds),
        )
        return max((value / limit for value, limit in limits if limit is not None and value is not None), default=0.0)

    def eased(self, whole: Cost, depth: int, share: float) -> "Budget":
        """Return the budget that asks for only this share of what the whole model has to lose."""

        def between(value: float | None, limit: float | None) -> float | None:
            return limit if value is None or limit is None or value <= limit else value - share * (value - limit)

        parameters, memory = between(whole.parameters, self.parameters), between(whole.memory, self.memory)
        return Budget(
            parameters=None if parameters is None else round(parameters),
            memory=None if memory is None else round(memory),
            milliseconds=between(whole.milliseconds, self.milliseconds),
            layers=None if self.layers is None else depth - round(share * (depth - self.layers)),
        )

    def told(self, cost: Cost) -> str:
        """Return in words what a cost is of the quantities that the budget limits."""
        parts = [f"{cost.parameters:,} parameters"] if self.parameters is not None else []
        parts += [text.size(cost.memory)] if self.memory is not None else []
        parts += [f"{cost.milliseconds:.3g} ms a token"] if self.milliseconds is not None else []
        return ", ".join(parts) or f"{cost.parameters:,} parameters"


class Meter(Protocol):
    """What headers do not say of a cut: the bytes of its cache, and its milliseconds a token."""

    def cache(self, sizes: Mapping[str, int] | None, pairing: Pairing) -> int | None:
        """Return the bytes of the cache at the context asked for; None where none was."""

    def milliseconds(self, sizes: Mapping[str, int] | None, pairing: Pairing) -> float | None:
        """Return the time of a token; None where no budget asks for it."""


class Pricing:
    """The exact cost of cuts of one model, by their plans; and in bulk, to tell which widths and depths to plan.

    Where it `repairs`, a cut without an output map in front of what is missing cannot be.
    """

    def __init__(self, anatomy: Anatomy, budget: Budget, meter: Meter | None = None, *, repairs: bool = False) -> None:
        self.anatomy, self.budget, self._meter, self._repairs = anatomy, budget, meter, repairs
        self._known: dict[Candidate, Cost] = {}
        self._bulks: dict[Widths, _Bulk] = {}

    def eased(self, share: float) -> "Pricing":
        """Return the same prices for a budget that asks for only a share of what the model has to lose."""
        eased = Pricing(self.anatomy, self.budget, self._meter, repairs=self._repairs)
        eased._known, eased._bulks = self._known, self._bulks
        eased.budget = self.budget.eased(self.cost(Candidate(())), self.anatomy.depth, share)
        return eased

    def meets(self, candidate: Candidate) -> bool:
        """Return whether a cut that can be expressed is within the budget, and of the depth that it asks for."""
        layers = self.budget.layers
        is_deep = layers is None or self.anatomy.depth - len(candidate.pieces) == layers
        return is_deep and self.budget.allows(self.cost(candidate))

    def sizes(self, widths: Widths) -> dict[str, int] | None:
        """Return the size of every axis of a result; None where no width changes."""
        return full_sizes(self.anatomy, widths)

    def cost(self, candidate: Candidate) -> Cost:
        """Return the cost of a cut: its plan's result, to the byte. Raises PlanError for one that cannot be."""
        if candidate not in self._known:
            pairing, sizes = pairing_of(self.anatomy, candidate), self.sizes(candidate.widths)
            plan = planned_cut(self.anatomy, pairing, sizes)
            spec = plan.result(self.anatomy.spec)
            if self._repairs and candidate.features:
                find_sites(self.anatomy, plan)
            cache = milliseconds = None
            if self._meter is not None:
                cache, milliseconds = self._meter.cache(sizes, pairing), self._meter.milliseconds(sizes, pairing)
            self._known[candidate] = Cost(spec.num_parameters, spec.nbytes, cache, milliseconds)
        return self._known[candidate]

    def can_be(self, candidate: Candidate) -> bool:
        """Return whether the family's code can express a cut, and it is within the budget."""
        return self.can_express(candidate) and self.meets(candidate)

    def can_express(self, candidate: Candidate) -> bool:
        """Return whether the family's code can express a cut."""
        try:
            self.cost(candidate)
        except PlanError:
            return False
        return True

    def fewest(self, widths: Widths, space: Space) -> int | None:
        """Return the fewest pieces whose removal meets the budget with these widths; None where none does."""
        depth = self.anatomy.depth
        if self.budget.layers is not None:
            return depth - self.budget.layers
        low, high = 0, space.most
        if not self.budget.allows(self._least(widths, space, high)):
            return None
        while low < high:
            middle = (low + high) // 2
            if self.budget.allows(self._least(widths, space, middle)):
                high = middle
            else:
                low = middle + 1
        return low

    def filled(self, widths: Widths, space: Space, count: int) -> Widths:
        """Return widths with the most neurons that meet the budget whichever `count` pieces go.

        Sizes of the other axes stay, and so do all where time is limited: each size would have to be timed.
        """
        own, sizes = dict(widths), self.anatomy.sizes
        if self.budget.milliseconds is not None or (self.budget.parameters, self.budget.memory) == (None, None):
            return widths
        for axis in FILLING:
            if axis not in own:
                continue
            step = math.gcd(FINE, own[axis])
            low, high = 0, (sizes[axis] - 1 - own[axis]) // step
            while low < high:
                middle = (low + high + 1) // 2
                wider = tuple({**own, axis: own[axis] + middle * step}.items())
                if self.budget.allows(self._least(wider, space, count, largest=False)):
                    low = middle
                else:
                    high = middle - 1
            while low and not _is_legal(self.anatomy, ((axis, own[axis] + low * step),)):
                low -= 1
            own[axis] += low * step
        return tuple(own.items())

    def _least(self, widths: Widths, space: Space, count: int, *, largest: bool = True) -> Cost:
        """Return the cost with `count` pieces gone that do not overlap: the largest, or the smallest."""
        bulk = self._bulk(widths)
        chosen: set[int] = set()
        sign = -1 if largest else 1
        for piece in sorted(space.layers or space.free, key=lambda piece: (sign * bulk.layers[piece // 2][0], piece)):
            if len(chosen) < count and not chosen & {piece - 1, piece + 1}:
                chosen.add(piece)
        gone = [bulk.layers[piece // 2] for piece in chosen]
        parameters, nbytes = (bulk.whole[i] - sum(layer[i] for layer in gone) for i in (0, 1))
        cache = milliseconds = None
        if self._meter is not None:
            pairing, sizes = pairing_of(self.anatomy, Candidate(tuple(sorted(chosen)))), self.sizes(widths)
            cache, milliseconds = self._meter.cache(sizes, pairing), self._meter.milliseconds(sizes, pairing)
        return Cost(parameters, nbytes, cache, milliseconds)

    def _bulk(self, widths: Widths) -> "_Bulk":
        if widths not in self._bulks:
            self._bulks[widths] = _Bulk(self.anatomy, self.sizes(widths))
        return self._bulks[widths]

    def check(self, space: Space, options: Sequence[Widths]) -> None:
        """Raises PlanError, with the smallest result there can be, where no cut meets the budget."""
        best: tuple[float, Cost, Widths] | None = None
        for widths in options:
            cost = self._least(widths, space, space.most)
            share = self.budget.share(cost)
            if share <= 1.0:
                return
            if best is None or share < best[0]:
                best = (share, cost, widths)
        assert best is not None, "no width changed is an option"
        _, cost, widths = best
        also = "" if not widths else " and " + ", ".join(f"{axis} {size}" for axis, size in widths)
        raise PlanError(
            f"the smallest result that can be searched has {self.budget.told(cost)} ({self.anatomy.depth - space.most} "
            f"layers{also}), more than the target",
            hint="Ask for more, or let more change: --over.",
        )


class _Bulk:
    """The parameters and bytes of a model of some sizes, and of each of its layers, out of the table of its axes.

    It only says which of many widths and depths are worth a plan; the plan of a cut says what the cut costs.
    """

    def __init__(self, anatomy: Anatomy, sizes: Mapping[str, int] | None) -> None:
        old, new = anatomy.sizes, None if sizes is None else _with_derived(anatomy, sizes)
        layers, whole = [(0.0, 0.0)] * anatomy.depth, (0.0, 0.0)
        known: dict[tuple[int, tuple[int, ...]], float] = {}
        for name, tensor in anatomy.spec.tensors.items():
            factor = 1.0
            if new is not None:
                key = (id(anatomy.row(name)[0]), tensor.shape)
                if key not in known:
                    known[key] = math.prod(anatomy.shape_of(name, new)) / max(1, math.prod(tensor.shape))
                    if EXPERT_NUMBER.search(name):  # as many fewer such tensors
                        known[key] *= new["experts"] / old["experts"]
                factor = known[key]
            cost = (tensor.num_parameters * factor, tensor.nbytes * factor)
            whole = (whole[0] + cost[0], whole[1] + cost[1])
            if (place := anatomy.locate(name)) is not None:
                layer = place[0] % anatomy.depth
                layers[layer] = (layers[layer][0] + cost[0], layers[layer][1] + cost[1])
        self.whole = (round(whole[0]), round(whole[1]))
        self.layers = [(round(parameters), round(nbytes)) for parameters, nbytes in layers]


def _with_derived(anatomy: Anatomy, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the size of every axis in the table, those too that follow others."""
    old = anatomy.sizes
    new = {**old, **sizes, "group": sizes["heads"] // sizes["kv_heads"]}
    if old.get("embed") == old["hidden"]:
        new["embed"] = sizes["hidden"]
    if "projected" in old:
        new["projected"] = sizes["hidden"]
    return new


def pairing_of(anatomy: Anatomy, candidate: Candidate) -> Pairing:
    """Return the halves that stay in a cut."""
    return Pairing(*kept_halves(candidate.pieces, anatomy.depth))


def planned_cut(
    anatomy: Anatomy,
    pairing: Pairing,
    sizes: Mapping[str, int] | None,
    *,
    criterion: str = "uniform",
    values: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Plan:
    """Return the plan of a cut: the halves that stay, narrowed. Raises PlanError where it cannot be expressed."""
    return prune(anatomy, pairing=pairing, sizes=sizes, criterion=criterion, values=values, seed=seed)


# --- widths -----------------------------------------------------------------------------------------------------


def full_sizes(anatomy: Anatomy, widths: Widths) -> dict[str, int] | None:
    """Return the size of every axis where some have changed; None where none has. Raises PlanError."""
    if not widths:
        return None
    asked: dict[str, int | None] = dict.fromkeys(("hidden", "ffn", "expert_ffn", "heads", "kv_heads", "experts"))
    return pruned_sizes(anatomy, {**asked, **dict(widths)})


def width_options(anatomy: Anatomy, over: Sequence[str]) -> tuple[Widths, ...]:
    """Return all widths that a search may give the result: none changed first, then every legal set of sizes.

    Each axis has about eight values, down to half of its size, multiples of what GPUs and quantisers like; heads go in
    whole groups; a family's own rules leave out the sets that it cannot have.
    """
    if not any(OVER[name] for name in over) or anatomy.family is None:
        return ((),)
    axes = {axis: values for axis, values in _values(anatomy, over).items() if len(values) > 1}
    legal: dict[Widths, bool] = {(): True}
    found: list[Widths] = []
    for chosen in product(*axes.values()):
        widths = tuple((axis, size) for axis, size in zip(axes, chosen, strict=True) if size != anatomy.sizes[axis])
        bound = tuple(item for item in widths if item[0] in BOUND)  # the others are legal whatever goes with them
        if bound not in legal:
            legal[bound] = _is_legal(anatomy, bound)
        if legal[bound]:
            found.append(widths)
    return tuple(found)


def _values(anatomy: Anatomy, over: Sequence[str]) -> dict[str, list[int]]:
    """Return the sizes of each axis that may change, the largest first."""
    sizes, frozen = anatomy.sizes, anatomy.frozen
    found: dict[str, list[int]] = {}
    for name in over:
        for axis in OVER[name]:
            if axis in sizes and axis not in frozen and (axis in anatomy.layers_by_axis or axis in ("hidden", "heads")):
                found[axis] = []
    if "kv_heads" in found and sizes["kv_heads"] > 1:
        found.pop("heads", None)  # they follow, whole groups at a time
    else:
        found.pop("kv_heads", None)
    for axis in found:
        found[axis] = _multiples(anatomy, axis)
    return found


def _multiples(anatomy: Anatomy, axis: str) -> list[int]:
    """Return about eight legal sizes of one axis, from its own down to half of it."""
    old = anatomy.sizes[axis]
    least = max(1, math.ceil(LEAST * old))
    if axis == "experts":
        per_token = [
            value for value in spelled(anatomy.spec.config, "experts_per_token").values() if type(value) is int
        ]
        least = max(least, *per_token, 1)
    if axis in ("heads", "kv_heads", "experts"):
        step = anatomy.expert_groups if axis == "experts" else 1
        fine = range(old - step, least - 1, -step)
    else:
        fine = range(0)
        for step in STEPS:
            fine = range((old - 1) // step * step, least - 1, -step)
            legal = [size for size in fine if _is_legal(anatomy, ((axis, size),))]
            if len(legal) >= 3 or step == STEPS[-1]:
                fine = legal  # type: ignore[assignment]
                break
    values = list(fine)
    most = VALUES - 1
    if len(values) > most:
        values = [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
    return [old, *values]


def _is_legal(anatomy: Anatomy, widths: Widths) -> bool:
    """Return whether the family can have these sizes."""
    try:
        sizes = full_sizes(anatomy, widths)
        if sizes is not None:
            check_criterion(anatomy, sizes, CONTRIBUTION)
        prune(anatomy, sizes=sizes, criterion="uniform")
    except PlanError:
        return False
    return True
