"""Decide how a model gets wider: from requested sizes to one map per axis, and the config that says so.

The maps are those of function-preserving growth (Net2Net; HyperCloning, arXiv:2409.12903; here for any size). What a
family's code cannot express is refused here, and so is what would change the function although nobody chose that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.config import is_headless, is_off
from surgeon.anatomy.families import Row
from surgeon.anatomy.rotary import EXTENSIBLE_ROPE, rope_types, rotary_dims, wider_head
from surgeon.errors import PlanError
from surgeon.transforms.axis_maps import AxisMap, append, isometric_pad, tile, uneven, zero_pad

SQUARE = ("hidden", "heads", "kv_heads", "head_dim")  # the sizes that a family's code may derive from one another
WIDTH_METHODS = ("auto", "clone", "pad", "zero-pad", "uneven", "advanced")


@dataclass(frozen=True)
class Widths:
    """One map per axis, and the few factors that do not belong to an axis.

    `tied_factor` goes onto the final norm where the head is the embedding, `embedding_factor` onto the embedding where
    the model multiplies it by sqrt(hidden), `mean_fill` is how new residual positions follow the mean for layer norms,
    `query_gain` the factor of each dimension of a wider head's query gain.
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
    expert_ffn: int | None = None,
    method: str = "auto",
) -> Widths:
    """Return how to reach these sizes, none of which may be smaller than it is.

    Raises PlanError when the family's code cannot express the result, or `method` cannot make it.
    """
    if method not in WIDTH_METHODS:
        raise PlanError(f"unknown width method {method!r}", hint=f"One of: {', '.join(WIDTH_METHODS)}.")
    old = anatomy.sizes
    asked = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    asked |= {} if expert_ffn is None else {"expert_ffn": expert_ffn}
    check_shape(anatomy, asked)
    maps: dict[str, AxisMap] = {}
    if ffn != old["ffn"] and not any(
        "ffn" in axes_of(dim) for name in anatomy.spec.tensors for dim in anatomy.row(name)[0].axes
    ):
        raise PlanError(
            f"no tensor of this {anatomy.model_type} has the intermediate size: all its layers have experts",
            hint="Use --expert-intermediate-size.",
        )
    if hidden != old["hidden"]:
        maps["hidden"] = _residual_map(old["hidden"], hidden, method)
        if "projected" in old:  # an activation follows, so its positions keep their values
            maps["projected"] = _inner_map(old["hidden"], hidden, method, "hidden size")
    if expert_ffn not in (None, old.get("expert_ffn")):
        maps["expert_ffn"] = _inner_map(old["expert_ffn"], expert_ffn, method, "size of experts")
    if ffn != old["ffn"]:
        maps["ffn"] = _inner_map(old["ffn"], ffn, method, "intermediate size")
    splits = _add_heads(maps, old, heads, kv_heads, method)
    query_gain = _add_head_dim(maps, anatomy, head_dim) if head_dim != old["head_dim"] else ()
    if old.get("embed") == old["hidden"] and "hidden" in maps:
        maps["embed"] = maps["hidden"]
    approximate = _check_norms(anatomy, maps)
    sizes = asked | {"group": heads // kv_heads, "embed": hidden if "embed" in maps else old.get("embed", 0)}
    if "projected" in maps:
        sizes["projected"] = hidden
    if head_dim != old["head_dim"]:
        sizes |= dict.fromkeys(("q_dim", "k_dim", "v_dim"), head_dim)
        if "rotary" in old:
            sizes["rotary"] = rotary_dims(anatomy, head_dim)
    return Widths(
        maps=maps,
        sizes=sizes,
        config=resized(anatomy, sizes),
        splits_groups=splits,
        query_gain=query_gain,
        approximate=approximate,
        **_residual_factors(anatomy, maps, hidden, method),
    )


def check_shape(anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    """Raises PlanError, with sizes that fit, where the family's code cannot express a model of these."""
    family, old = anatomy.require_family(partial=True), anatomy.sizes
    changed = [axis for axis, size in sizes.items() if size != old.get(axis, size)]
    anatomy.check_free(changed)
    _check_derived_ffn(anatomy, sizes)
    hidden, heads, kv_heads, head_dim = (sizes[axis] for axis in SQUARE)
    if not {*changed} & {*SQUARE}:
        return
    shrinks = hidden < old["hidden"] or heads < old["heads"] or head_dim < old["head_dim"]
    implied = anatomy.implied_kv_heads(heads)
    if implied not in (None, kv_heads):
        all_heads = "all heads share one key-value head" if implied == 1 else "every head has its own keys and values"
        raise PlanError(
            f"{all_heads} in this {anatomy.model_type}: {heads} heads cannot share {kv_heads}",
            hint="Leave out --key-value-heads; they follow the heads.",
        )
    if heads % kv_heads:
        raise PlanError(
            f"{heads} attention heads cannot share {kv_heads} key-value heads",
            hint=f"Attention heads must be a multiple of key-value heads: {-(-heads // kv_heads) * kv_heads}.",
        )
    if anatomy.is_square and hidden != heads * head_dim:
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


def check_experts_size(anatomy: Anatomy) -> None:
    """Raises PlanError where experts have no size of their own."""
    if "expert_ffn" not in anatomy.layers_by_axis:
        has_some = "experts" in anatomy.layers_by_axis
        raise PlanError(
            f"the experts of {anatomy.model_type} have the MLP's size"
            if has_some
            else f"this {anatomy.model_type} has no experts",
            hint="Use --intermediate-size.",
        )


def derived_ffn(anatomy: Anatomy, sizes: Mapping[str, int]) -> int | None:
    """Return the MLP's size where the code derives it from another, None where the config holds it."""
    family = anatomy.require_family(partial=True)
    if "ffn" in family.sizes or "ffn" not in family.default_sizes:
        return None
    factor, other = family.default_sizes["ffn"]
    return int(factor * sizes[other])


def _check_derived_ffn(anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    derived = derived_ffn(anatomy, sizes)
    if derived is not None and sizes["ffn"] != derived:
        raise PlanError(
            f"{anatomy.model_type} takes its MLP to be {derived} wide with a hidden size of {sizes['hidden']}: "
            f"not {sizes['ffn']}",
            hint="The MLP follows the hidden size: leave out --intermediate-size.",
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
        maps["kv_heads"] = AxisMap(index, (1.0,) * kv_heads, (1.0,) * kv_heads, zeroed=True)
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
    """Add the maps of a wider head; return the factors of the gain of the queries' norm, () where there is none.

    Old dimensions keep their rotary frequencies. Logits are divided by sqrt(head_dim); larger queries make up for it.
    """
    family, config = anatomy.require_family(), anatomy.config
    old = anatomy.sizes["head_dim"]
    if family.rotary is not None and rotary_dims(anatomy, old):
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
        times, rotating, would_rotate = new // old, rotary_dims(anatomy, old), rotary_dims(anatomy, new)
        if would_rotate != times * rotating:
            raise PlanError(
                f"{rotating} of {old} dims rotate, {would_rotate} of {new} would: other frequencies",
                hint="Grow the number of heads instead.",
            )
        order = wider_head(old, rotating, times, family.rotary)
    else:
        order = (*range(old), *[-1] * (new - old))
    if is_off(config, family.query_scale_flag):
        raise PlanError(
            f"with {family.query_scale_flag} off, wider heads cannot be scaled", hint="Grow the number of heads."
        )
    factor = 1.0 if family.fixed_query_scale else math.sqrt(new / old)
    ones = (1.0,) * new
    maps["v_dim"] = append(old, new)
    if not any(row.kind == "gain" and "q_dim" in axes_of(row.axes[-1]) for row, _ in anatomy.rows.values()):
        query = tuple(0.0 if i < 0 else factor for i in order)
        maps["q_dim"] = AxisMap(order, query, query, zeroed=True)
        maps["k_dim"] = AxisMap(order, tuple(float(i >= 0) for i in order), ones, zeroed=False)
        return ()
    if new % old:
        raise PlanError(f"heads with a norm grow by whole multiples: {new} is no multiple of {old}", hint="Use 2x.")
    copies = iter([i for _ in range(new // old - 1) for i in range(old)])
    index = tuple(i if i >= 0 else next(copies) for i in order)
    maps["q_dim"] = maps["k_dim"] = AxisMap(index, ones, ones, zeroed=True)
    return tuple(0.0 if i < 0 else factor for i in order)


def _check_norms(anatomy: Anatomy, maps: Mapping[str, AxisMap]) -> tuple[str, ...]:
    """Return why norms make the result approximate, if they do. Raises PlanError where no method allows for that."""
    family = anatomy.require_family(partial=True)
    for name, (row, _) in anatomy.rows.items():
        if row.kind not in ("gain", "shift"):
            continue
        for axis in sorted(axes_of(row.axes[-1]) & maps.keys() - {"hidden", "embed"}):
            if not maps[axis].is_exact:
                raise PlanError(
                    f"{anatomy.model_type} normalises over all heads ({name}), so new heads must be copies of the old",
                    hint="Ask for a multiple, with --width-method clone.",
                )
    residual = maps.get("hidden")
    if residual is None:
        return ()
    pads = residual.index.has_new
    if pads and anatomy.sums_normed:
        raise PlanError(
            f"{anatomy.model_type} with norms after the sum cannot be padded: a norm fixes the mean of its output",
            hint="Use a multiple, with --width-method clone.",
        )
    if pads and family.norm_kind == "layer" and any(is_first_norm(anatomy, name) for name in anatomy.rows):
        raise PlanError(
            f"{anatomy.model_type} has a layer norm behind its embedding, which fixes the mean: no padding",
            hint="Use a multiple, with --width-method clone.",
        )
    if pads and (dense := _activated(anatomy)):
        raise PlanError(
            f"{anatomy.model_type} has an activation behind {dense!r}, which would see another scale: no padding",
            hint="Use a multiple, with --width-method clone.",
        )
    mean_moves = family.norm_kind == "layer" and not pads and len(residual.index) % (residual.index.highest + 1)
    if not residual.is_exact or mean_moves:
        return ("norms see another mean square than before",)
    return ()


def _residual_factors(anatomy: Anatomy, maps: Mapping[str, AxisMap], hidden: int, method: str) -> dict[str, float]:
    """Return the factors that a wider residual stream needs beside its map."""
    residual = maps.get("hidden")
    if residual is None:
        return {}
    family, old = anatomy.require_family(), anatomy.sizes["hidden"]
    factors: dict[str, float] = {}
    if scales_embedding(anatomy):
        factors["embedding_factor"] = math.sqrt(old / hidden)
    factor = math.sqrt(hidden / old) if scales_head(anatomy) else 1.0
    head = next(row for row in family.embedding.values() if row.kind == "head")
    if has_tied_head(anatomy) and axes_of(head.axes[-1]) & maps.keys():
        weight = 1.0 if method == "zero-pad" else hidden / old
        factor /= factors.get("embedding_factor", 1.0) * weight
    if factor != 1.0:
        factors["tied_factor"] = factor
        if not _has_final_norm(anatomy):
            raise PlanError("a tied head without a final norm cannot be widened", hint="Untie the head first.")
    if family.norm_kind == "layer" and method != "zero-pad" and residual.index.has_new:
        factors["mean_fill"] = math.sqrt(hidden / old)
    return factors


def _activated(anatomy: Anatomy) -> str | None:
    """Return a map from the stream to itself outside of the layers, such as a pooler's: an activation follows it."""
    for name, (row, _) in anatomy.rows.items():
        if row.kind == "linear" and not anatomy.locate(name) and all("hidden" in axes_of(dim) for dim in row.axes):
            return name
    return None


def scales_embedding(anatomy: Anatomy) -> bool:
    """Return whether the model multiplies the embedding of tokens by sqrt(hidden)."""
    scales = anatomy.require_family(partial=True).scales_embedding
    return bool(anatomy.config.get(scales)) if isinstance(scales, str) else scales


def is_scaled(row: Row) -> bool:
    """Return whether a tensor is what a model multiplies where it scales its embedding: tokens, and no positions."""
    return row.kind == "embedding" and "vocab" in axes_of(row.axes[0])


def scales_head(anatomy: Anatomy) -> bool:
    """Return whether the model multiplies what its head reads by hidden ** -0.5."""
    family, config = anatomy.require_family(partial=True), anatomy.config
    flag = next((flag for flag in family.head_scale_flags if config.get(flag) is not None), None)
    return family.scales_head and not is_off(config, flag) and not is_headless(anatomy.spec.config)


def has_tied_head(anatomy: Anatomy) -> bool:
    """Return whether the embedding is the head too; where the head is a part that this class lacks, nothing is."""
    family = anatomy.require_family(partial=True)
    if is_headless(anatomy.spec.config) or any(row.kind == "head" for row, _ in anatomy.rows.values()):
        return False
    is_part = bool(family.final_norm) and all(row.optional for row in family.final_norm.values())
    return not is_part or _has_final_norm(anatomy)


def _has_final_norm(anatomy: Anatomy) -> bool:
    return any(is_final_norm(anatomy, name) for name in anatomy.rows)


def is_final_norm(anatomy: Anatomy, name: str) -> bool:
    """Return whether a tensor is of the norm in front of the head."""
    family = anatomy.require_family(partial=True)
    today = family.current(name)
    if today in family.final_norm or family.base + today in family.final_norm:
        return True
    place = anatomy.stacks[0].locate(today) if family.last_norm else None
    return place is not None and place[0] == anatomy.depth - 1 and place[1].rpartition(".")[0] == family.last_norm


def is_first_norm(anatomy: Anatomy, name: str) -> bool:
    """Return whether a tensor is of a norm whose output enters the layers: one outside of them, and not the last."""
    family, row = anatomy.require_family(partial=True), anatomy.rows[name]
    if row[1] != "norm" or anatomy.locate(name) or is_final_norm(anatomy, name):
        return False
    return name not in family.encoder_norm and family.base + name not in family.encoder_norm


def resized(anatomy: Anatomy, sizes: Mapping[str, int], other: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the config with the new sizes and `other` changes; a size that the code would derive is written out."""
    family, config = anatomy.require_family(partial=True), anatomy.config
    changes: dict[str, Any] = {}
    for axis, keys in family.sizes.items():
        if not sizes.get(axis) or (family.is_partial and sizes[axis] == anatomy.sizes[axis]):
            continue
        present = [key for key in keys if config.get(key) is not None] or keys[:1]
        changes |= {key: sizes[axis] for key in present if config.get(key) != sizes[axis]}
    whole = anatomy.with_config(changes | dict(other or {}))
    for axis, paths in family.outer_sizes.items():
        for path in paths if sizes[axis] != anatomy.sizes[axis] else ():
            group, _, key = path.rpartition(".")
            holder = whole.get(group) if group else whole
            if isinstance(holder, Mapping) and holder.get(key) == anatomy.sizes[axis]:
                whole |= {group: {**holder, key: sizes[axis]}} if group else {key: sizes[axis]}
    return whole
