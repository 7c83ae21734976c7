"""Tasks that put one record in a row, and the training step of those whose loss is not that of a language model."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor

from surgeon.models.split import Batch, Plan, Plans
from surgeon.train.task import Task

# From a model, its own forward pass and the plan of a batch to a sum of losses and its count.
RowLoss = Callable[[Any, Callable[..., Any], Plan], tuple[Tensor, Tensor]]


class RowTask(Task):
    """Records with the special tokens that the tokenizer puts around a text, each in a row of its own."""

    def may_share_rows(self, attention: str) -> bool:
        """Return that each record has a row of its own."""
        return False

    @property
    def reads_lengths(self) -> bool:
        """False: padding is masked."""
        return False


def attach_row_loss(model: Any, loss: RowLoss, plan: Callable[[Batch], Plan]) -> None:
    """Make a model's forward pass return `loss` of rows with labels; of others, what it returned before.

    `plan` makes of a batch what the loss reads: its input_ids, labels and position_ids are of shape (B, S).
    """
    model.__dict__["_surgeon_row_loss"] = loss  # no part of the model: what it holds is not trained
    model.__dict__["_surgeon_plan"] = Plans(plan)
    model.forward = MethodType(_forward, model)


def _forward(
    model: Any,
    input_ids: Tensor,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_items: Tensor | float | None = None,
    token_index: Tensor | None = None,
    trained: Tensor | None = None,
    plan: Plan | None = None,
    taught: bool = True,
    **options: Any,
) -> Any:
    own = MethodType(type(model).forward, model)
    if labels is None:
        return own(input_ids=input_ids, **options)
    assert position_ids is not None, "positions tell padding from a text"
    batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    plan = (plan or model.__dict__["_surgeon_plan"](batch))["layout"]
    loss, count = model.__dict__["_surgeon_row_loss"](model, own, plan)
    return {
        "loss": loss / (count.clamp(min=1) if num_items is None else num_items),
        "cross_entropy": loss.detach(),
        "num_tokens": count,
    }
