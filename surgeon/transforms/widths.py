"""Decide how a model gets wider: from sizes asked for to one map per axis, and the config that says so.

Everything a family's code cannot express, and everything that would change the function unasked, is refused here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.config import is_off, rope_types, rotary_share
from surgeon.errors import PlanError
from surgeon.transforms.axis_maps import AxisMap, append, isometric_pad, rotary_places, tile, uneven, zero_pad

WIDTH_METHODS = ("auto", "clone", "pad", "zero-pad", "uneven", "advanced")
# Rope types whose frequencies in a head n times as wide contain the old ones, pair i at n * i.
EXTENSIBLE_ROPE = frozenset({"default", "linear", "llama3"})


@dataclass(frozen=True)
class Widths:
    """One map per axis, and the few factors that do not belong to an axis.

    `tied_factor` goes onto the final norm where the head is the embedding, `embedding_factor` onto the embedding where
    the model multiplies it by sqrt(hidden), `mean_fill` is how new residual positions follow the mean for layer norms,
    `query_gain` what each dim of a wider head's query gain is multiplied with.
    """

    maps: Mapping[str, AxisMap]
    sizes: Mapping[str, int]
    config: Mapping[str, Any]
    splits_groups: bool = False
    tied_factor: float = 1.0
    embedding_factor: float = 1.0
    mean_fill: float = 0.0
    query_gain: tuple[float, ...] = ()
    approximate: tuple[str, ...] = ()

    @property
    def axes(self) -> frozenset[str]:
        """The axes that change."""
        return frozenset(self.maps)

    def map(self, axis: str, block: frozenset[str]) -> AxisMap | None:
        """Return the map of an axis; queries keep their order where groups are only split among more keys."""
        if self.splits_groups and axis == "kv_heads" and "group" in block:
            return None
        return self.maps.get(axis)


def plan_widths(
    anatomy: Anatomy,
    *,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    method: str = "auto",
) -> Widths:
    """Return how to reach these sizes, none of which may be smaller than it is.

    Raises PlanError when the family's code cannot express the result, or `method` cannot make it.
    """
    if method not in WIDTH_METHODS:
        raise PlanError(f"unknown width method {method!r}", hint=f"One of: {', '.join(WIDTH_METHODS)}.")
    old = anatomy.sizes
    check_shape(anatomy, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    maps: dict[str, AxisMap] = {}
    if ffn != old["ffn"] and not any(
        "ffn" in axes_of(dim) for name in anatomy.spec.tensors for dim in anatomy.row(name)[0].axes
    ):
        raise PlanError(
            f"no tensor of this {anatomy.model_type} has the intermediate size: all its layers have experts",
            hint="The size of experts cannot be grown yet.",
        )
    if hidden != old["hidden"]:
        maps["hidden"] = _residual_map(old["hidden"], hidden, method)
    if ffn != old["ffn"]:
        maps["ffn"] = _inner_map(old["ffn"], ffn, method, "intermediate size")
    splits = _add_heads(maps, old, heads, kv_heads, method)
    query_gain = _add_head_dim(maps, anatomy, head_dim) if head_dim != old["head_dim"] else ()
    if old.get("embed") == old["hidden"] and "hidden" in maps:
        maps["embed"] = maps["hidden"]
    approximate = _check_norms(anatomy, maps)
    sizes = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    sizes |= {"group": heads // kv_heads, "embed": hidden if "embed" in maps else old.get("embed", 0)}
    sizes |= dict.fromkeys(("q_dim", "k_dim", "v_dim"), head_dim)
    return Widths(
        maps=maps,
        sizes=sizes,
        config=sizes_in_config(anatomy, sizes),
        splits_groups=splits,
        query_gain=query_gain,
        approximate=approximate,
        **_residual_factors(anatomy, maps, hidden, method),
    )


def check_shape(anatomy: Anatomy, *, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """Raises PlanError, with sizes that fit, where the family's code cannot express a model of these."""
    family, old = anatomy.require_family(), anatomy.sizes
    shrinks = hidden < old["hidden"] or heads < old["heads"] or head_dim < old["head_dim"]
    if "kv_heads" not in family.sizes and kv_heads != heads:
        raise PlanError(
            f"every head of {anatomy.model_type} has its own keys and values: {heads} heads cannot share {kv_heads}",
            hint="Leave out --key-value-heads; they follow the heads.",
        )
    if heads % kv_heads:
        raise PlanError(
            f"{heads} attention heads cannot share {kv_heads} key-value heads",
            hint=f"Attention heads must be a multiple of key-value heads: {-(-heads // kv_heads) * kv_heads}.",
        )
    if "head_dim" not in family.sizes and hidden != heads * head_dim:
        count = max(1, hidden // head_dim) if shrinks and hidden != old["hidden"] else heads
        fitting = f"--hidden-size {count * head_dim} with {count} heads"
        legal = fitting if shrinks or hidden == old["hidden"] else f"{head_dim} a head"
        raise PlanError(
            f"{anatomy.model_type} derives a head's size from hidden / heads: {hidden} is not {heads} x {head_dim}",
            hint=f"Sizes that fit: hidden = heads x head size, such as {legal}.",
        )
    if family.hidden_divisible and hidden % heads:
        near = max(1, hidden // heads if shrinks else -(-hidden // heads)) * heads
        raise PlanError(
            f"{anatomy.model_type} wants a hidden size that its heads divide: {hidden} is no multiple of {heads}",
            hint=f"Near: --hidden-size {near}.",
        )


def _residual_map(old: int, new: int, method: str) -> AxisMap:
    whole = new % old == 0
    if method == "clone" and not whole:
        raise PlanError(
            f"cloning makes whole copies: {new} is no multiple of {old}", hint="Use --width-method pad, or auto."
        )
    if method == "zero-pad":
        return zero_pad(old, new)
    if method in ("uneven", "advanced"):
        return uneven(old, new)
    return tile(old, new // old) if whole and method != "pad" else isometric_pad(old, new)


def _inner_map(old: int, new: int, method: str, name: str) -> AxisMap:
    """Return the map of an axis inside a layer, where any number of positions can be added exactly."""
    whole = new % old == 0
    if method == "clone" and not whole:
        raise PlanError(f"cloning makes whole copies: {name} {new} is no multiple of {old}", hint="Use auto or pad.")
    if method in ("uneven", "advanced"):
        return uneven(old, new)
    return tile(old, new // old) if whole and method in ("auto", "clone") else append(old, new)


def _add_heads(maps: dict[str, AxisMap], old: Mapping[str, int], heads: int, kv_heads: int, method: str) -> bool:
    """Add the maps of heads; return whether groups are split among more key-value heads, queries staying in order."""
    kv, group, new_group = old["kv_heads"], old["group"], heads // kv_heads
    if heads == old["heads"] and kv_heads != kv:
        if kv_heads % kv:
            raise PlanError(f"{kv} key-value heads cannot be split evenly into {kv_heads}", hint="Use a multiple.")
        times = kv_heads // kv
        index = tuple(i for i in range(kv) for _ in range(times))
        maps["kv_heads"] = AxisMap(index, (1.0,) * kv_heads, (1.0,) * kv_heads, quiet=True)
        return True
    if kv_heads != kv and new_group != group and (kv_heads % kv or new_group % group):
        raise PlanError(
            f"cannot grow {kv} groups of {group} heads into {kv_heads} groups of {new_group} at once",
            hint=f"Keep {group} heads a group, or the number of key-value heads, or use multiples of both.",
        )
    if kv_heads != kv:
        maps["kv_heads"] = _inner_map(kv, kv_heads, method, "key-value heads")
    if new_group != group:
        maps["group"] = _inner_map(group, new_group, method, "heads a group")
    return False


def _add_head_dim(maps: dict[str, AxisMap], anatomy: Anatomy, new: int) -> tuple[float, ...]:
    """Add the maps of a wider head; return what the gain of the queries' norm is multiplied with, () without one.

    Old dims keep their rotary frequencies. Logits are divided by sqrt(head_dim), which the queries make good.
    """
    family, config = anatomy.require_family(), anatomy.spec.config
    old = anatomy.sizes["head_dim"]
    if family.rotary is not None:
        if new % old:
            raise PlanError(
                f"a rotary head of {old} dims cannot grow to {new}: other multiples have other frequencies",
                hint=f"Use --head-dim {2 * old}.",
            )
        if wrong := sorted(rope_types(config) - EXTENSIBLE_ROPE):
            raise PlanError(
                f"rope type {wrong[0]!r} derives its frequencies from the whole head, so a wider one changes them",
                hint="Grow the number of heads instead.",
            )
        times, share = new // old, rotary_share(config)
        turning = int(old * share)
        if int(new * share) != times * turning:
            raise PlanError(
                f"of {old} dims {turning} turn, of {new} dims {int(new * share)} would: other frequencies",
                hint="Grow the number of heads instead.",
            )
        found = rotary_places(old, turning, times, family.rotary)
    else:
        found = (*range(old), *[-1] * (new - old))
    if is_off(config, family.query_scale_flag):
        raise PlanError(
            f"with {family.query_scale_flag} off, wider heads cannot be scaled", hint="Grow the number of heads."
        )
    factor = 1.0 if family.fixed_query_scale else math.sqrt(new / old)
    ones = (1.0,) * new
    maps["v_dim"] = append(old, new)
    if not any(axes_of(dim) & {"q_dim"} for row in family.norm.values() for dim in row.axes):
        query = tuple(0.0 if i < 0 else factor for i in found)
        maps["q_dim"] = AxisMap(found, query, query, quiet=True)
        maps["k_dim"] = AxisMap(found, tuple(float(i >= 0) for i in found), ones, quiet=False)
        return ()
    if new % old:
        raise PlanError(f"heads with a norm grow by whole multiples: {new} is no multiple of {old}", hint="Use 2x.")
    copies = iter([i for _ in range(new // old - 1) for i in range(old)])
    index = tuple(i if i >= 0 else next(copies) for i in found)
    maps["q_dim"] = maps["k_dim"] = AxisMap(index, ones, ones, quiet=True)
    return tuple(0.0 if i < 0 else factor for i in found)


def _check_norms(anatomy: Anatomy, maps: Mapping[str, AxisMap]) -> tuple[str, ...]:
    """Return why norms make the result approximate, if they do. Raises PlanError where nobody asked for that."""
    family = anatomy.require_family()
    for rest, row in family.norm.items():
        for axis in sorted(axes_of(row.axes[-1]) & maps.keys() - {"hidden"}):
            if not maps[axis].is_exact:
                raise PlanError(
                    f"{anatomy.model_type} normalises over all heads ({rest}), so new heads must be copies of the old",
                    hint="Ask for a multiple, with --width-method clone.",
                )
    found = maps.get("hidden")
    if found is None:
        return ()
    pads = -1 in found.index
    if pads and is_off(anatomy.spec.config, family.pre_norm_flag):
        raise PlanError(
            f"{anatomy.model_type} with norms after the sum cannot be padded: a norm fixes the mean that it puts out",
            hint="Use a multiple, with --width-method clone.",
        )
    mean_moves = family.norm_kind == "layer" and not pads and len(found.index) % len(set(found.index))
    if not found.is_exact or mean_moves:
        return ("norms see another mean square than before",)
    return ()


def _residual_factors(anatomy: Anatomy, maps: Mapping[str, AxisMap], hidden: int, method: str) -> dict[str, float]:
    """Return the factors that widening the residual stream asks for beside its map."""
    found = maps.get("hidden")
    if found is None:
        return {}
    family, old = anatomy.require_family(), anatomy.sizes["hidden"]
    factors: dict[str, float] = {}
    if family.scales_embedding:
        factors["embedding_factor"] = math.sqrt(old / hidden)
    tied = not any(anatomy.row(name)[0].kind == "head" for name in anatomy.spec.tensors)
    head = next(row for row in family.embedding.values() if row.kind == "head")
    if tied and axes_of(head.axes[-1]) & maps.keys():
        weight = 1.0 if method == "zero-pad" else hidden / old
        factors["tied_factor"] = 1 / (factors.get("embedding_factor", 1.0) * weight)
        if factors["tied_factor"] != 1.0 and not _has_final_norm(anatomy):
            raise PlanError("a tied head without a final norm cannot be widened", hint="Untie the head first.")
    if family.norm_kind == "layer" and method != "zero-pad" and -1 in found.index:
        factors["mean_fill"] = math.sqrt(hidden / old)
    return factors


def _has_final_norm(anatomy: Anatomy) -> bool:
    outside = (name for name in anatomy.spec.tensors if not anatomy.stacks[0].locate(name))
    return any(anatomy.row(name)[0].kind == "gain" for name in outside)


def sizes_in_config(anatomy: Anatomy, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the config keys that hold the new sizes; a size that the code would derive otherwise is written out."""
    config = anatomy.spec.config
    changes: dict[str, Any] = {}
    for axis, keys in anatomy.require_family().sizes.items():
        if not sizes.get(axis):
            continue
        said = [key for key in keys if config.get(key) is not None] or keys[:1]
        changes |= {key: sizes[axis] for key in said if config.get(key) != sizes[axis]}
    return changes
