"""Prune a model: leave out layers, then narrow what is left. One plan."""

from collections.abc import Mapping, Sequence
from typing import Any

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.errors import PlanError
from surgeon.plan.plan import Plan, identity
from surgeon.transforms.choose import choose_widths
from surgeon.transforms.layers import keep_layers
from surgeon.transforms.narrow import narrow


def prune(
    anatomy: Anatomy,
    *,
    dropped: Sequence[int] = (),
    sizes: Mapping[str, int] | None = None,
    criterion: str = "activation",
    values: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Plan:
    """Return the plan of the model without the layers `dropped`, narrowed to `sizes` (None: as wide as it is).

    Raises PlanError when the model's code cannot express the result.
    """
    kept = [layer for layer in range(anatomy.depth) if layer not in set(dropped)]
    plan = keep_layers(anatomy, kept) if dropped else identity(anatomy.spec, depth=anatomy.depth)
    if sizes is None:
        return plan
    shorter = read_anatomy(plan.result(anatomy.spec))
    stays = choose_widths(shorter, sizes, criterion, values=values, layers=kept, seed=seed)
    return plan.then(narrow(shorter, stays))


def pruned_sizes(anatomy: Anatomy, asked: Mapping[str, int | None]) -> dict[str, int] | None:
    """Return the size of every axis of the result, None where none is asked for.

    Key-value heads follow heads where each head has its own; heads follow key-value heads, whole groups at a time.
    Raises PlanError for an axis that the model does not have.
    """
    if all(size is None for size in asked.values()):
        return None
    anatomy.require_family()
    old = anatomy.sizes
    if asked.get("experts") is not None and "experts" not in old:
        raise PlanError(f"this {anatomy.model_type} has no experts", hint="Leave out --experts.")
    axes = [axis for axis in ("hidden", "ffn", "heads", "kv_heads", "head_dim", "experts") if axis in old]
    new = {axis: old[axis] if (size := asked.get(axis)) is None else size for axis in axes}
    for axis, size in new.items():
        if not 0 < size <= old[axis]:
            raise PlanError(
                f"cannot prune {axis} from {old[axis]} to {size}",
                hint=f"Ask for 1 to {old[axis]}; to grow: surgeon grow.",
            )
    if asked.get("kv_heads") is None and old["group"] == 1:
        new["kv_heads"] = new["heads"]
    elif asked.get("heads") is None and new["kv_heads"] != old["kv_heads"]:
        new["heads"] = new["kv_heads"] * old["group"]
    heads, kv_heads = new["heads"], new["kv_heads"]
    if heads % kv_heads:
        raise PlanError(
            f"{heads} attention heads cannot share {kv_heads} key-value heads",
            hint=f"Attention heads must be a multiple of key-value heads: {-(-heads // kv_heads) * kv_heads}.",
        )
    return new


def resolve_count(
    anatomy: Anatomy, removable: Sequence[Sequence[int]], *, parameters: int | None, nbytes: int | None
) -> int:
    """Return how many layers have to go for the rest to fit a budget of parameters, or of bytes of weights.

    removable[n] are the layers that go when n do. Raises PlanError when no choice is small enough.
    """
    for count, dropped in enumerate(removable):
        spec = anatomy.spec if not dropped else prune(anatomy, dropped=dropped).result(anatomy.spec)
        if (parameters is None or spec.num_parameters <= parameters) and (nbytes is None or spec.nbytes <= nbytes):
            return count
    smallest = prune(anatomy, dropped=removable[-1]).result(anatomy.spec) if removable[-1] else anatomy.spec
    raise PlanError(
        f"without {len(removable) - 1} layers {smallest.num_parameters:,} parameters ({smallest.nbytes:,} bytes) are "
        "left, more than the budget",
        hint="Prune in width too, or ask for more.",
    )
