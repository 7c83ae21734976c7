"""Make a model narrower: each tensor keeps some positions of each of its axes.

Kept weights do not change, bit for bit; only norms are adjusted, because they average over fewer positions. A norm
divides by the root of a mean square. So its gain is multiplied by sqrt(old / new), and for fewer channels the config's
epsilon by old / new. The cut is then exact where the removed positions held zero; for layer norms, which subtract a
mean, where they held the mean and had no shift. Where the removed positions were like the kept ones, the sums of the
next map keep their variance.

One epsilon serves all norms of a model. Norms over heads get another one when channels go, and the old one when heads
go. That changes the last digits, or more where queries are as small as the root of epsilon.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy
from surgeon.anatomy.axes import Dim, Index, Keep, Scale, axes_of, survivors
from surgeon.anatomy.config import is_off, spelled
from surgeon.anatomy.families import Row, written_and_read
from surgeon.anatomy.rotary import rotary_dims
from surgeon.anatomy.spellings import SPELLINGS
from surgeon.errors import PlanError
from surgeon.plan.expressions import Affine, Expr, Gather, Read
from surgeon.plan.plan import Plan
from surgeon.transforms.experts import UNEVEN
from surgeon.transforms.uniform import check_head_dim
from surgeon.transforms.widths import (
    SQUARE,
    check_shape,
    has_tied_head,
    is_final_norm,
    is_scaled,
    resized,
    scales_embedding,
    scales_head,
)

NORMS = "norms over fewer positions are scaled as if the removed had held {}"
HEAD_DIM = "attention logits are divided by the root of the head's size, which is smaller now"
SHARES = "the weights of a token's experts are shares among all experts, which are fewer now"
UNGROUPED = "maps have {} inputs now, which groups of {} do not divide: surgeon quantize --bits 4 would take {}"

HEAD_DIMS = ("q_dim", "k_dim", "v_dim")
WORDS = {
    "ffn": "MLP neurons",
    "expert_ffn": "neurons of experts",
    "kv_heads": "key-value heads",
    "group": "heads",
    "experts": "experts",
}

Positions = Sequence[int]  # a tuple, or an Index where they may be many
# From a layer (None: outside of all) and a dimension to its remaining positions, and a factor for each: 1.
_Cut = Callable[[int | None, Dim], tuple[Index, Scale]]


@dataclass(frozen=True)
class Kept:
    """The positions of each axis that stay, in the source's numbering, ascending. An axis that is None stays whole.

    All experts of a layer keep the neurons in `expert_ffn`, or those in `ffn` where experts have the MLP's size; so
    does each of those that every token takes. `heads` lists, for each key-value head that stays, the query heads that
    stay of those that share it (0 to group - 1). All layers keep the same number; `hidden` and `head_dim` are the same
    everywhere.
    """

    hidden: Positions | None = None
    ffn: Mapping[int, Positions] | None = None
    expert_ffn: Mapping[int, Positions] | None = None
    heads: Mapping[int, tuple[Positions, ...]] | None = None
    kv_heads: Mapping[int, Positions] | None = None
    experts: Mapping[int, Positions] | None = None
    head_dim: Positions | None = None


def narrow(anatomy: Anatomy, kept: Kept) -> Plan:
    """Return the plan of the model that has only the `kept` positions.

    Raises PlanError where `kept` does not fit this model, or the family's code cannot express the result.
    """
    anatomy.require_family(partial=True)
    _check(anatomy, kept)
    sizes = _sizes(anatomy, kept)
    check_shape(anatomy, {axis: sizes[axis] for axis in (*SQUARE, "ffn", "expert_ffn", "experts") if axis in sizes})
    _check_projections(anatomy, sizes)
    cut, read = _cuts(anatomy, kept), _read_factor(anatomy, sizes)
    numbers = {layer: {old: new for new, old in enumerate(left)} for layer, left in (kept.experts or {}).items()}
    tensors: dict[str, Expr] = {}
    for name in anatomy.spec.tensors:
        new_name = _renamed(anatomy, numbers, name)
        if new_name is not None:
            tensors[new_name] = _narrowed(anatomy, name, sizes, cut, read=read)
    shown = ("hidden", "ffn", "expert_ffn", "heads", "kv_heads", "head_dim", "experts")
    return Plan(
        config=resized(anatomy, sizes, _epsilon(anatomy, sizes)),
        tensors=tensors,
        layer_map=tuple(range(anatomy.depth)),
        steps=({"narrow": {axis: sizes[axis] for axis in shown if sizes.get(axis) != anatomy.sizes.get(axis)}},),
        notes=_notes(anatomy, sizes),
        approximate=_reasons(anatomy, sizes),
        # Axes of which layers keep different positions have no one map.
        axes={axis: Index.of(positions) for axis, positions in _shared(anatomy, kept).items()},
    )


def _epsilon(anatomy: Anatomy, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the config's epsilon for norms over fewer channels, whose mean square is old / new times the old one."""
    ratio = anatomy.sizes["hidden"] / sizes["hidden"]
    epsilons = spelled(anatomy.spec.config, "epsilon") if ratio != 1 else {}
    return {key: value * ratio for key, value in epsilons.items() if isinstance(value, float)}


