"""A new model: every tensor is drawn as transformers draws it, and none is read."""

from collections.abc import Mapping
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.errors import PlanError
from surgeon.plan.plan import Plan, identity
from surgeon.transforms.layers import fresh


def initialise(anatomy: Anatomy, step: Mapping[str, Any], *, seed: int) -> Plan:
    """Return the plan that draws every tensor of a model with `seed`; `step` are the options that it was asked with.

    Raises PlanError for a model type without a table, and for a tensor whose first values no table says.
    """
    anatomy.require_family()
    if opaque := next(
        (name for name in anatomy.spec.tensors if anatomy.row(name)[0].kind in ("opaque", "buffer")), None
    ):
        raise PlanError(
            f"no table says how {opaque!r} of {anatomy.model_type} is drawn",
            hint="Begin with the language model alone: its type, or the text_config of its config.json.",
        )
    tensors = {name: fresh(anatomy, name, seed=seed, layers=anatomy.depth) for name in anatomy.spec.tensors}
    note = f"{len(tensors)} tensors were drawn with seed {seed}; nothing is trained"
    config = identity(anatomy.spec, depth=anatomy.depth).config
    return Plan(config, tensors, (None,) * anatomy.depth, steps=({"init": dict(step)},), notes=(note,))
