"""The objective of training, put into the model's forward pass, which then returns the loss; logits never exist whole.

The forward pass of the instance is replaced, not wrapped, because DDP, FSDP, DeepSpeed and PEFT call that one, with
their hooks around it. Hooks around the head fire too: the loss is computed within the head's call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import PlanError
from surgeon.models.split import (
    AttentionLayout,
    Causal,
    Plan,
    Plans,
    SplitModel,
    check_layout,
    stubbed,
    taken,
)
from surgeon.train.losses import Direction, chunk_rows, chunked, hidden_loss, linear_cross_entropy, sum_dtype
from surgeon.train.settings import Settings
from surgeon.train.store import IGNORED
from surgeon.train.teacher import Teacher


@dataclass(frozen=True)
class Objective:
    """The minimised loss: (1 - kd_weight) · cross-entropy + kd_weight · divergence + hidden_weight · states' error.

    `layer_map` has for each layer the layer of the teacher that it is compared with, or None; the states' error is the
    mean over the compared layers. Without a map a teacher of the same depth is compared layer by layer.
    """

    kd_weight: float = 0.0
    temperature: float = 1.0
    direction: Direction = "forward"
    hidden_weight: float = 0.0
    layer_map: tuple[int | None, ...] | None = None

    @classmethod
    def of(cls, settings: Settings, *, kd_weight: float, layer_map: Sequence[int | None] | None) -> "Objective":
        """Return the objective of a run: the task gives the teacher's weight, the surgery's receipt the layer map."""
        return cls(
            kd_weight=kd_weight,
            temperature=settings.temperature,
            direction="forward" if settings.kl == "forward" else "reverse",
            hidden_weight=settings.hidden_weight,
            layer_map=None if layer_map is None else tuple(layer_map),
        )

    def __post_init__(self) -> None:
        if not 0 <= self.kd_weight <= 1:
            raise PlanError(f"the teacher's weight is {self.kd_weight}", hint="It is between 0 and 1.")
        if not self.temperature > 0:
            raise PlanError(f"the temperature is {self.temperature}", hint="It is above 0; 1 is neutral, 2 is softer.")
        if not self.hidden_weight >= 0:
            raise PlanError(f"the weight of hidden states is {self.hidden_weight}", hint="It is 0 or more.")
        if self.direction not in ("forward", "reverse"):
            raise PlanError(f"there is no direction {self.direction!r}", hint="It is forward or reverse.")


@dataclass(frozen=True, eq=False)
class _Attached:
    """The loss of a model and its parts. `pairs` are the layers to compare: the student's, and the teacher's."""

    split: SplitModel
    objective: Objective
    teacher: Teacher | None
    layout: AttentionLayout
    pairs: Sequence[tuple[int, int]]

    def untaught(self) -> "_Attached":
        """Return the cross-entropy alone."""
        return self if self.teacher is None else replace(self, objective=Objective(), teacher=None, pairs=())


def attach_loss(
    model: Any, objective: Objective, teacher: Teacher | None = None, *, layout: AttentionLayout | None = None
) -> None:
    """Make `model(input_ids=..., labels=..., position_ids=..., num_items=..., token_index=...)` return its loss.

    `labels` are already shifted, -100 where nothing is trained. `trained` are the places of all others, counted along
    the rows, and `plan` is what `Plans` made of the batch; without them both are made here, which waits for a GPU.
    `taught` false asks for the cross-entropy alone. The result is a dict: `loss`, the sum over trained tokens divided
    by `num_items` (None: by their number), and without gradients the sums `cross_entropy`, `kl` and `hidden`, where
    they exist, and `num_tokens`. Without labels the model works as before. `layout` says which tokens each token sees,
    by default the earlier ones of its document.
    Raises PlanError where model, teacher and objective do not fit each other.
    """
    detach_loss(model)
    split, layout = SplitModel(model), layout or Causal()
    check_layout(layout, split)
    pairs = _check(split, objective, teacher)
    taught = teacher if teacher is not None and (objective.kd_weight or pairs) else None
    model._surgeon_loss = _Attached(split, objective, taught, layout, pairs)
    model._surgeon_plan = Plans(layout.plan, None if taught is None else taught.plan)
    model.forward = MethodType(_forward, model)  # a bound method, so that a deep copy of the model binds it to the copy


def detach_loss(model: Any) -> None:
    """Restore the model's own forward pass."""
    if "_surgeon_loss" in model.__dict__:
        del model._surgeon_loss, model._surgeon_plan, model.forward


