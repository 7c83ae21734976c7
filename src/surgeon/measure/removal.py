"""The perplexity of a model without each of its layers, and the greedy removal by it.

Sources: Kim et al. 2024 (Shortened LLaMA, arXiv:2402.02834), one layer at a time; SLEB (arXiv:2402.09025), greedily,
round after round.
"""

from torch import Tensor

from surgeon.errors import MeasureError
from surgeon.measure.record import perplexities
from surgeon.measure.scoring import Meter, losses_without
from surgeon.models.streaming import StreamedModel
from surgeon.progress import meter as announced


def one_by_one(model: StreamedModel, tokens: Tensor, *, meter: Meter = announced) -> list[float]:
    """Return the perplexity of the model without layer i, for each i."""
    choices = [frozenset({layer}) for layer in range(model.depth)]
    progress = meter("removing each layer", tokens.numel(), model.depth * (model.depth + 1) // 2 - 1)
    return perplexities(losses_without(model, tokens, choices, progress=progress))


def greedy(
    model: StreamedModel,
    tokens: Tensor,
    count: int,
    *,
    protect: tuple[int, int] = (1, 1),
    meter: Meter = announced,
) -> tuple[list[int], list[float]]:
    """Return `count` layers in the order in which they go, and the perplexity after each removal.

    In every round the layer goes whose removal costs least. The first and last of the layers that are left are
    protected, as many as `protect` says.
    """
    progress = meter("removing layers greedily", tokens.numel(), count * model.depth * (model.depth + 1) // 2)
    most = max(0, min(model.depth - sum(protect), model.depth - 1))
    if count > most:
        raise MeasureError(
            f"cannot remove {count} of {model.depth} layers when the first {protect[0]} and the last {protect[1]} stay",
            hint=f"At most {most} can go; --protect 0,0 protects none.",
        )
    order: list[int] = []
    after: list[float] = []
    for _ in range(count):
        left = [layer for layer in range(model.depth) if layer not in order]
        candidates = left[protect[0] : len(left) - protect[1]]
        choices = [frozenset({*order, layer}) for layer in candidates]
        losses = losses_without(model, tokens, choices, progress=progress)
        best = min(range(len(losses)), key=lambda i: losses[i])
        order.append(candidates[best])
        after += perplexities([losses[best]])
    return order, after
