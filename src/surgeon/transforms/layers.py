"""Choose, drop, repeat, reorder or re-pair layers: every surgery in depth is a list of attentions and one of MLPs."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.axes import Index, Places, Scale, axes_of, places
from surgeon.anatomy.config import CONFIG_HINT, declared_kinds, text_config
from surgeon.anatomy.families import FIRST, Row, written_and_read
from surgeon.anatomy.following import follow_layers
from surgeon.anatomy.halves import ATTENTION, MLP, Half, Pairing
from surgeon.anatomy.split_layers import split_layers
from surgeon.anatomy.stacks import Stack
from surgeon.checkpoint.header import is_quantized
from surgeon.errors import CheckpointError, PlanError
from surgeon.mistyped import close_to
from surgeon.options import OptionError
from surgeon.plan.expressions import Constant, Expr, Gather, Normal, Read
from surgeon.plan.plan import FLOAT_DTYPES, Plan


def fresh(anatomy: Anatomy, name: str, *, seed: int, layers: int) -> Expr:
    """Return the initial value of tensor `name` in a model of `layers` layers, as transformers would draw it.

    Weights are normal with the config's standard deviation, GPT-2's residual projections with std / sqrt(2 layers);
    biases and shifts are 0, gains are 1 (stored as 0 where the model adds 1). One stream for each tensor.
    """
    family = anatomy.require_family()
    row, _ = anatomy.row(name)
    spec = anatomy.spec.tensors[name]
    if spec.dtype not in FLOAT_DTYPES:
        raise PlanError(
            f"cannot draw {name!r} anew: it is stored as {spec.dtype}",
            hint="Leave out --inherit, or start from a checkpoint in a floating dtype.",
        )
    if family.own_init:
        raise PlanError(
            f"{anatomy.model_type} draws fresh weights in a way of its own, which surgeon does not know",
            hint="Leave out --inherit.",
        )
    if row.start is not None:
        return Constant(spec, row.start)
    if row.kind == "gain":
        return Constant(spec, family.init_gain * (initial_std(anatomy) if family.init_by_inputs else 1.0))
    if row.kind in ("bias", "shift"):
        return Constant(spec, 0.0)
    std = initial_std(anatomy, embedding=row.kind == "embedding")
    if family.init_by_inputs:
        std /= math.sqrt(_num_inputs(anatomy, row))
    if name.endswith(family.residual_init):
        std /= math.sqrt(2 * layers)
    return Normal(spec, std, seed, name)


def _num_inputs(anatomy: Anatomy, row: Row) -> int:
    """Return by how much the variance of a fresh weight is smaller where it goes by its inputs (mesh-tensorflow's)."""
    sizes = anatomy.sizes
    if row.kind == "logit":
        return sizes["hidden"]
    if row.kind not in ("linear", "conv1d"):
        return 1
    write, read = written_and_read(row)
    assert write is not None
    assert read is not None
    makes_queries = "q_dim" in axes_of(row.axes[write])  # whose products with keys are not scaled
    return row.axes[read].size(sizes) * (sizes["q_dim"] if makes_queries else 1)


def initial_std(anatomy: Anatomy, *, embedding: bool = False) -> float:
    """Return the standard deviation of fresh weights: the config's, or transformers' usual 0.02 (1 before a division).

    Raises CheckpointError for a value that is no standard deviation.
    """
    family = anatomy.require_family(partial=True)
    key = (family.embedding_std if embedding else None) or family.init_std
    value = anatomy.spec.config.get(key)
    if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise CheckpointError(f"config.json says {key} = {value!r}, no standard deviation", hint=CONFIG_HINT)
    return float(value or (1.0 if family.init_by_inputs else 0.02))


def planned(anatomy: Anatomy, plan: Plan) -> Anatomy:
    """Return the anatomy of the model that a plan makes of this one; this one where the plan changes nothing."""
    if not plan.steps and plan.config == anatomy.spec.config:
        return anatomy
    return read_anatomy(plan.result(anatomy.spec))


def keep_layers(anatomy: Anatomy, keep: Sequence[int]) -> Plan:
    """Return the plan for a model whose layer i is layer keep[i] of this one. An index may repeat.

    Of an encoder-decoder both stacks are cut alike. Raises PlanError when a layer does not exist, when the model's
    code ties a layer to its place, or when the config cannot follow.
    """
    plan = keep_halves(anatomy, Pairing.of_layers(keep))
    return replace(plan, steps=({"keep_layers": {"layers": list(keep)}},))


def keep_halves(anatomy: Anatomy, pairing: Pairing) -> Plan:
    """Return the plan for a model whose layers are made of these attention and MLP halves.

    Of whole layers, in both lists the same, any order will do and every model that can be cut at all. Halves that
    change partners interleave as `Pairing.check` says, and need a table that tells which tensors are whose.

    Raises PlanError as `keep_layers`, and where a layer of the model has no two halves that can part.
    """
    _check_indices(anatomy, pairing.attention)
    halves: dict[str, Half] = {}
    if not pairing.is_of_layers:
        pairing.check(anatomy.depth)
        if pairing != Pairing.of_halves(pairing.halves):
            raise PlanError(
                "halves that change partners stay in their order", hint="Write both lists in ascending order."
            )
        halves = split_layers(anatomy)
    edit = follow_layers(anatomy.spec.config, pairing, anatomy.depth, tabled=anatomy.whole_family is not None)
    for stack in anatomy.stacks:
        _check_places(anatomy, stack, pairing, halves)
    if is_quantized(edit.config):
        from surgeon.anatomy.quantized import follow_quantization

        edit.config = follow_quantization(edit.config, anatomy, pairing.attention)
    tensors = _placed(anatomy, pairing, halves)
    step = {"keep_halves": {"attention": list(pairing.attention), "mlp": list(pairing.mlp)}}
    mlp_map = None if pairing.is_of_layers else pairing.mlp
    return Plan(edit.config, tensors, pairing.attention, (step,), tuple(edit.notes), mlp_map=mlp_map)


def _placed(anatomy: Anatomy, pairing: Pairing, halves: Mapping[str, Half]) -> dict[str, Expr]:
    """Return the tensors of the result; `halves` tells whose a tensor of a layer is, and is empty for whole layers."""
    targets: dict[Half, dict[int, list[int]]] = {}
    for half, kept in ((ATTENTION, pairing.attention), (MLP, pairing.mlp)):
        for new, old in enumerate(kept):
            targets.setdefault(half, {}).setdefault(old, []).append(new)
    tensors: dict[str, Expr] = {}
    for name in anatomy.spec.tensors:
        located = next(((stack, place) for stack in anatomy.stacks if (place := stack.locate(name))), None)
        if located is None or _serves_all(anatomy, name):
            tensors[name] = Read(name)
            continue
        stack, (old, rest) = located
        for new in targets[halves.get(name, ATTENTION)].get(old, ()):
            tensors[stack.name(new, rest)] = _moved(anatomy, name, old, new)
    return tensors


def resolve_depth(request: int | str, depth: int) -> int:
    """Return a number of layers: `request` itself, or "75%" of `depth`, rounded half up.

    Raises OptionError when it is neither.
    """
    text = str(request).strip()
    number = text.removesuffix("%")
    if not re.fullmatch(r"[0-9]{1,9}" if number == text else r"[0-9]{1,9}(\.[0-9]{1,9})?", number):
        raise OptionError("layers", f"cannot read {request!r} as a number of layers", hint="Write 12, or 75%.")
    return int(float(number) * depth / 100 + 0.5) if number != text else int(text)


def check_depth(request: int | str) -> None:
    """Raises OptionError for what is no depth of any model: no number or percentage, or none at all."""
    if resolve_depth(request, 10**9) < 1:
        hint = "It is the depth of the result; ask for 1 or more."
        raise OptionError("layers", f"--layers is {request}; a model needs at least one layer", hint=hint)


def _check_indices(anatomy: Anatomy, keep: Sequence[int]) -> None:
    if not keep:
        raise PlanError(
            "a model needs at least one layer", hint="--layers is the depth of the result; ask for 1 or more."
        )
    depths = {stack.depth for stack in anatomy.stacks}
    if len(depths) > 1:
        counts = " and ".join(f"{stack.prefix}* {stack.depth}" for stack in anatomy.stacks)
        raise PlanError(
            f"encoder and decoder differ in depth ({counts}), so one list of layers cannot serve both",
            hint="surgeon inspect shows both depths; only models where they agree can be cut.",
        )
    if missing := sorted({i for i in keep if not 0 <= i < anatomy.depth}):
        raise PlanError(f"layers {missing} do not exist", hint=f"This model has layers 0 to {anatomy.depth - 1}.")


def _check_places(anatomy: Anatomy, stack: Stack, pairing: Pairing, halves: Mapping[str, Half]) -> None:
    """Refuse a layer, or a half of one, that comes to a place where the code builds other tensors."""
    if not halves:
        _check_side(anatomy, stack, pairing.attention, None, halves)
        return
    _check_side(anatomy, stack, pairing.attention, ATTENTION, halves)
    _check_side(anatomy, stack, pairing.mlp, MLP, halves)


def _check_side(
    anatomy: Anatomy, stack: Stack, keep: Sequence[int], half: Half | None, halves: Mapping[str, Half]
) -> None:
    """Refuse a layer that comes to a place where the code builds other tensors: it decides by place, and not by kind.

    With `half` only that half of each layer is looked at. Layers of one declared kind are built alike. Where they are
    not, or those of the kind that was at the place, place i is built as in the source. The last place is too, where the
    source's last layer is the odd one. No place is known beyond the source's depth.
    """
    inside: list[dict[str, tuple[int, ...]]] = [{} for _ in range(stack.depth)]
    for name, tensor in anatomy.spec.tensors.items():
        if (located := stack.locate(name)) and halves.get(name) == half and not _serves_all(anatomy, name):
            inside[located[0]][located[1]] = tensor.shape
    kinds = declared_kinds(text_config(anatomy.spec.config), stack.depth, half)
    built = [frozenset(tensors.items()) for tensors in inside]
    groups: dict[object, set[frozenset[tuple[str, tuple[int, ...]]]]] = {}
    for kind, tensors in zip(kinds, built, strict=True):
        groups.setdefault(kind, set()).add(tensors)
    counts = Counter(built)
    last = stack.depth - 1
    is_odd_end = counts[built[last]] == 1 < len(groups[kinds[last]])
    for new, old in enumerate(keep):
        place = last if is_odd_end and new == len(keep) - 1 else min(new, last - 1 if is_odd_end else last)
        if len(groups[kinds[old]]) == len(groups[kinds[place]]) == 1:
            continue
        is_known = new <= last or len(set(built[last // 2 :])) == 1
        if built[place] == built[old] and is_known:
            continue
        layer = min(old, place, key=lambda i: counts[built[i]])
        other = max(set(built) - {built[layer]}, key=lambda tensors: counts[tensors])
        odd = min(name for name, _ in other ^ built[layer])
        raise PlanError(
            f"layer {layer} of {anatomy.model_type} differs from the others in {odd!r} because of its place",
            hint=f"Keep layer {layer} where it is.",
        )


def _serves_all(anatomy: Anatomy, name: str) -> bool:
    """Return whether a tensor lies in the first layer and serves them all, so that it stays when that layer goes."""
    return anatomy.family is not None and anatomy.row(name)[0].when == FIRST


def _moved(anatomy: Anatomy, name: str, old: int, new: int) -> Expr:
    """Return tensor `name` of layer `old` as layer `new` needs it.

    Where the code divides attention logits by layer + 1, queries are multiplied by (new + 1) / (old + 1) in return.
    """
    flag = anatomy.family.inverse_layer_scale if anatomy.family else None
    if old == new or flag is None or not anatomy.spec.config.get(flag):
        return Read(name)
    factor = (new + 1) / (old + 1)

    def scale_queries(axis: str, block: frozenset[str]) -> Places | None:
        size = anatomy.sizes[axis]
        return Places(Index.up_to(size), Scale.all(factor, size)) if axis == "q_dim" else None

    expr: Expr = Read(name)
    for dim, axes in enumerate(anatomy.row(name)[0].axes):
        if "q_dim" in axes_of(axes):
            scaling = places(axes, anatomy.sizes, scale_queries)
            expr = Gather(expr, dim, scaling.index, scaling.scale)
    return expr


PARTS = ("attention", "mlp", "norm", "embedding")


def truncate(
    anatomy: Anatomy,
    layers: int | str | None = None,
    *,
    every: int | None = None,
    inherit: Collection[str] | None = None,
    seed: int = 0,
) -> Plan:
    """Return the plan that keeps the first `layers` layers ("50%" counts from the source's depth), and the rest whole.

    With `every` in their place, layers 0, `every`, 2 `every` and so on are kept.

    With `inherit`, only these parts keep their weights and the others are drawn as the family does: the ablation of
    Inheritune, section 4. "embedding" is the token and position embeddings and the head, "norm" every norm, the
    final one included.

    Raises PlanError when there are not so many layers, or when the model cannot be cut.
    """
    if every is None:
        assert layers is not None, "one of them says which layers stay"
        kept = _first(anatomy, layers)
    else:
        kept = _every(anatomy, every)
    plan = keep_layers(anatomy, kept)
    step: dict[str, object] = {"layers": len(kept)} if every is None else {"every": every}
    step["seed"] = seed
    if inherit is not None:
        plan = _inherit(plan, anatomy, inherit, seed)
        step["inherit"] = sorted(inherit)
    return replace(plan, steps=({"truncate": step},))


def _first(anatomy: Anatomy, layers: int | str) -> range:
    count = resolve_depth(layers, anatomy.depth)
    if count > anatomy.depth:
        raise PlanError(
            f"cannot truncate to {count} layers: the model has {anatomy.depth}",
            hint="--layers is the depth of the result.",
        )
    return range(count)


def _every(anatomy: Anatomy, every: int) -> range:
    if not 2 <= every < max(anatomy.depth, 3):
        hint = f"2 keeps every second layer; this model has {anatomy.depth}."
        raise PlanError(f"cannot keep every {every}-th layer of {anatomy.depth}", hint=hint)
    return range(0, anatomy.depth, every)


def check_parts(parts: Collection[str]) -> None:
    """Raises OptionError for a part that no model has."""
    if unknown := sorted(set(parts) - set(PARTS)):
        close, hint = close_to(unknown[0], PARTS), f"Parts: {', '.join(PARTS)}; none by itself."
        raise OptionError("inherit", f"unknown part {unknown[0]!r}{close}", hint=hint)


def _inherit(plan: Plan, anatomy: Anatomy, parts: Collection[str], seed: int) -> Plan:
    check_parts(parts)
    anatomy.require_family()
    tensors = dict(plan.tensors)
    drawn = 0
    for name in tensors:
        if anatomy.row(name)[1] not in (*parts, "buffer"):
            tensors[name] = fresh(anatomy, name, seed=seed, layers=len(plan.layer_map))
            drawn += 1
    kept = sum(isinstance(expr, Read) for expr in tensors.values())
    note = (
        f"{kept} tensors were inherited ({', '.join(sorted(parts)) or 'no part'}), {drawn} drawn anew with seed {seed}"
    )
    return replace(plan, tensors=tensors, notes=(*plan.notes, note))
