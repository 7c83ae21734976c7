"""Which neurons of a layer's experts a dense layer keeps, and the mean gate of each expert: by their use on a text.

A neuron counts by what it adds to the state: the root of its mean square over all tokens, times its gate (0 where the
router did not choose its expert), times the norm of its column of the output map.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.anatomy.anatomy import Anatomy
from surgeon.measure.activations import Watcher
from surgeon.measure.scoring import observe
from surgeon.models.device import wide
from surgeon.models.experts import Experts, experts_in
from surgeon.models.streaming import Progress, StreamedModel
from surgeon.processes import summed
from surgeon.transforms.dense import HINT, DenseForm, Mixture, dense_forms


def mixtures(
    model: StreamedModel, tokens: Tensor, width: int, *, real: Tensor | None = None, progress: Progress | None = None
) -> dict[int, Mixture]:
    """Return the `width` neurons to keep of each layer that has experts, by one streamed pass over rows, (R, T).

    Raises PlanError where the model can have no dense layers in place of those with experts.
    """
    watcher = Mixing(model.anatomy)
    observe(model, tokens, watchers=[watcher], real=real, progress=progress)
    return watcher.mixtures(width)


class Mixing(Watcher):
    """Sums gates, and squares of neurons times their gates, of each expert of each layer."""

    def __init__(self, anatomy: Anatomy) -> None:
        forms = dense_forms(anatomy)
        self._last: DenseForm = next(form for form in forms.values() if form.is_output)
        self._sizes = anatomy.sizes["experts"], anatomy.sizes.get("expert_ffn") or anatomy.sizes["ffn"]
        shared = anatomy.sizes.get("shared", 0) if self._last.shared else 0
        self._num_shared = shared * self._sizes[1]
        self._gates: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}  # of the experts' neurons, one after the other, then the shared ones
        self._norms: dict[int, Tensor] = {}
        self._counts: dict[int, int] = {}

    @contextmanager
    def watch(self, layer: int, module: nn.Module) -> Iterator[None]:
        """Return a context in which a layer's experts, if it has any, are counted."""
        if experts_in(module) is None:
            yield
            return
        experts, (count, width) = Experts(module, f"layer {layer}", is_transposed=False, hint=HINT), self._sizes
        self._gates[layer] = torch.zeros(count, dtype=torch.float64)
        self._squares[layer] = torch.zeros(count * width + self._num_shared, dtype=torch.float64)
        self._counts[layer] = 0
        columns = [experts.columns(expert).float().norm(dim=-1) for expert in range(count)]

        def forward(hidden: Tensor, chosen: Tensor, gates: Tensor, *rest: Any) -> Tensor:
            self._count(layer, experts, hidden, chosen, gates)
            return experts.forward(hidden, chosen, gates, *rest)

        with ExitStack() as stack:
            stack.enter_context(experts.answering(forward))
            if self._num_shared:
                last = module.get_submodule(self._last.shared.rpartition(".")[0])
                assert isinstance(last.weight, Tensor)
                columns.append(last.weight.float().norm(dim=0))
                stack.callback(last.register_forward_pre_hook(self._count_shared(layer)).remove)
            self._norms[layer] = torch.cat(columns).cpu().double()
            yield

    def mixtures(self, width: int) -> dict[int, Mixture]:
        """Return the neurons that count most, of each layer, in the order of experts, and the mean gates."""
        (count, size), found = self._sizes, {}
        for layer, squares in self._squares.items():
            tokens = float(summed(torch.tensor(float(self._counts[layer]), dtype=torch.float64)))
            gates = summed(self._gates[layer]) / tokens
            scores = (summed(squares) / tokens).sqrt() * self._norms[layer]
            kept = sorted(scores.sort(descending=True, stable=True).indices[:width].tolist())
            inside = count * size
            neurons = tuple((i // size, i % size) if i < inside else (count, i - inside) for i in kept)
            found[layer] = Mixture(neurons, tuple(gates.tolist()))
        return found

    def _count(self, layer: int, experts: Experts, hidden: Tensor, chosen: Tensor, gates: Tensor) -> None:
        count, width = self._sizes
        real = None if self.batch is None or self.batch.real is None else self.batch.real.flatten()
        self._counts[layer] += len(hidden) if real is None else int(real.sum())
        for expert in range(count):
            is_its = chosen == expert if real is None else (chosen == expert) & real[:, None]
            places = is_its.any(-1).nonzero()[:, 0]
            if not len(places):
                continue
            share = torch.where(is_its, gates, 0).sum(-1)[places].float()
            self._gates[layer][expert] += float(wide(share).sum())
            squares = (share[:, None] * experts.neurons(expert, hidden[places])).square().sum(0)
            self._squares[layer][expert * width : (expert + 1) * width] += wide(squares).cpu()

    def _count_shared(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            neurons = args[0].flatten(0, -2).float()
            if self.batch is not None and self.batch.real is not None:
                neurons = neurons[self.batch.real.flatten()]
            self._squares[layer][-self._num_shared :] += wide(neurons.square().sum(0)).cpu()

        return hook
