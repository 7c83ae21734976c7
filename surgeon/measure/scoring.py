"""Score a model on a text: one streamed pass for all scores that can share it, one more for each that cannot."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from surgeon.anatomy.anatomy import read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.measure.activations import Activations
from surgeon.measure.magnitude import layer_magnitudes, width_magnitudes
from surgeon.measure.record import Scores
from surgeon.measure.removal import (
    Progress,
    greedy,
    groups,
    loss_sum,
    losses_without,
    mean_loss,
    one_by_one,
    perplexities,
)
from surgeon.measure.residual import Angular, Influence
from surgeon.measure.routing import Routing
from surgeon.measure.taylor import taylor
from surgeon.models.device import available_memory, compute_dtype
from surgeon.models.streaming import Batch, StreamedModel

# Is told what work begins, how many tokens it takes and through how many layers each goes; returns what counts their
# product. For people that is a bar, with tokens a second.
Meter = Callable[[str, int, int], Progress | None]


class Observer(Protocol):
    """What looks on while batches go through layers."""

    def begin(self, batch: Batch) -> None:
        """See a batch in front of the first layer."""

    def see(self, layer: int, batch: Batch, before: Tensor, after: Tensor) -> None:
        """See the states before and behind a layer."""

    def end_group(self) -> None:
        """Know that a group of rows is through."""


class Watcher(Protocol):
    """What looks on inside a layer."""

    def watch(self, layer: int, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which what happens inside a layer is seen."""

    def enter(self, batch: Batch) -> None:
        """Know which batch goes through the layer now."""

    def result(self) -> dict[str, Tensor]:
        """Return the importance of positions, by axis."""


def observe(
    model: StreamedModel,
    tokens: Tensor,
    observers: Sequence[Observer] = (),
    *,
    watchers: Sequence[Watcher] = (),
    real: Tensor | None = None,
    held: int = 2,
    progress: Progress | None = None,
) -> None:
    """Run the rows, shape (R, T), through all layers under the eyes of `observers` and, inside them, of `watchers`.

    `held` says how many states of each token are in memory at once, those that observers keep included.
    """
    with torch.no_grad():
        for start, stop in groups(len(tokens), tokens.shape[1] * model.hidden_size * 4 * held):
            batches = model.embed(tokens[start:stop], None if real is None else real[start:stop])
            for batch in batches:
                for observer in observers:
                    observer.begin(batch)
            for index in range(model.depth):
                with model.layer(index) as apply, _watched(watchers, index, model.module(index)):
                    for batch in batches:
                        for watcher in watchers:
                            watcher.enter(batch)
                        after = apply(batch, batch.hidden)
                        for observer in observers:
                            observer.see(index, batch, batch.hidden, after)
                        batch.hidden = after
                        if progress:
                            progress(batch.tokens.numel())
            for observer in observers:
                observer.end_group()


@contextmanager
def _watched(watchers: Sequence[Watcher], layer: int, module: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for watcher in watchers:
            stack.enter_context(watcher.watch(layer, module))
        yield


def score_states(
    model: StreamedModel,
    tokens: Tensor,
    *,
    real: Tensor | None = None,
    all_tokens: bool = False,
    widths: bool = False,
    evaluate: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, list[Any]], dict[str, Any], float | None]:
    """Return the scores of layers that one pass gives, and with `widths` the importance of each axis's positions.

    With `evaluate` the mean next-token loss too, which costs the head. `real` is False for padding.
    """
    depth = model.depth
    angular, influence = Angular(depth, all_tokens=all_tokens), Influence(depth)
    observers: list[Observer] = [angular, influence]
    watchers: list[Watcher] = []
    if widths:
        watchers.append(Activations(model.anatomy))
        if "experts" in model.anatomy.sizes:
            watchers.append(Routing(depth, model.anatomy.sizes["experts"]))
    loss = FinalLoss(model) if evaluate else None
    observers += [loss] if loss else []
    held = depth + 3 if all_tokens else 2
    observe(model, tokens, observers, watchers=watchers, real=real, held=held, progress=progress)
    layers: dict[str, list[Any]] = {
        "angular": angular.result(),
        "block-influence": influence.block_influence(),
        "relative-magnitude": influence.relative_magnitude(),
    }
    found: dict[str, Any] = {}
    for watcher in watchers:
        found |= {axis: values.tolist() for axis, values in watcher.result().items()}
    return layers, found, None if loss is None else loss.result()


