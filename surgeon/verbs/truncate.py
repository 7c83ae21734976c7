"""The verb `truncate`: keep the first layers of a model."""

import os
from collections.abc import Collection
from dataclasses import replace

from surgeon.surgery import Surgery, open_model
from surgeon.transforms.layers import truncate as plan_truncate


def truncate(
    model: "str | os.PathLike[str] | Surgery",
    *,
    layers: int | str,
    inherit: Collection[str] | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> Surgery:
    """Return the surgery that keeps the first `layers` layers of `model` ("50%" counts from its depth).

    `model` is a checkpoint directory, a Hub id, or a surgery to continue. With `inherit`, only these parts
    ("attention", "mlp", "norm", "embedding") keep their weights; the rest is drawn anew from `seed`.

    Raises PlanError when the model has fewer layers or cannot be cut.

        surgeon.truncate("gpt2-large", layers=6).save("gpt2-large-6")
    """
    begun = open_model(model, revision=revision)
    return replace(begun, plan=begun.plan.then(plan_truncate(begun.anatomy, layers, inherit=inherit, seed=seed)))
