"""Choose which layers go, from scores: pure, so that the same scores can be cut again for another number."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from surgeon import text
from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy
from surgeon.anatomy.axes import Index, axes_of
from surgeon.anatomy.families import Row
from surgeon.anatomy.halves import ATTENTION, MLP, Half, Pairing
from surgeon.errors import PlanError
from surgeon.transforms.narrow import Kept, layers_with
from surgeon.transforms.scores import METHODS, WIDTHS
from surgeon.transforms.uniform import uniform, uniform_head_dim

_NAMES: dict[Half, str] = {ATTENTION: "attention", MLP: "MLP"}


@dataclass(frozen=True)
class Choice:
    """The layers that go with the score of that choice, and the next best choice with its score.

    Scores are None where the method measures nothing. The lower, the less a choice is thought to change. `pairing` is
    None where whole layers go; else it has the halves that stay, and `dropped` are the layers of which neither does.
    """

    dropped: tuple[int, ...]
    score: float | None = None
    next_best: tuple[int, ...] | None = None
    next_score: float | None = None
    pairing: Pairing | None = None

    @property
    def dropped_halves(self) -> dict[Half, tuple[int, ...]]:
        """The layers of which only the attention goes, and those of which only the MLP goes; {} where whole ones go."""
        if self.pairing is None:
            return {}
        attention, mlp = set(self.pairing.attention), set(self.pairing.mlp)
        return {ATTENTION: tuple(sorted(mlp - attention)), MLP: tuple(sorted(attention - mlp))}

    @property
    def words(self) -> str:
        """What goes: "layers 3-5, attention of 8, MLP of 7"."""
        parts = [("layers", self.dropped)]
        parts += [(f"{_NAMES[half]} of", layers) for half, layers in self.dropped_halves.items()]
        return ", ".join(f"{name} {text.layers(layers)}" for name, layers in parts if layers)


def choose_layers(
    name: str,
    count: int,
    depth: int,
    *,
    values: Sequence[Any] | None = None,
    contiguous: bool | None = None,
    protect: tuple[int, int] | None = None,
    seed: int = 0,
    period: int = 1,
) -> Choice:
    """Return which `count` of `depth` layers go by the score `name`, a row of the table METHODS.

    `values` are its scores: a number per layer, or the matrix of a method that has one. `contiguous` and `protect` (how
    many first and last layers stay) override the choice of the method's authors. Where the kinds of layers repeat after
    `period` layers, every layer that stays keeps its place in the period: whole periods go, or layers at the end.

    Raises PlanError when so many layers cannot go.
    """
    if name not in METHODS:
        raise PlanError(f"unknown score {name!r}", hint=f"One of: {', '.join(METHODS)}.")
    method = METHODS[name]
    free = free_layers(count, depth, method.protect if protect is None else protect)
    block = method.block if contiguous is None else contiguous
    if count == 0:
        return Choice(())
    if method.chosen == "random" and period == 1:
        return _drawn(count, free, seed, block=block)
    if method.chosen == "random":
        drawn = random.Random(seed)  # noqa: S311  (no secret)
        values = [drawn.random() for _ in range(depth)]
    if method.chosen == "deepest":
        return _deepest(count, free, depth, period)
    assert values is not None, f"{name} has values"
    if block:
        return _best_block(name, values, count, free, depth, period)
    return _lowest(name, values, count, free) if period == 1 else _lowest_periods(name, values, count, free, period)


def choose_in_order(order: Sequence[int], count: int, depth: int, *, protect: tuple[int, int]) -> Choice:
    """Return the first `count` layers of the order of a greedy removal. Raises PlanError where it is shorter."""
    free_layers(count, depth, protect)
    if count > len(order):
        raise PlanError(
            f"the greedy order goes {len(order)} layers deep, not {count}", hint="Score again: leave out --scores-from."
        )
    return Choice(tuple(sorted(order[:count])))


def free_layers(count: int, depth: int, protect: tuple[int, int]) -> range:
    """Return the layers that are not protected. Raises PlanError where `count` of them cannot go."""
    first, last = protect
    free = range(first, depth - last)
    if count and (not 0 < count <= len(free) or count == depth):
        raise PlanError(
            f"cannot remove {count} of {depth} layers when the first {first} and the last {last} stay",
            hint="Ask for more layers, or protect fewer: --protect 0,0.",
        )
    return free


def _drawn(count: int, free: range, seed: int, *, block: bool) -> Choice:
    drawn = random.Random(seed)  # noqa: S311  (no secret)
    start = drawn.choice(range(free.start, free.stop - count + 1))
    return Choice(tuple(range(start, start + count)) if block else tuple(sorted(drawn.sample(free, count))))


def _deepest(count: int, free: range, depth: int, period: int) -> Choice:
    if count % period and free.stop < depth:
        raise _broken(count, period)
    return Choice(tuple(free[-count:]))


def _broken(count: int, period: int) -> PlanError:
    """Return the error for a number of layers that cannot go without breaking the pattern of layers."""
    whole = count // period * period
    more = f" or {whole + period}" if whole else f" {whole + period}"
    layers = "1 layer" if count == 1 else f"{count} layers"
    return PlanError(
        f"{layers} cannot go here: the kinds of layers repeat after {period}, and whole periods go",
        hint=f"Remove{f' {whole}' if whole else ''}{more} layers, or leave out --keep-pattern.",
    )


def _best_block(name: str, values: Sequence[Any], count: int, free: range, depth: int, period: int) -> Choice:
    starts: Sequence[int] = range(free.start, free.stop - count + 1)
    if count % period:  # layers behind the block would move by no whole period; behind the last layer there are none
        starts = [start for start in starts if start + count == depth]
    if not starts:
        raise _broken(count, period)

    def cost(start: int) -> float:
        if METHODS[name].matrix:
            return float(values[start][start + count])
        return math.fsum(values[start : start + count])

    _check_numbers(name, [cost(start) for start in starts])
    ranked = sorted(starts, key=lambda start: (cost(start), start))
    best = ranked[0]
    following = ranked[1] if len(ranked) > 1 else None
    return Choice(
        tuple(range(best, best + count)),
        cost(best),
        None if following is None else tuple(range(following, following + count)),
        None if following is None else cost(following),
    )


def _lowest(name: str, values: Sequence[Any], count: int, free: range) -> Choice:
    single = [float(row[layer + 1]) if METHODS[name].matrix else float(row) for layer, row in enumerate(values)]
    _check_numbers(name, single)
    ranked = sorted(free, key=lambda layer: (single[layer], layer))
    best = tuple(sorted(ranked[:count]))
    total = math.fsum(single[layer] for layer in best)
    if len(ranked) == count:
        return Choice(best, total)
    following = tuple(sorted([*ranked[: count - 1], ranked[count]]))
    return Choice(best, total, following, math.fsum(single[layer] for layer in following))


def _lowest_periods(name: str, values: Sequence[Any], count: int, free: range, period: int) -> Choice:
    """Return the cheapest layers without which every other layer keeps its place in the period.

    A layer may stay only where the number of layers that went before it is a multiple of the period. So the cheapest
    choice is the cheapest way through a table: layers × layers that went so far.
    """
    single = [float(row[layer + 1]) if METHODS[name].matrix else float(row) for layer, row in enumerate(values)]
    _check_numbers(name, single)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # layers that went so far: their cost, and which
    for layer, cost in enumerate(single):
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for went, (total, dropped) in best.items():
            if went % period == 0:
                after[went] = min(after.get(went, (total, dropped)), (total, dropped))
            if layer in free and went < count:
                further = (total + cost, (*dropped, layer))
                after[went + 1] = min(after.get(went + 1, further), further)
        best = after
    if count not in best:
        raise _broken(count, period)
    total, dropped = best[count]
    return Choice(dropped, total)


def _check_numbers(name: str, costs: Sequence[float]) -> None:
    """Raises PlanError for scores that are NaN: they have no order."""
    if any(map(math.isnan, costs)):
        raise PlanError(
            f"the scores {name!r} are not all numbers (NaN): the model overflows on this text",
            hint="Score in float32, or on other data.",
        )


def choose_widths(
    anatomy: Anatomy,
    sizes: Mapping[str, int],
    criterion: str,
    *,
    values: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    mlps: Sequence[int] | None = None,
    seed: int = 0,
) -> Kept:
    """Return the positions to keep of each axis when `anatomy` shrinks to `sizes`; an axis of unchanged size is whole.

    `criterion` is a name of the table WIDTHS. `values` holds the importance of positions, by axis: "hidden" (D,), and
    for each layer of the scored model "ffn", "heads" (kv_heads, group), "kv_heads" and "experts". `layers` are the
    layers of the scored model that this one has, numbered through all stacks, and `mlps` those of its MLPs where they
    are others.

    Raises PlanError when an axis has no scores, or cannot have that size.
    """
    check_criterion(anatomy, sizes, criterion)
    picker = _Picker(criterion, values or {}, seed)
    numbers = range(anatomy.num_layers) if layers is None else layers
    mlp_numbers = numbers if mlps is None else mlps
    old = anatomy.sizes
    options: dict[str, Any] = {}
    if sizes["hidden"] != old["hidden"]:
        options["hidden"] = picker.pick("hidden", None, old["hidden"], sizes["hidden"])
    for axis in ("ffn", "expert_ffn", "experts"):
        if axis in old and sizes.get(axis, old[axis]) != old[axis]:
            having = layers_with(anatomy, axis)
            pick = partial(picker.pick_in_groups, anatomy.expert_groups) if axis == "experts" else picker.pick
            options[axis] = {
                new: pick(axis, layer, old[axis], sizes[axis]) for new, layer in enumerate(mlp_numbers) if new in having
            }
    kv_heads, group = sizes["kv_heads"], sizes["heads"] // sizes["kv_heads"]
    of_heads = _Picker(criterion, _pooled(anatomy, numbers, values), seed) if anatomy.shares_heads else picker
    sources = [new // anatomy.depth if anatomy.shares_heads else layer for new, layer in enumerate(numbers)]
    having = layers_with(anatomy, "kv_heads")
    kept_kv = {
        new: of_heads.pick("kv_heads", layer, old["kv_heads"], kv_heads)
        for new, layer in enumerate(sources)
        if new in having
    }
    if kv_heads != old["kv_heads"]:
        options["kv_heads"] = kept_kv
    if group != old["group"]:
        if group > old["group"]:
            raise PlanError(
                f"{sizes['heads']} heads on {kv_heads} key-value heads are {group} a group, more than {old['group']}",
                hint="Cut key-value heads and heads in one proportion, or only heads.",
            )
        options["heads"] = {
            new: tuple(of_heads.pick("heads", layer, old["group"], group, inside=kv) for kv in kept_kv[new])
            for new, layer in enumerate(sources)
            if new in having
        }
    if sizes["head_dim"] != old["head_dim"]:
        options["head_dim"] = uniform_head_dim(anatomy, sizes["head_dim"])
    return Kept(**options)


def _pooled(anatomy: Anatomy, numbers: Sequence[int], values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the scores of heads, summed over the layers of each stack: one entry a stack."""
    stacks = [numbers[first : first + anatomy.depth] for first in range(0, anatomy.num_layers, anatomy.depth)]
    scores = {axis: rows for axis, rows in (values or {}).items() if axis in ("heads", "kv_heads")}
    return {axis: [_summed([rows[layer] for layer in stack]) for stack in stacks] for axis, rows in scores.items()}