def layers_with(anatomy: Anatomy, axis: str) -> frozenset[int]:
    """Return the layers that have an axis: where some have experts, only the others have "ffn"."""
    return anatomy.layers_by_axis.get(axis, frozenset())


def _sizes(anatomy: Anatomy, kept: Kept) -> dict[str, int]:
    """Return the size of every axis of the result."""
    sizes = dict(anatomy.sizes)
    for axis, chosen in _by_layer(kept).items():
        first = next(iter(chosen.values()))
        sizes[axis] = len(first[0]) if axis == "group" else len(first)
    sizes["heads"] = sizes["kv_heads"] * sizes["group"]
    sizes |= {axis: len(positions) for axis, positions in _shared(anatomy, kept).items()}
    if kept.head_dim is not None:
        sizes["head_dim"] = len(kept.head_dim)
        if "rotary" in sizes:
            sizes["rotary"] = rotary_dims(anatomy, sizes["head_dim"])
    return sizes


def _shared(anatomy: Anatomy, kept: Kept) -> dict[str, Positions]:
    """Return the kept positions of the axes that are the same in all layers."""
    shared = dict.fromkeys(HEAD_DIMS, kept.head_dim) | {"hidden": kept.hidden}
    if anatomy.sizes.get("embed") == anatomy.sizes["hidden"]:
        shared["embed"] = kept.hidden
    if "projected" in anatomy.sizes:
        shared["projected"] = kept.hidden
    return {axis: positions for axis, positions in shared.items() if positions is not None}


def _by_layer(kept: Kept) -> dict[str, Mapping[int, Any]]:
    """Return what each layer keeps of the axes that may differ by layer; of "group", for each key-value head."""
    chosen: dict[str, Mapping[int, Any] | None] = {
        "ffn": kept.ffn,
        "expert_ffn": kept.expert_ffn,
        "kv_heads": kept.kv_heads,
        "group": kept.heads,
        "experts": kept.experts,
    }
    return {axis: layers for axis, layers in chosen.items() if layers is not None}


# --- tensors ----------------------------------------------------------------------------------------------------


def _renamed(anatomy: Anatomy, numbers: Mapping[int, Mapping[int, int]], name: str) -> str | None:
    """Return a tensor's name in the result, where experts get other numbers; None for a tensor of a dropped expert."""
    expert = EXPERT_NUMBER.search(name) if numbers else None
    place = anatomy.locate(name) if expert else None
    if place is None or expert is None:
        return name
    number = numbers[place[0]].get(int(expert.group()))
    return None if number is None else EXPERT_NUMBER.sub(str(number), name)


