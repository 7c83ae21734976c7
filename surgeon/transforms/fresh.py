"""Tensors as a family initialises them, for a surgery that draws them anew."""

import math

from surgeon.anatomy.anatomy import Anatomy
from surgeon.errors import PlanError
from surgeon.plan.plan import FLOAT_DTYPES, Constant, Expr, Normal


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
    if row.kind == "gain":
        return Constant(spec, family.init_gain)
    if row.kind in ("bias", "shift"):
        return Constant(spec, 0.0)
    std = initial_std(anatomy)
    if name.endswith(family.residual_init):
        std /= math.sqrt(2 * layers)
    return Normal(spec, std, seed, name)


def initial_std(anatomy: Anatomy) -> float:
    """Return the standard deviation of fresh weights: the config's, or transformers' usual 0.02."""
    return float(anatomy.spec.config.get(anatomy.require_family().init_std) or 0.02)