def _summed(rows: Sequence[Any]) -> Any:
    """Return the elementwise sum of nested lists of numbers."""
    first = rows[0]
    return [_summed(parts) for parts in zip(*rows, strict=True)] if isinstance(first, list) else math.fsum(rows)


def check_criterion(anatomy: Anatomy, sizes: Mapping[str, int], criterion: str) -> None:
    """Raises PlanError where a criterion has no scores for an axis that shrinks: known before scoring starts."""
    old = anatomy.sizes
    if sizes["head_dim"] != old["head_dim"] and criterion != "uniform":
        raise PlanError(
            f"heads keep their size of {old['head_dim']}: its dims turn in pairs",
            hint="--score uniform takes every n-th pair.",
        )
    shrinking = {axis for axis in ("ffn", "expert_ffn") if axis in old and sizes.get(axis, old[axis]) != old[axis]}
    rows = {id(row): row for name, (row, _) in anatomy.rows.items() if _is_of_expert(name, row)}
    inside = {axis for row in rows.values() for dim in row.axes for axis in axes_of(dim)}
    if WIDTHS[criterion].input == "text" and shrinking & inside:
        raise PlanError(
            f"the neurons of experts are not ranked by {criterion}",
            hint="Keep fewer experts: --experts; or --width-score magnitude.",
        )


