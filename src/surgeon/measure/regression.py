"""Gram matrices of the inputs of a model's linear maps on a text, layer by layer, with one layer in memory.

For RegMean (arXiv:2212.09849) each model's states come out of its own layers; for RegMean++ (arXiv:2508.03121) out of
the layers that are merged already. No padding and no weighting: every token of the rows counts once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.measure.compensation import States
from surgeon.models.streaming import Progress, StreamedModel


@dataclass
class Reading:
    """A model and its text, tokens (R, T); `maps` are the weights whose inputs are summed, each with its bias."""

    model: StreamedModel
    tokens: Tensor
    maps: Mapping[str, str | None]


def grams_of(reading: Reading, *, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the Gram matrix of each map's inputs, in float64, from the first layer to the last."""
    model = reading.model
    with torch.no_grad():
        batches = model.embed(reading.tokens)
        states = States.of(batches)
        for layer in range(model.depth):
            with model.layer(layer) as apply, _watched(reading, layer) as sums:
                states.move(apply, batches, progress)
            yield from ((name, each / reading.tokens.numel()) for name, each in sums.items())


def grams_in_turn(
    readings: Sequence[Reading | None],
    begun: StreamedModel,
    merged: Callable[[int, Mapping[tuple[int, str], Tensor]], StreamedModel],
    *,
    progress: Progress | None = None,
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield the number of a model, a map and its Gram matrix, with the states of merged layers as inputs.

    `begun` gives the embeddings of the result. `merged` returns the model whose layer of this number is merged by the
    Gram matrices of that layer; no other of its layers is asked for.
    """
    with torch.no_grad():
        read = [(number, each) for number, each in enumerate(readings) if each is not None]
        batches = {number: begun.embed(each.tokens) for number, each in read}
        states = {number: States.of(batches[number]) for number, _ in read}
        for layer in range(begun.depth):
            found: dict[tuple[int, str], Tensor] = {}
            for number, each in read:
                with each.model.layer(layer) as apply, _watched(each, layer) as sums:
                    states[number].copy().move(apply, batches[number], None)
                found |= {(number, name): value / each.tokens.numel() for name, value in sums.items()}
            yield from ((number, name, value) for (number, name), value in found.items())
            with merged(layer, found).layer(layer) as apply:
                for number, _ in read:
                    states[number].move(apply, batches[number], progress)


def linear_maps(model: StreamedModel) -> dict[str, str | None]:
    """Return the weights of a model's layers that are linear maps of their own, each with its bias or None.

    Maps that the model's code keeps in another form than the files, as stacked experts, are left out.
    """
    anatomy, found = model.anatomy, dict[str, str | None]()
    stack = anatomy.stacks[0]
    for name, spec in anatomy.spec.tensors.items():
        located = stack.locate(name)
        if located is None or len(spec.shape) != 2 or anatomy.row(name)[0].kind not in ("linear", "conv1d"):
            continue
        part = _module(model, name)
        weight = getattr(part, "weight", None)
        if part is not None and weight is not None and tuple(weight.shape) == spec.shape:
            bias = f"{name.rpartition('.')[0]}.bias"
            found[name] = bias if bias in anatomy.spec.tensors else None
    return found


def _module(model: StreamedModel, name: str) -> nn.Module | None:
    located = model.anatomy.stacks[0].locate(name)
    assert located is not None, "a map is in a layer"
    return dict(model.module(located[0]).named_modules()).get(located[1].rpartition(".")[0])


@contextmanager
def _watched(reading: Reading, layer: int) -> Iterator[dict[str, Tensor]]:
    """Return a context in which the inputs of a layer's maps are summed, by the names of their weights."""
    sums: dict[str, Tensor] = {}
    handles = []

    def summing(name: str, *, constant: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = args[0].detach().flatten(0, -2).to(torch.float64).cpu()
            seen = torch.cat([seen, torch.ones(len(seen), 1, dtype=torch.float64)], dim=1) if constant else seen
            sums[name] = sums[name] + seen.T @ seen if name in sums else seen.T @ seen

        return hook

    for name, bias in reading.maps.items():
        located = reading.model.anatomy.stacks[0].locate(name)
        if located is not None and located[0] == layer and (part := _module(reading.model, name)) is not None:
            handles.append(part.register_forward_pre_hook(summing(name, constant=bias is not None)))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