def _check(split: SplitModel, objective: Objective, teacher: Teacher | None) -> list[tuple[int, int]]:
    """Return the pairs of layers to compare. Raises PlanError where the teacher does not fit."""
    if teacher is None:
        if objective.kd_weight or objective.hidden_weight:
            raise PlanError("there is no teacher to learn from", hint="Name one with --teacher MODEL.")
        return []
    if objective.kd_weight:
        if teacher.vocab != split.vocab:
            raise PlanError(
                f"the teacher gives logits of {teacher.vocab} tokens, the model of {split.vocab}",
                hint="Distil from a model with the same tokenizer and the same number of rows in its head.",
            )
        if teacher.temperature not in (None, objective.temperature):
            raise PlanError(
                f"{teacher.name} holds a teacher's answers at temperature {teacher.temperature:g}, "
                f"not {objective.temperature:g}",
                hint="Remove it; the answers are then computed again.",
            )
    if not objective.hidden_weight:
        return []
    if teacher.hidden_size != split.hidden_size:
        width = "none" if teacher.hidden_size is None else f"states of width {teacher.hidden_size}"
        raise PlanError(
            f"hidden states are compared in one width: the model has {split.hidden_size}, its teacher {width}",
            hint="Leave out --hidden-weight.",
        )
    layer_map = objective.layer_map
    if layer_map is None and teacher.depth == split.depth:
        layer_map = tuple(range(split.depth))
    if layer_map is None or len(layer_map) != split.depth:
        fault = "there is none" if layer_map is None else f"it has {len(layer_map)} entries"
        raise PlanError(
            f"a layer map must name a teacher's layer for each of {split.depth} layers, and {fault}",
            hint="A checkpoint that surgeon cut has one in its surgeon.json.",
        )
    pairs = [(layer, other) for layer, other in enumerate(layer_map) if other is not None]
    if missing := [other for _, other in pairs if not 0 <= other < teacher.depth]:
        raise PlanError(
            f"the layer map names layers {missing} of a teacher with {teacher.depth}",
            hint="The teacher must be the model that the map counts from.",
        )
    if not pairs:
        raise PlanError("the layer map leads to no layer of the teacher", hint="Leave out --hidden-weight.")
    return pairs


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
    attached: _Attached = model._surgeon_loss if taught else model._surgeon_loss.untaught()
    split, objective, teacher = attached.split, attached.objective, attached.teacher
    options = {name: value for name, value in options.items() if value is not None}  # wrappers pass None
    if labels is None:
        placed = {} if position_ids is None else {"position_ids": position_ids}
        return split.own_forward(input_ids=input_ids, **placed, **options)
    if trained is None:
        trained = (labels != IGNORED).flatten().nonzero()[:, 0]
    plan = plan or {}
    with split.watched([layer for layer, _ in attached.pairs]) as layers:
        hidden = attached.layout.states(split, input_ids, position_ids, trained, plan=plan.get("layout"), **options)
    states, targets = taken(hidden, trained), taken(labels, trained)
    answers: tuple[Tensor, ...] = ()
    if teacher is not None:
        answers, teacher_layers = teacher.see(
            input_ids,
            position_ids,
            token_index,
            trained,
            layers=[other for _, other in attached.pairs],
            plan=plan.get("teacher"),
            **options,
        )
    with attached.layout.reading(split.model):
        loss, parts = _head_loss(attached, states, targets, answers)
    if attached.pairs:
        errors = [hidden_loss(taken(layers[layer], trained), teacher_layers[other]) for layer, other in attached.pairs]
        error = torch.stack(errors).sum() / len(errors)
        loss, parts["hidden"] = loss + objective.hidden_weight * error, error.detach()
    count = torch.full((), len(targets), dtype=torch.long, device=loss.device)
    return {"loss": loss / (count.clamp(min=1) if num_items is None else num_items), **parts, "num_tokens": count}


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it computes gradients by itself
def _head_loss(
    attached: _Attached, states: Tensor, targets: Tensor, answers: tuple[Tensor, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss after the head, a sum over tokens, and its parts without gradients."""
    split, objective, teacher = attached.split, attached.objective, attached.teacher
    head = split.linear_head
    chunk = chunk_rows(split.vocab, states.device, models=2 if objective.kd_weight else 1)
    if head is not None and not objective.kd_weight:

        def whole(hidden: Tensor) -> Tensor:
            return linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, chunk=chunk)

        loss = _within(head, whole, states)
        return loss, {"cross_entropy": loss.detach()}

    def of_chunk(
        logits_of: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, *seen: Tensor
    ) -> tuple[Tensor, ...]:
        logits = logits_of(hidden)
        logits = logits.to(sum_dtype(logits.dtype))
        if not objective.kd_weight:
            entropy = nn.functional.cross_entropy(logits, labels, reduction="sum")
            return entropy, entropy
        assert teacher is not None  # its divergence comes first: of all, its product takes the most memory at once
        divergence = teacher.divergence(logits, *seen, temperature=objective.temperature, direction=objective.direction)
        entropy = nn.functional.cross_entropy(logits, labels, reduction="sum")
        loss = (1 - objective.kd_weight) * entropy + objective.kd_weight * divergence
        return loss, entropy, divergence

    if head is None:
        parameters = split.head_parameters()
        sums = chunked(lambda *args: of_chunk(split.logits, *args), states, parameters, targets, *answers, chunk=chunk)
    else:

        def in_chunks(hidden: Tensor) -> tuple[Tensor, ...]:
            weights = [head.weight] if head.bias is None else [head.weight, head.bias]

            def logits_of(rows: Tensor) -> Tensor:
                return nn.functional.linear(rows, head.weight, head.bias)

            return chunked(lambda *args: of_chunk(logits_of, *args), hidden, weights, targets, *answers, chunk=chunk)

        sums = _within(head, in_chunks, states)
    return sums[0], dict(zip(("cross_entropy", "kl"), sums[1:], strict=False))


def _within(head: nn.Module, function: Callable[[Tensor], Any], states: Tensor) -> Any:
    """Return a function of the states, called as the head, so that FSDP gathers the head's weights for it."""
    with stubbed(head, function):
        return head(states)