def _is_of_expert(name: str, row: Row) -> bool:
    """Return whether a tensor is an expert's own, or that of all experts together."""
    return bool(EXPERT_NUMBER.search(name)) or (len(row.axes) > 2 and axes_of(row.axes[0]) == {"experts"})


class _Picker:
    """Picks positions by one criterion."""

    def __init__(self, criterion: str, values: Mapping[str, Any], seed: int) -> None:
        self._criterion, self._values, self._seed = criterion, values, seed

    def pick(self, axis: str, layer: int | None, old: int, new: int, *, inside: int | None = None) -> Index:
        """Return `new` of `old` positions, ascending: of a layer's axis, and of one group inside it."""
        if new == old:
            return Index.up_to(old)
        if not 0 < new < old:
            raise PlanError(
                f"cannot prune {axis} from {old} to {new}", hint=f"Ask for 1 to {old}; to grow: surgeon grow."
            )
        if self._criterion == "uniform":
            return Index.of(uniform(old, new))
        if self._criterion == "random":
            drawn = random.Random(f"{self._seed}/{axis}/{layer}/{inside}")  # noqa: S311  (no secret)
            return Index.of(sorted(drawn.sample(range(old), new)))
        row = self._scores(axis, layer)
        row = row if inside is None else row[inside]
        ranked = sorted(range(old), key=lambda i: (-row[i], i))
        return Index.of(sorted(ranked[:new]))

    def pick_in_groups(self, groups: int, axis: str, layer: int, old: int, new: int) -> Index:
        """Return `new` of `old` positions, ascending, as many of each of so many groups, which lie end to end."""
        if groups == 1:
            return self.pick(axis, layer, old, new)
        if new % groups:
            raise PlanError(
                f"{axis} compete in {groups} groups, each of which keeps as many: {new} is no multiple",
                hint=f"Near: --{axis} {max(2, new // groups) * groups}.",
            )
        size, ranked = old // groups, self._criterion not in ("uniform", "random")
        row = self._scores(axis, layer) if ranked else [0.0] * old
        kept: list[int] = []
        for group in range(groups):
            own = {axis: {layer: row[group * size : (group + 1) * size]}}
            picker = _Picker(self._criterion, own, self._seed + group)
            kept += [group * size + i for i in picker.pick(axis, layer, size, new // groups)]
        return Index.of(kept)

    def _scores(self, axis: str, layer: int | None) -> Any:
        """Return the scores of an axis, of a layer where it has one. Raises PlanError where there are none."""
        scores = self._values.get(axis)
        if scores is None:
            raise PlanError(
                f"there are no {self._criterion} scores of {axis}", hint="Score the model again, without --scores-from."
            )
        return scores if layer is None else scores[layer]
