"""The verbs that plan a surgery: each opens its model, plans with the transform of its name, and reads no weights."""

import os
from collections.abc import Sequence
from dataclasses import replace

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.derived import DONOR, JoinedSource
from surgeon.checkpoint.source import open_source, spec_of
from surgeon.errors import PlanError
from surgeon.plan.plan import Read
from surgeon.surgery import Surgery, open_model
from surgeon.transforms.deepen import donate
from surgeon.transforms.grow import grow as plan_grow
from surgeon.transforms.grow import grown_depth


def grow(
    model: "str | os.PathLike[str] | Surgery",
    *,
    layers: int | str | None = None,
    depth_method: str = "identity",
    at: Sequence[int] | None = None,
    donor: str | os.PathLike[str] | None = None,
    hidden_size: int | str | None = None,
    intermediate_size: int | str | None = None,
    attention_heads: int | str | None = None,
    key_value_heads: int | str | None = None,
    head_dim: int | str | None = None,
    width_method: str = "auto",
    noise: float = 0.5,
    experts: int | None = None,
    experts_per_token: int = 2,
    seed: int = 0,
    revision: str | None = None,
) -> Surgery:
    """Return the surgery that makes `model` deeper and wider, with its function kept unless a method says otherwise.

    A size is a number or "2x". With a `donor`, its next layers are appended instead of copies (Inheritune's growth).
    With `experts`, every MLP becomes that many equal experts, and a token takes `experts_per_token` of them.

    Raises PlanError when the family's code cannot express the result.

        surgeon.grow("gpt2", hidden_size="2x", layers=16).save("gpt2-grown")
    """
    begun = open_model(model, revision=revision)
    options = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "attention_heads": attention_heads,
        "key_value_heads": key_value_heads,
        "head_dim": head_dim,
    }
    if donor is None:
        plan = plan_grow(
            begun.anatomy,
            layers=layers,
            depth_method=depth_method,
            at=at,
            width_method=width_method,
            noise=noise,
            experts=experts,
            experts_per_token=experts_per_token,
            seed=seed,
            **options,
        )
        return replace(begun, plan=begun.plan.then(plan))
    others = (experts, at, *options.values())
    if layers is None or depth_method != "identity" or any(option is not None for option in others):
        raise PlanError("a donor gives layers, nothing else", hint="Give --layers with --donor; grow more afterwards.")
    if isinstance(begun.source, JoinedSource):
        raise PlanError("this surgery has a donor already", hint="Save it, and grow what was saved.")
    given = open_source(donor)
    anatomy = begun.anatomy
    plan = donate(anatomy, read_anatomy(spec_of(given)), grown_depth(layers, anatomy.depth), DONOR)
    offered = {DONOR + name: Read(DONOR + name) for name in given.tensors}
    passed = replace(begun.plan, tensors={**begun.plan.tensors, **offered})
    step = {"grow": {"layers": layers, "donor": os.fspath(donor)}}
    return replace(begun, source=JoinedSource(begun.source, given), plan=passed.then(replace(plan, steps=(step,))))
