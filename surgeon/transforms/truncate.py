"""Keep the first layers of a model (Inheritune, arXiv:2404.08634), whole or only some of their parts."""

from collections.abc import Collection
from dataclasses import replace

from surgeon.anatomy.anatomy import Anatomy
from surgeon.errors import PlanError
from surgeon.plan.expressions import Read
from surgeon.plan.plan import Plan
from surgeon.transforms.fresh import fresh
from surgeon.transforms.layers import keep_layers, resolve_depth

PARTS = ("attention", "mlp", "norm", "embedding")


def truncate(anatomy: Anatomy, layers: int | str, *, inherit: Collection[str] | None = None, seed: int = 0) -> Plan:
    """Return the plan that keeps the first `layers` layers ("50%" counts from the source's depth), and the rest whole.

    With `inherit`, only these parts keep their weights and the others are drawn as the family does: the ablation of
    Inheritune, section 4. "embedding" is the token and position embeddings and the head, "norm" every norm, the
    final one included.

    Raises PlanError when there are not so many layers, or when the model cannot be cut.
    """
    count = resolve_depth(layers, anatomy.depth)
    if count > anatomy.depth:
        raise PlanError(
            f"cannot truncate to {count} layers: the model has {anatomy.depth}",
            hint="--layers is the depth of the result.",
        )
    plan = keep_layers(anatomy, range(count))
    step: dict[str, object] = {"layers": count, "seed": seed}
    if inherit is not None:
        plan = _inherit(plan, anatomy, inherit, seed)
        step["inherit"] = sorted(inherit)
    return replace(plan, steps=({"truncate": step},))


def _inherit(plan: Plan, anatomy: Anatomy, parts: Collection[str], seed: int) -> Plan:
    if unknown := sorted(set(parts) - set(PARTS)):
        raise PlanError(f"unknown part {unknown[0]!r}", hint=f"Parts: {', '.join(PARTS)}.")
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