def _cuts(anatomy: Anatomy, kept: Kept) -> _Cut:
    """Return the function that gives the remaining positions of a dimension; it computes each of them once."""
    by_layer, sizes = _by_layer(kept), anatomy.sizes
    shared = {axis: Index.of(positions) for axis, positions in _shared(anatomy, kept).items()}

    @cache
    def keep_in(layer: int | None) -> Keep:
        own = {axis: layers[layer] for axis, layers in by_layer.items() if layer is not None and layer in layers}
        groups = own.get("kv_heads", range(sizes["kv_heads"]))
        heads = {group: Index.of(members) for group, members in zip(groups, own.pop("group", ()), strict=False)}
        whole = shared | {axis: Index.of(positions) for axis, positions in own.items()}

        def keep(axis: str, outer: Mapping[str, int]) -> Index | None:
            return heads[outer["kv_heads"]] if axis == "group" and heads else whole.get(axis)

        return keep

    @cache
    def cut(layer: int | None, dim: Dim) -> tuple[Index, Scale]:
        index = survivors(dim, sizes, keep_in(layer))
        return index, Scale.all(1.0, len(index))

    return lambda layer, dim: cut(layer if axes_of(dim) & by_layer.keys() else None, dim)


def _narrowed(anatomy: Anatomy, name: str, sizes: Mapping[str, int], cut: _Cut, *, read: float) -> Expr:
    """Return tensor `name` with its remaining positions; `read` is the factor of what reads channels."""
    row, part = anatomy.row(name)
    expr: Expr = Read(name)
    if part in ("buffer", "other"):
        return expr
    stored, remaining = anatomy.spec.tensors[name].shape, anatomy.shape_of(name, sizes)
    place = anatomy.locate(name) if remaining != stored else None
    for dim, axes in enumerate(row.axes):
        if remaining[dim] < stored[dim]:
            expr = Gather(expr, dim, *cut(place[0] if place else None, axes))
    if row.kind not in ("embedding", "gain", "shift"):
        reads = written_and_read(row)[1] if read != 1.0 else None
        return expr if reads is None or axes_of(row.axes[reads]) != {"hidden"} else Affine(expr, read)
    factor = _factor(anatomy, row, sizes, is_final=is_final_norm(anatomy, name))
    if factor == 1.0:
        return expr
    # Where the code adds 1 to a stored gain, the sum is what has to grow.
    offset = 1.0 - anatomy.require_family(partial=True).init_gain if row.kind == "gain" else 0.0
    return Affine(expr, factor, (factor - 1.0) * offset)


def _factor(anatomy: Anatomy, row: Row, sizes: Mapping[str, int], *, is_final: bool) -> float:
    """Return the factor of a tensor beside the cut.

    Where the code multiplies embeddings by sqrt(hidden), larger embeddings make up for the smaller hidden size. A head
    that is tied to them would be larger too, so the final norm is divided by the same factor.
    """
    old = anatomy.sizes
    ratio = math.sqrt(old["hidden"] / sizes["hidden"])
    scaled = ratio if scales_embedding(anatomy) else 1.0
    if is_scaled(row):
        return scaled
    if row.kind not in ("gain", "shift"):
        return 1.0
    factor = math.sqrt(row.axes[-1].size(old) / row.axes[-1].size(sizes)) if row.kind == "gain" else 1.0
    if not is_final:
        return factor
    return factor / (scaled if has_tied_head(anatomy) else 1.0) / (ratio if scales_head(anatomy) else 1.0)


def _read_factor(anatomy: Anatomy, sizes: Mapping[str, int]) -> float:
    """Return the factor of what reads channels: 1, but behind norms without gains, which would have carried it.

    Raises PlanError where a tied head reads them.
    """
    ratio = math.sqrt(anatomy.sizes["hidden"] / sizes["hidden"])
    rows = {id(row): row for row, _ in anatomy.rows.values()}.values()
    if ratio == 1.0 or any(row.kind == "gain" and axes_of(row.axes[-1]) == {"hidden"} for row in rows):
        return 1.0
    if not any(row.kind == "head" for row in rows):
        raise PlanError("a tied head without a final norm cannot be narrowed", hint="Untie the head first.")
    return ratio


