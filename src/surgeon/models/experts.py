"""The experts of a layer whose weights are in memory: what reaches them, their neurons, and their output maps."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgeon.errors import MeasureError

LAST, LAST_BIAS = "down_proj", "down_proj_bias"  # what transformers calls the output maps of all experts together


class Routed(NamedTuple):
    """What a call of the experts is given: states, (N, D), and of each K chosen experts and their gates, (N, K)."""

    hidden: Tensor
    chosen: Tensor
    gates: Tensor


def experts_in(layer: nn.Module) -> nn.Module | None:
    """Return the part of a layer that holds its experts, None where it has none."""
    return next((part for name, part in layer.named_modules() if name.rpartition(".")[2] == "experts"), None)


class Experts:
    """The experts of a layer. Raises MeasureError, with this hint, where transformers keeps them in another form.

    `is_transposed` says that an output map is kept as (neurons, hidden).
    """

    def __init__(self, layer: nn.Module, label: str, *, is_transposed: bool, hint: str) -> None:
        found = experts_in(layer)
        if found is None or LAST not in found._parameters or len(inspect.signature(found.forward).parameters) < 3:
            raise MeasureError(f"the experts of {label} are in a form of transformers that is not known", hint=hint)
        self.module: nn.Module = found
        self.forward: Callable[..., Tensor] = found.forward  # also while others answer for them
        self.is_transposed = is_transposed

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def maps(self) -> Tensor:
        """The output maps of all experts, in the form of transformers."""
        parameter = self.module._parameters[LAST]
        assert parameter is not None, "looked for at the beginning"
        return parameter

    @property
    def biases(self) -> Tensor | None:
        """The biases of the output maps, (E, D), None where there are none."""
        return self.module._parameters.get(LAST_BIAS)

    def columns(self, expert: int) -> Tensor:
        """Return a copy of an expert's output map, (neurons, hidden), and below it its bias where there is one."""
        stored = self.maps[expert]
        columns = stored if self.is_transposed else stored.T
        return columns.clone() if self.biases is None else torch.cat([columns, self.biases[expert][None]])

    def put(self, expert: int, columns: Tensor) -> None:
        """Make this the output map of an expert, given as `columns` returns it."""
        weight = columns if self.biases is None else columns[:-1]
        self.maps.data[expert] = (weight if self.is_transposed else weight.T).to(self.maps.dtype)
        if self.biases is not None:
            self.biases.data[expert] = columns[-1].to(self.biases.dtype)

    @contextmanager
    def answering(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Return a context in which the experts are called through `forward`."""
        self.module.forward = forward
        try:
            yield
        finally:
            del self.module.forward

    @contextmanager
    def seen(self) -> Iterator[list[Routed]]:
        """Return a context whose list holds what each call of the experts was given."""
        calls: list[Routed] = []

        def forward(hidden: Tensor, chosen: Tensor, gates: Tensor, *rest: Any) -> Tensor:
            calls.append(Routed(hidden, chosen, gates))
            return self.forward(hidden, chosen, gates, *rest)

        with self.answering(forward):
            yield calls

    def neurons(self, expert: int, hidden: Tensor) -> Tensor:
        """Return what the output map of an expert reads, (N, P), in float32, for states (N, D) that reach the expert.

        The experts compute it themselves, with an output map that picks one neuron after the other.
        """
        chosen = torch.full((len(hidden), 1), expert, device=hidden.device)
        gates = torch.ones_like(chosen, dtype=hidden.dtype)
        kept = self.columns(expert)
        width, size = hidden.shape[-1], len(kept) - (self.biases is not None)
        parts = []
        try:
            for at in range(0, size, width):
                picking, count = torch.zeros_like(kept), min(width, size - at)
                picking[range(at, at + count), range(count)] = 1
                self.put(expert, picking)
                parts.append(self.forward(hidden, chosen, gates)[:, :count].float())
        finally:
            self.put(expert, kept)
        return torch.cat(parts, dim=-1)
