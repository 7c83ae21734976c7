"""Gram matrices of the inputs of a model's linear maps on a text, layer by layer, with one layer in memory.

For RegMean (arXiv:2212.09849) each model's states come out of its own layers; for RegMean++ (arXiv:2508.03121) out of
the layers that are merged already. No padding and no weighting: every token of the rows counts once. An expert has the
tokens that are routed to it, whatever their gates; its sum is divided by all tokens, as every other, so that models in
which it sees more count more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.anatomy.anatomy import EXPERT_NUMBER
from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.families import written_and_read
from surgeon.checkpoint.header import TensorSpec
from surgeon.errors import MeasureError
from surgeon.measure.compensation import States
from surgeon.models.device import wide
from surgeon.models.experts import Experts
from surgeon.models.streaming import Progress, StreamedModel
from surgeon.transforms.merging import ExpertOutputs, expert_outputs

AVERAGED = "Use --method linear."


@dataclass
class Reading:
    """A model and its text, tokens (R, T); `maps` are the weights whose inputs are summed, each with its bias."""

    model: StreamedModel
    tokens: Tensor
    maps: Mapping[str, str | None]


def grams_of(reading: Reading, *, progress: Progress | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the Gram matrix of each map's inputs, in float64, from the first layer to the last, then the head's.

    Of stacked experts, the matrices of all are stacked.
    """
    model = reading.model
    with torch.no_grad():
        batches = model.embed(reading.tokens)
        states = States.of(batches)
        for layer in range(model.depth):
            with model.layer(layer) as apply, _watched(reading, layer) as sums:
                states.move(apply, batches, progress)
            yield from ((name, each / reading.tokens.numel()) for name, each in sums.items())
        yield from _of_the_head(reading, states)


def grams_in_turn(
    readings: Sequence[Reading | None],
    begun: StreamedModel,
    merged: Callable[[int, Mapping[tuple[int, str], Tensor]], StreamedModel],
    *,
    progress: Progress | None = None,
) -> Iterator[tuple[int, str, Tensor]]:
    """Yield the number of a model, a map and its Gram matrix, with the states of merged layers as inputs.

    `begun` gives the embeddings of the result, and the norm before its head. `merged` returns the model whose layer of
    this number is merged by the Gram matrices of that layer; no other of its layers is asked for.
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
        for number, each in read:
            for name, value in _of_the_head(replace(each, model=begun), states[number]):
                yield number, name, value


def linear_maps(model: StreamedModel) -> dict[str, str | None]:
    """Return the weights of a model that are linear maps, each with its bias or None: of layers, and an untied head.

    Maps that the model's code keeps in another form than the files are left out, unless they are those of experts.
    """
    tensors, outputs, found = model.anatomy.spec.tensors, expert_outputs(model.anatomy), dict[str, str | None]()
    for name in tensors:
        if (place := _place(model, name, outputs)) is not None:
            bias = f"{name}_bias" if place.is_stacked else f"{name.rpartition('.')[0]}.bias"
            found[name] = bias if bias in tensors else None
    return found


@dataclass(frozen=True)
class _Place:
    """Where the inputs of a map are seen: in front of a part of the code, or where the tokens reach experts.

    `layer` is None behind the layers. Of experts `part` is None, and `reads_neurons` says that it is their output map.
    """

    layer: int | None
    inputs: int
    part: nn.Module | None
    experts: range = range(0)
    is_stacked: bool = False
    reads_neurons: bool = False


def _place(model: StreamedModel, name: str, outputs: Mapping[int, ExpertOutputs]) -> _Place | None:
    """Return where the inputs of a tensor are seen; None where it is no linear map, or its inputs are not seen."""
    anatomy = model.anatomy
    located, spec = anatomy.stacks[0].locate(name), anatomy.spec.tensors[name]
    row, _ = anatomy.row(name)
    if located is None:
        is_tied = getattr(model.whole.config, "tie_word_embeddings", False)  # its inputs say nothing of an embedding
        is_head = row.kind == "head" and anatomy.whole_family is not None and not is_tied
        part = model.whole.get_output_embeddings() if is_head else None
        return _Place(None, spec.shape[1], part) if _holds(part, spec) else None
    if row.kind not in ("linear", "conv1d"):
        return None
    _, read = written_and_read(row)
    part = dict(model.module(located[0]).named_modules()).get(located[1].rpartition(".")[0])
    if len(spec.shape) == 2 and _holds(part, spec):
        assert read is not None, "linear maps read"
        return _Place(located[0], spec.shape[read], part)
    number, is_stacked = EXPERT_NUMBER.search(name), len(spec.shape) == 3 and axes_of(row.axes[0]) == {"experts"}
    if (not number and not is_stacked) or read is None or _experts(model, located[0], outputs) is None:
        return None
    axes = axes_of(row.axes[read])
    if axes != {"hidden"} and name not in outputs[located[0]].weights:
        return None
    experts = range(int(number[0]), int(number[0]) + 1) if number else range(spec.shape[0])
    return _Place(located[0], spec.shape[read], None, experts, is_stacked, reads_neurons=axes != {"hidden"})


def _holds(part: nn.Module | None, spec: TensorSpec) -> bool:
    """Return whether the weight of a part of the code has the shape of the stored one."""
    weight = getattr(part, "weight", None)
    return weight is not None and tuple(weight.shape) == spec.shape


def _experts(model: StreamedModel, layer: int, outputs: Mapping[int, ExpertOutputs]) -> Experts | None:
    """Return the experts of a layer, None where they are in a form of transformers that is not known."""
    if layer not in outputs:
        return None
    try:
        return Experts(model.module(layer), model.label, is_transposed=outputs[layer].is_transposed, hint=AVERAGED)
    except MeasureError:
        return None


@contextmanager
def _watched(reading: Reading, layer: int | None) -> Iterator[dict[str, Tensor]]:
    """Return a context in which the inputs of a layer's maps are summed, by the names of their weights."""
    model, sums, inside = reading.model, dict[str, Tensor](), dict[str, _Place]()
    outputs = expert_outputs(model.anatomy)

    def summing(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] += _square(args[0].detach().flatten(0, -2), constant=reading.maps[name] is not None)

        return hook

    with ExitStack() as stack:
        for name, bias in reading.maps.items():
            located = model.anatomy.stacks[0].locate(name)
            if (None if located is None else located[0]) != layer:
                continue
            place = _place(model, name, outputs)
            assert place is not None, "it is one of the maps of a model that is alike"
            size = place.inputs + (bias is not None)
            several = (len(place.experts),) if place.is_stacked else ()
            sums[name] = torch.zeros(*several, size, size, dtype=torch.float64)
            if place.part is not None:
                stack.callback(place.part.register_forward_pre_hook(summing(name)).remove)
            else:
                inside[name] = place
        if inside:
            assert layer is not None, "experts are in layers"
            experts = _experts(model, layer, outputs)
            assert experts is not None, "their maps are among the places"
            stack.enter_context(experts.answering(_counting(experts, reading, inside, sums)))
        yield sums