class FinalLoss:
    """Sums the next-token loss of the whole model at the end of the pass that others look on."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._batches: list[Batch] = []
        self._sum, self._count = 0.0, 0

    def begin(self, batch: Batch) -> None:
        """Remember a batch; its hidden states are the final ones when the group ends."""
        self._batches.append(batch)

    def see(self, layer: int, batch: Batch, before: Tensor, after: Tensor) -> None:
        """Nothing is counted between the layers."""

    def end_group(self) -> None:
        """Take the loss of the group."""
        with self._model.head() as head:
            for batch in self._batches:
                total, count = loss_sum(head, batch, batch.hidden)
                self._sum += total
                self._count += count
        self._batches = []

    def result(self) -> float:
        """Return the mean loss of a next token, in nats."""
        return mean_loss(self._sum, self._count)


def score(
    source: Source,
    tokens: Tensor | None,
    wanted: Collection[str],
    *,
    data: Any = None,
    all_tokens: bool = False,
    widths: Collection[str] = (),
    rounds: int | None = None,
    protect: tuple[int, int] = (1, 1),
    evaluate: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    meter: Meter | None = None,
) -> Scores:
    """Return the scores `wanted` of a model, and those that come with them for nothing.

    `tokens` has shape (R, T); None where no score reads text. `widths` are "activation" and "magnitude". With `rounds`
    layers are removed greedily, so many of them. With `evaluate` the whole model's loss is taken too.

    Raises MeasureError when the model cannot run on text.
    """
    meter = meter or _no_meter
    layers: dict[str, list[Any]] = {}
    found: dict[str, Any] = {}
    order: dict[str, Any] | None = None
    loss: float | None = None
    if tokens is not None:
        passes = ("perplexity" in wanted) + ("taylor" in wanted)
        model = _streamed(source, device, dtype, resident=bool(passes))
        layers, activations, loss = score_states(
            model,
            tokens,
            all_tokens=all_tokens,
            widths="activation" in widths,
            evaluate=evaluate,
            progress=meter("scoring", tokens.numel(), model.depth),
        )
        found |= {"activation": activations} if activations else {}
        if "perplexity" in wanted and rounds is None:
            steps = model.depth * (model.depth + 1) // 2 - 1
            progress = meter("removing each layer", tokens.numel(), steps)
            layers["perplexity"] = one_by_one(model, tokens, progress=progress)
        if rounds is not None:
            steps = rounds * model.depth * (model.depth + 1) // 2
            progress = meter("removing layers greedily", tokens.numel(), steps)
            removed, after = greedy(model, tokens, rounds, protect=protect, progress=progress)
            order = {"order": removed, "perplexity": after, "protect": list(protect)}
        if "taylor" in wanted:
            layers["taylor"] = taylor(model, tokens, progress=meter("gradients", tokens.numel(), 3 * model.depth))
    if "magnitude" in wanted:
        layers["magnitude"] = layer_magnitudes(source)
    if "magnitude" in widths:
        found["magnitude"] = {axis: values.tolist() for axis, values in width_magnitudes(source).items()}
    return Scores(
        model=source.provenance(),
        depth=read_anatomy(spec_of(source)).depth,
        data=data,
        tokens=0 if tokens is None else tokens.numel(),
        seed=seed,
        options={
            "tokens": "all" if all_tokens else "last",
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
        },
        layers=layers,
        widths=found,
        greedy=order,
        loss=loss,
    )


def perplexity(source: Source, tokens: Tensor, *, device: str = "cpu", meter: Meter | None = None) -> float:
    """Return the perplexity of a model on rows of tokens, shape (R, T)."""
    return removal_curve(source, tokens, [()], device=device, meter=meter)[0]


def removal_curve(
    source: Source,
    tokens: Tensor,
    removed: Sequence[Collection[int]],
    *,
    device: str = "cpu",
    meter: Meter | None = None,
) -> list[float]:
    """Return the perplexity of a model without each of these sets of layers, all in one streamed pass."""
    model = _streamed(source, device, compute_dtype(source, device), resident=False)
    steps = sum(model.depth - len(dropped) for dropped in removed)
    progress = (meter or _no_meter)("perplexity", tokens.numel(), steps)
    return perplexities(losses_without(model, tokens, [frozenset(dropped) for dropped in removed], progress=progress))


def _streamed(source: Source, device: str, dtype: torch.dtype, *, resident: bool) -> StreamedModel:
    """Return the model; where it is gone through often and memory allows, its weights stay there."""
    size = sum(item.spec.num_parameters for item in source.tensors.values()) * dtype.itemsize
    fits = resident and 2 * size < available_memory(device)
    return StreamedModel(source, device=device, dtype=dtype, resident=fits)


def _no_meter(what: str, tokens: int, layers: int) -> Progress | None:
    return None
