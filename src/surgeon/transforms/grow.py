"""Grow a model in depth, in width and in experts: one plan out of deepen, widen and to_experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.errors import PlanError
from surgeon.options import OptionError, flag_of
from surgeon.plan.plan import Plan, identity
from surgeon.transforms.deepen import deepen
from surgeon.transforms.experts import to_experts
from surgeon.transforms.layers import planned, resolve_depth
from surgeon.transforms.widen import widen
from surgeon.transforms.widths import Widths, check_experts_size, derived_ffn, plan_widths

Size = int | str | None


@dataclass(frozen=True)
class Growth:
    """A growth and what it is made of: first `deep`, the plan of the deeper model `deeper`, then its new `widths`.

    `widths` is None where only the depth grows.
    """

    anatomy: Anatomy
    plan: Plan
    deep: Plan
    deeper: Anatomy
    widths: Widths | None
    seed: int


def grow(anatomy: Anatomy, **options: Any) -> Plan:
    """Return the plan of the larger model; `options` are those of `growth`, which raises PlanError."""
    return growth(anatomy, **options).plan


def growth(
    anatomy: Anatomy,
    *,
    layers: Size = None,
    depth_method: str = "identity",
    at: Sequence[int] | None = None,
    hidden_size: Size = None,
    intermediate_size: Size = None,
    expert_intermediate_size: Size = None,
    attention_heads: Size = None,
    key_value_heads: Size = None,
    head_dim: Size = None,
    width_method: str = "auto",
    noise: float = 0.5,
    experts: int | None = None,
    experts_per_token: int = 2,
    seed: int = 0,
) -> Growth:
    """Return the growth to the larger model. A size is a number or "2x".

    A size that is not given stays, or follows another: heads follow a hidden size where the family derives one from the
    other, and key-value heads follow heads. With `experts`, each MLP of the larger model becomes that many experts.

    Raises PlanError when the family's code cannot express the result.
    """
    plan = identity(anatomy.spec, depth=anatomy.depth)
    if layers is None and at is not None:
        hint = "Add --layers, such as 2x."
        raise OptionError("at", "--at gives places for new layers, and --layers no number of them", hint=hint)
    if layers is not None:
        plan = plan.then(deepen(anatomy, grown_depth(layers, anatomy.depth), method=depth_method, at=at))
    deep, deeper, widths = plan, planned(anatomy, plan), None
    requested = {
        "hidden": hidden_size,
        "ffn": intermediate_size,
        "expert_ffn": expert_intermediate_size,
        "heads": attention_heads,
        "kv_heads": key_value_heads,
        "head_dim": head_dim,
    }
    if any(size is not None for size in requested.values()):
        widths = _widths(deeper, requested, width_method, noise)
        plan = plan.then(widen(deeper, widths, noise=noise, advanced=width_method == "advanced", seed=seed))
    elif layers is None and experts is None:
        raise OptionError(
            "",
            "nothing to grow",
            hint="Give --layers, --hidden-size, --intermediate-size, --attention-heads or --experts.",
        )
    if experts is not None:
        wider = planned(anatomy, plan)
        plan = plan.then(to_experts(wider, experts, per_token=experts_per_token, seed=seed))
    elif experts_per_token != 2:
        hint = "Add --experts, such as --experts 8."
        raise OptionError("experts_per_token", "--experts-per-token has no effect without --experts", hint=hint)
    options = {"layers": layers, "depth_method": depth_method, "at": None if at is None else list(at)} | {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "expert_intermediate_size": expert_intermediate_size,
        "attention_heads": attention_heads,
        "key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "width_method": width_method,
        "noise": noise,
        "experts": experts,
        "experts_per_token": None if experts is None else experts_per_token,
        "seed": seed,
    }
    plan = replace(plan, steps=({"grow": {key: value for key, value in options.items() if value is not None}},))
    return Growth(anatomy, plan, deep, deeper, widths, seed)


def grown_size(request: int | str, size: int, name: str) -> int:
    """Return the new size of an axis: `request` itself, or "2x" of `size`. Raises PlanError unless it is larger."""
    text = str(request).strip().lower()
    number = text.removesuffix("x")
    if not (number.isascii() and number.isdigit() and len(number) < 10):
        raise PlanError(f"cannot read {request!r} as a size of {name}", hint="Write 768, or 2x.")
    new = int(number) * (1 if number == text else size)
    if new < size:
        raise PlanError(f"cannot grow {name} from {size} to {new}", hint="Growing only makes larger.")
    return new


def check_size(request: int | str, option: str) -> None:
    """Raises OptionError for what is no size of any axis: neither a number nor a multiple."""
    try:
        grown_size(request, 0, flag_of(option))
    except PlanError as error:
        raise OptionError(option, str(error), hint=error.hint) from error


def grown_depth(layers: int | str, depth: int) -> int:
    """Return a number of layers: `layers` itself, "2x" or "150%" of `depth`, or with "+2" two more than `depth`."""
    text = str(layers).strip()
    if text.startswith("+"):
        added = text.removeprefix("+")
        if not (added.isascii() and added.isdigit() and 0 < len(added) < 10 and int(added)):
            hint = "Write 12, 2x, 150% or +2."
            raise OptionError("layers", f"cannot read {layers!r} as a number of layers", hint=hint)
        return depth + int(added)
    return grown_size(text, depth, "layers") if text.endswith("x") else resolve_depth(text, depth)


def _widths(anatomy: Anatomy, requested: dict[str, Size], method: str, noise: float) -> Widths:
    if not 0 <= noise <= 1:
        raise OptionError(
            "noise",
            f"--noise {noise} is not from 0 to 1: above, the rounding that tells copies apart grows with each layer",
            hint="Write 0.5, or 0 for none.",
        )
    anatomy.require_family(partial=True)
    if requested["expert_ffn"] is None:
        requested = {axis: size for axis, size in requested.items() if axis != "expert_ffn"}
    else:
        check_experts_size(anatomy)
    old = anatomy.sizes
    new = {axis: old[axis] if size is None else grown_size(size, old[axis], axis) for axis, size in requested.items()}
    if (follows := derived_ffn(anatomy, new)) is not None and requested["ffn"] is None:
        new["ffn"] = follows
    if anatomy.is_square and requested["heads"] is None:
        if "heads" in anatomy.frozen and requested["head_dim"] is None and new["hidden"] % new["heads"] == 0:
            new["head_dim"] = new["hidden"] // new["heads"]
        elif new["hidden"] % new["head_dim"] == 0:
            new["heads"] = max(new["heads"], new["hidden"] // new["head_dim"])
    if requested["kv_heads"] is None and new["heads"] != old["heads"]:
        keeps_group = old["kv_heads"] > 1 and new["heads"] % old["group"] == 0
        new["kv_heads"] = new["heads"] // old["group"] if keeps_group else old["kv_heads"]
    elif requested["heads"] is None and old["group"] == 1:
        new["heads"] = max(new["heads"], new["kv_heads"])
    return plan_widths(anatomy, method=method, **new)