def _counting(
    experts: Experts, reading: Reading, places: Mapping[str, _Place], sums: dict[str, Tensor]
) -> Callable[..., Tensor]:
    """Return what a layer calls in place of its experts: it sums the inputs of their maps, then lets them answer."""

    def forward(hidden: Tensor, chosen: Tensor, *rest: Any) -> Tensor:
        for expert in range(len(experts)):
            reached = hidden[(chosen == expert).any(-1)]
            own = {name: place for name, place in places.items() if expert in place.experts}
            if not len(reached):
                continue
            neurons = experts.neurons(expert, reached) if any(each.reads_neurons for each in own.values()) else reached
            squares: dict[tuple[bool, bool], Tensor] = {}
            for name, place in own.items():
                key = place.reads_neurons, reading.maps[name] is not None
                if key not in squares:
                    squares[key] = _square(neurons if key[0] else reached, constant=key[1])
                into = sums[name][expert] if place.is_stacked else sums[name]
                into += squares[key]
        return experts.forward(hidden, chosen, *rest)

    return forward


def _square(seen: Tensor, *, constant: bool) -> Tensor:
    """Return the sum over tokens of x x^T, in float64, for inputs (N, I), with one more that is always 1 or not."""
    inputs = wide(seen).cpu()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1) if constant else inputs
    return inputs.T @ inputs


def _of_the_head(reading: Reading, states: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the Gram matrix of a head of its own, from the states behind the last layer."""
    model = reading.model
    if all(model.anatomy.stacks[0].locate(name) for name in reading.maps):
        return
    with model.head() as apply, _watched(reading, None) as sums, _unread(model.whole.get_output_embeddings()):
        for batch in states:
            for row in batch:  # no more tokens at once than the model has positions for
                apply(row[None])
    yield from ((name, each / reading.tokens.numel()) for name, each in sums.items())


@contextmanager
def _unread(head: nn.Module) -> Iterator[None]:
    """Return a context in which a head computes nothing: its logits are of no use, and take the most time."""
    head.forward = lambda states, *_: states[..., :1]
    try:
        yield
    finally:
        del head.forward