def _reasons(anatomy: Anatomy, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return why the result is approximate even where all that was removed was zero."""
    family, config, old = anatomy.require_family(partial=True), anatomy.config, anatomy.sizes
    rows = {id(row): row for row, _ in anatomy.rows.values()}.values()  # thousands of experts share a few
    reasons = []
    fewer_normed = any(row.kind == "gain" and row.axes[-1].size(sizes) < row.axes[-1].size(old) for row in rows)
    if fewer_normed or sizes["hidden"] < old["hidden"]:
        reasons.append(NORMS.format("the mean" if family.norm_kind == "layer" else "zero"))
    divided = not family.fixed_query_scale and not is_off(config, family.query_scale_flag)
    if divided and sizes["head_dim"] < old["head_dim"]:
        reasons.append(HEAD_DIM)
    shares = family.expert_shares or is_off(config, family.expert_shares_flag)
    if sizes.get("experts") != old.get("experts") and shares:
        reasons.append(SHARES)
    return tuple(reasons)


def _notes(anatomy: Anatomy, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return notes where a size is one that grouped products of experts, or groups of a quantizer, take badly."""
    old = anatomy.sizes
    rows = {id(row): row for name, (row, _) in anatomy.rows.items() if ".experts." in name}
    inside = {axis for row in rows.values() for dim in row.axes for axis in axes_of(dim)}
    known = sorted(inside & sizes.keys() - {"experts"})
    uneven = [sizes[axis] for axis in known if sizes[axis] < old[axis] and sizes[axis] % 8]
    return (*((UNEVEN.format(uneven[0]),) if uneven else ()), *_ungrouped(anatomy, sizes))


def _ungrouped(anatomy: Anatomy, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield a note for each number of inputs that groups of a quantizer divided before, and do not divide any more."""
    rows = {id(row): row for name, (row, _) in anatomy.rows.items() if anatomy.locate(name) is not None}
    inputs = [row.axes[-1] for row in rows.values() if row.kind == "linear" and len(row.axes) == 2]
    known = [each for each in inputs if axes_of(each) <= sizes.keys()]  # a partial table leaves some without a name
    for old, new in dict.fromkeys((each.size(anatomy.sizes), each.size(sizes)) for each in known):
        group = next((size for size in (32, 64) if old % size == 0 and new % size), None)
        if group is not None:
            below = new // group * group
            yield UNGROUPED.format(new, group, f"{below} or {below + group}" if below else group)


# --- refusals ---------------------------------------------------------------------------------------------------


def _check(anatomy: Anatomy, kept: Kept) -> None:
    """Raises PlanError unless `kept` lists positions for every layer with an axis, and the same number for each."""
    sizes = anatomy.sizes
    if kept.hidden is not None:
        _check_positions("channels of the hidden state", kept.hidden, sizes["hidden"])
    if kept.head_dim is not None:
        _check_positions("dims of a head", kept.head_dim, sizes["head_dim"])
        check_head_dim(anatomy, kept.head_dim)
    for axis, chosen in _by_layer(kept).items():
        _check_layers(anatomy, axis, chosen)
        sets = {f"layer {layer}": positions for layer, positions in chosen.items()}
        if axis == "group":
            for layer, heads in chosen.items():
                groups = sizes["kv_heads"] if kept.kv_heads is None else len(kept.kv_heads[layer])
                if len(heads) != groups:
                    raise PlanError(
                        f"layer {layer} keeps {groups} key-value heads, but lists heads for {len(heads)}",
                        hint="One list of heads for each key-value head that is kept.",
                    )
            sets = {f"layer {layer}, group {k}": heads[k] for layer, heads in chosen.items() for k in range(len(heads))}
        for place, positions in sets.items():
            _check_positions(f"{WORDS[axis]} of {place}", positions, sizes[axis])
        counts = sorted({len(positions) for positions in sets.values()})
        if len(counts) > 1:
            raise PlanError(
                f"some layers would keep {counts[0]} {WORDS[axis]}, others {counts[-1]}",
                hint="The config has one number for all: keep as many everywhere.",
            )
    if anatomy.shares_heads:
        _check_shared_heads(anatomy, kept)
    if kept.experts is not None:
        _check_per_token(anatomy, len(next(iter(kept.experts.values()))))
        _check_groups(anatomy, kept.experts)


def _check_positions(noun: str, positions: Sequence[int], size: int) -> None:
    if not positions:
        raise PlanError(f"no {noun} would be left", hint="Keep at least one.")
    if missing := [i for i in positions if not 0 <= i < size]:
        raise PlanError(f"{noun}: {missing[0]} does not exist", hint=f"There are {size}: 0 to {size - 1}.")
    if any(j <= i for i, j in pairwise(positions)):
        raise PlanError(f"{noun} are not in ascending order", hint="List each once, the lowest first.")


def _check_layers(anatomy: Anatomy, axis: str, chosen: Mapping[int, object]) -> None:
    """Raises PlanError unless `chosen` has an entry for each of the layers that have an axis, and for no other."""
    having = layers_with(anatomy, axis)
    if not having:
        in_experts = axis == "ffn" and layers_with(anatomy, "expert_ffn")
        hint = "Use --expert-intermediate-size: the size of experts." if in_experts else "Cut another axis."
        raise PlanError(f"no layer of this {anatomy.model_type} has {WORDS[axis]} to choose from", hint=hint)
    if odd := sorted(chosen.keys() ^ having):
        reason = "is not listed" if odd[0] in having else f"has no {WORDS[axis]}, or does not exist"
        raise PlanError(
            f"{WORDS[axis]} to keep: layer {odd[0]} {reason}", hint=f"Layers that have them: {sorted(having)}."
        )


def _check_shared_heads(anatomy: Anatomy, kept: Kept) -> None:
    """Raises PlanError unless all layers of a stack keep the same heads: one bias of the heads serves them all."""
    first = 0
    for stack in anatomy.stacks:
        numbers = range(first, first + stack.depth)
        first += stack.depth
        for chosen in (kept.heads, kept.kv_heads):
            if chosen is not None and len({chosen[layer] for layer in numbers}) > 1:
                raise PlanError(
                    f"the layers of {stack.prefix}* share one bias of their heads, and would keep different heads",
                    hint="Keep the same heads in all layers of a stack.",
                )


def _check_groups(anatomy: Anatomy, experts: Mapping[int, Positions]) -> None:
    """Raises PlanError where experts compete in groups, and groups would keep different numbers, or less than two."""
    groups = anatomy.expert_groups
    for layer, positions in experts.items() if groups > 1 else ():
        size = anatomy.sizes["experts"] // groups
        left = [sum(i // size == group for i in positions) for group in range(groups)]
        if len(set(left)) > 1 or left[0] < 2:
            raise PlanError(
                f"experts compete in {groups} groups, of which layer {layer} would keep {left}",
                hint=f"Keep two or more, and as many, of each group: a multiple of {groups}.",
            )


def _check_per_token(anatomy: Anatomy, left: int) -> None:
    """Raises PlanError where a token takes more experts than are left."""
    spellings = spelled(anatomy.spec.config, "experts_per_token")
    per_token = [value for value in spellings.values() if type(value) is int]
    if not per_token:
        raise PlanError(
            "config.json does not say how many experts a token takes",
            hint=f"Write it as {SPELLINGS['experts_per_token'][0]}.",
        )
    if max(per_token) > left:
        raise PlanError(
            f"a token takes {max(per_token)} experts, and {left} would be left", hint=f"Keep {max(per_token)} or more."
        )


def _check_projections(anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    """Raises PlanError where two sizes become equal that must differ for a tensor to exist."""
    for name in anatomy.spec.tensors:
        left, differs, right = (anatomy.row(name)[0].when or "").partition(" != ")
        if differs and sizes[left] == sizes[right]:
            raise PlanError(
                f"with {left} and {right} both {sizes[left]}, {anatomy.model_type} has no {name!r}",
                hint=f"Keep more or fewer of {right} than {sizes[left]}.",
            )
