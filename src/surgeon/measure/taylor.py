"""The Taylor estimate of the cost of removing a layer: Σ |w · g| over its weights.

Source: Kim et al. 2024 (Shortened LLaMA, arXiv:2402.02834): the first order of the change of the loss when weights
become zero, with gradients summed over the calibration text before the absolute value is taken.
"""

import torch
from torch import Tensor

from surgeon.measure.scoring import Meter, losses_of, targets_of
from surgeon.models.device import wide
from surgeon.models.passage import Batch
from surgeon.models.streaming import StreamedModel
from surgeon.processes import own_rows, summed
from surgeon.progress import meter as announced


def taylor(model: StreamedModel, tokens: Tensor, *, meter: Meter = announced) -> list[float]:
    """Return Σ |w · ∂loss/∂w| of each layer, over all its weights; the loss is the mean over the next tokens.

    Runs forward and then backward through the layers, each of which is read twice. In memory are the states before
    every layer, one layer and its gradients.
    """
    progress = meter("gradients", tokens.numel(), 3 * model.depth)
    model.check_predicts()
    tokens = tokens[own_rows(len(tokens))]
    batches = model.embed(tokens)
    inputs: list[list[Tensor]] = [[batch.hidden for batch in batches]]
    with torch.no_grad():
        for index in range(model.depth):
            with model.layer(index) as apply:
                inputs.append([apply(batch, state) for batch, state in zip(batches, inputs[-1], strict=True)])
                if progress:
                    progress(tokens.numel())
    gradients = _gradients_of_loss(model, batches, inputs.pop())
    scores = [0.0] * model.depth
    for index in reversed(range(model.depth)):
        with model.layer(index) as apply:
            parameters = [p for p in model.module(index).parameters() if p.is_floating_point()]
            for parameter in parameters:
                parameter.requires_grad_(True)
            states = inputs.pop()
            for number, batch in enumerate(batches):
                state = states[number].detach().requires_grad_(True)
                torch.autograd.backward(apply(batch, state), gradients[number])
                assert state.grad is not None, "every layer passes its input on"
                gradients[number] = state.grad
            scores[index] = sum(
                float(wide((p.detach() * summed(p.grad)).abs()).sum()) for p in parameters if p.grad is not None
            )
            for parameter in parameters:
                parameter.grad = None
                parameter.requires_grad_(False)
            if progress:
                progress(2 * tokens.numel())
    return scores


def _gradients_of_loss(model: StreamedModel, batches: list[Batch], states: list[Tensor]) -> list[Tensor]:
    """Return the gradient of the mean loss with respect to the final states of each batch."""
    count = int(summed(sum(targets_of(batch)[1].sum().cpu() for batch in batches)))  # type: ignore[arg-type]
    gradients = []
    with model.head() as head:
        for batch, state in zip(batches, states, strict=True):
            leaf = state.detach().requires_grad_(True)
            for loss, _ in losses_of(head, batch, leaf):
                torch.autograd.backward(loss / count, retain_graph=True)  # losses share the selection of states
            assert leaf.grad is not None, "rows have at least two tokens"
            gradients.append(leaf.grad)
    return gradients
