"""Make a model deeper: identity blocks that keep the function, and the copies of the literature that do not.

Sources: LLaMA-Pro (arXiv:2401.02415) for identity blocks, here also for families with biases and norms on branches;
G_stack (arXiv:2405.15319) for stacking; SOLAR (arXiv:2312.15166); Inheritune (arXiv:2404.08634) for a donor's layers.
"""

from collections.abc import Sequence
from dataclasses import replace

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.families import written_and_read
from surgeon.anatomy.stacks import Stack
from surgeon.checkpoint.header import CheckpointSpec
from surgeon.errors import PlanError
from surgeon.options import OptionError
from surgeon.plan.expressions import Add, Affine, Constant, Expr, Read
from surgeon.plan.plan import Plan, substitute
from surgeon.transforms.alike import differing_setting
from surgeon.transforms.layers import keep_layers

DEPTH_METHODS = ("identity", "stack", "interleave", "solar", "interpolate")
APPROXIMATE = "the new layers change what the model computes; it has to be trained on"


def deepen(anatomy: Anatomy, layers: int, *, method: str = "identity", at: Sequence[int] | None = None) -> Plan:
    """Return the plan of a model with `layers` layers.

    identity     copies whose contribution is zero, placed evenly, or one after each layer of `at`: the function is kept
    stack        the whole stack again and again, the last time as far as it is needed
    interleave   each layer repeated in its place
    solar        the first layers, then the last ones, overlapping
    interpolate  new layers that are the mean of their neighbours

    Raises PlanError when the model cannot grow so.
    """
    depth = anatomy.depth
    if method not in DEPTH_METHODS:
        raise PlanError(f"unknown depth method {method!r}", hint=f"One of: {', '.join(DEPTH_METHODS)}.")
    if layers < depth:
        raise PlanError(f"cannot grow {depth} layers to {layers}", hint="To cut layers: surgeon truncate.")
    if at is not None and method not in ("identity", "interpolate"):
        hint = "Leave out --at, or use identity."
        raise OptionError("at", f"--at: the depth method {method} places its layers itself", hint=hint)
    if method in ("identity", "interpolate"):
        return _insert(anatomy, _insertion_points(depth, layers - depth, at), method)
    if method == "stack":
        order = [i % depth for i in range(layers)]
    elif method == "interleave":
        order = [i * depth // layers for i in range(layers)]
    else:
        order = _overlap(depth, layers)
    plan = keep_layers(anatomy, order)
    return plan if layers == depth else replace(plan, approximate=(*plan.approximate, APPROXIMATE))


def _insertion_points(depth: int, count: int, at: Sequence[int] | None) -> list[int]:
    """Return the layers after which a new one comes, in order: spread evenly, the last after the last layer."""
    if at is None:
        return [-(-(k + 1) * depth // count) - 1 for k in range(count)]
    if len(at) != count:
        raise PlanError(f"{count} layers are to be added, but {len(at)} places are given", hint="One place for each.")
    if wrong := [i for i in at if not 0 <= i < depth]:
        raise PlanError(f"there is no layer {wrong[0]} to put one after", hint=f"Layers are 0 to {depth - 1}.")
    return sorted(at)


def _overlap(depth: int, layers: int) -> list[int]:
    overlap, odd = divmod(2 * depth - layers, 2)
    if odd or not 0 <= overlap < depth:
        raise PlanError(
            f"solar makes two stacks of equal size out of {depth} layers: not {layers}",
            hint=f"Use an even number from {depth + depth % 2} to {2 * depth}.",
        )
    return [*range(depth - overlap), *range(overlap, depth)]


def _insert(anatomy: Anatomy, after: Sequence[int], method: str) -> Plan:
    """Return the plan that puts a new layer after each layer of `after`."""
    order: list[int] = []
    new: set[int] = set()
    for layer in range(anatomy.depth):
        order.append(layer)
        for _ in range(after.count(layer)):
            new.add(len(order))
            order.append(layer)
    plan = keep_layers(anatomy, order)
    if not new:
        return plan
    new_tensor = _identity if method == "identity" else _averaged
    tensors = dict(plan.tensors)
    for stack in anatomy.stacks:
        deeper = replace(stack, depth=len(order))
        for name in plan.tensors:
            place = deeper.locate(name)
            if place is not None and place[0] in new:
                tensors[name] = new_tensor(anatomy, plan, stack, order, place[0], place[1])
    layer_map = tuple(None if i in new else layer for i, layer in enumerate(order))
    reasons = plan.approximate if method == "identity" else (*plan.approximate, APPROXIMATE)
    return replace(plan, tensors=tensors, layer_map=layer_map, approximate=reasons)


def _identity(anatomy: Anatomy, plan: Plan, stack: Stack, order: Sequence[int], layer: int, rest: str) -> Expr:
    """Return a tensor of a copied layer that adds nothing: the weights that write the residual stream are zero.

    Where a branch ends in a norm, its gain is zero instead: after a projection of zeros the norm would multiply the
    gradient by 1 / sqrt(epsilon).
    """
    family = anatomy.require_family()
    if anatomy.sums_normed:
        raise PlanError(
            f"{anatomy.model_type} normalises after the sum, so no layer of it can leave the sum as it is",
            hint="Use --depth-method stack; it does not keep the function.",
        )
    name = stack.name(order[layer], rest)
    row, part = anatomy.row(name)
    spec = anatomy.spec.tensors[name]
    copied = plan.tensors[stack.name(layer, rest)]
    if family.branch_norms:
        return Constant(spec, family.init_gain - 1.0) if rest in family.branch_norms else copied
    write, _ = written_and_read(row)
    is_branch = part in ("attention", "mlp") and row.kind in ("linear", "conv1d", "bias")
    is_zero = is_branch and write is not None and "hidden" in axes_of(row.axes[write])
    return Constant(spec, 0.0) if is_zero else copied


def _averaged(anatomy: Anatomy, plan: Plan, stack: Stack, order: Sequence[int], layer: int, rest: str) -> Expr:
    """Return the mean of a tensor in the layers before and after a new one; after the last layer, that layer's own."""
    before = plan.tensors[stack.name(layer, rest)]
    following = next((i for i in range(layer + 1, len(order)) if order[i] != order[layer]), None)
    after = None if following is None else plan.tensors.get(stack.name(following, rest))
    return before if after is None else Add((Affine(before, 0.5), Affine(after, 0.5)))


def donate(anatomy: Anatomy, donor: Anatomy, layers: int, prefix: str) -> Plan:
    """Return the plan that appends the donor's layers from this model's depth on, up to `layers` in all.

    The donor's tensors are read under `prefix` + their name. Raises PlanError when the donor is another kind of model.
    """
    depth = anatomy.depth
    if layers < depth:
        raise PlanError(f"cannot grow {depth} layers to {layers}", hint="To cut layers: surgeon truncate.")
    if donor.depth < layers:
        raise PlanError(f"the donor has {donor.depth} layers, not {layers}", hint="Ask for fewer, or another donor.")
    as_deep = keep_layers(donor, range(depth)).result(donor.spec)
    _check_alike(anatomy.spec, as_deep)
    deeper = keep_layers(donor, range(layers))
    config = dict(anatomy.spec.config)
    config |= {key: value for key, value in deeper.config.items() if value != as_deep.config.get(key)}
    tensors: dict[str, Expr] = {name: Read(name) for name in anatomy.spec.tensors}
    for name, expr in deeper.tensors.items():
        if name not in tensors:
            tensors[name] = substitute(expr, lambda read: Read(prefix + read))
    layer_map = (*range(depth), *[None] * (layers - depth))
    return Plan(config, tensors, layer_map, approximate=(APPROXIMATE,) if layers > depth else ())


def _check_alike(model: CheckpointSpec, donor: CheckpointSpec) -> None:
    """Refuse a donor whose tensors differ in name, shape or dtype, or whose config says that they compute otherwise.

    A key that only one config has may be the other's under an older name, so it is no reason to refuse.
    """
    names = {**model.tensors, **donor.tensors}
    if differing := [name for name in names if model.tensors.get(name) != donor.tensors.get(name)]:
        raise PlanError(
            f"the donor differs from the model in {differing[0]!r}", hint="A donor must have the same sizes and dtype."
        )
    if (found := differing_setting(model.config, donor.config)) is not None:
        key, value, other = found
        raise PlanError(
            f"the donor's config.json says {key} = {other!r}, the model's {value!r}",
            hint="A donor's layers compute what they did only under its own config.",
        )
