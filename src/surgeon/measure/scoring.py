"""Score a model on a text: one streamed pass for all scores that can share it, one more for each that cannot.

Losses without layers are computed for any number of choices in one pass. Choices that leave out the same of the first
layers share their states up to there, so scoring every layer's removal costs half of as many separate passes, exactly.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import MeasureError
from surgeon.measure.activations import Activations, Watcher
from surgeon.measure.record import Scores, perplexities
from surgeon.measure.residual import Observer
from surgeon.models.device import available_memory, compute_dtype, groups, head_tokens, row_bytes
from surgeon.models.passage import Batch, silenced
from surgeon.models.skeleton import predicts_next
from surgeon.models.streaming import Progress, StreamedModel, row_sums
from surgeon.processes import own_rows, summed
from surgeon.progress import meter as announced
from surgeon.transforms.scores import METHODS, WIDTHS

# Is called when work begins: with its name, its number of tokens, and the number of layers that each goes through.
# Returns the function that counts them. For people that is a bar, with tokens per second.
Meter = Callable[[str, int, int], Progress | None]


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """The scores to take: of `layers` by names of METHODS, of `widths` by names of WIDTHS.

    With `rounds`, so many layers are removed greedily, with the first and last `protect` kept. With `evaluate` the loss
    of the whole model is taken too.
    """

    layers: Collection[str] = ()
    widths: Collection[str] = ()
    all_tokens: bool = False
    rounds: int | None = None
    protect: tuple[int, int] = (1, 1)
    evaluate: bool = False
    device: str = "cpu"
    seed: int = 0


def observe(
    model: StreamedModel,
    tokens: Tensor,
    observers: Sequence[Observer] = (),
    *,
    watchers: Sequence[Watcher] = (),
    real: Tensor | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the rows, shape (R, T), through all layers; `observers` see the states between them, `watchers` the inside.

    `real` is False for padding. Of processes that measure together each runs rows of its own, and all see all sums.
    """
    own = own_rows(len(tokens))
    tokens, real = tokens[own], None if real is None else real[own]
    held = 2 + sum(observer.kept_states for observer in observers)  # states of each token in memory at once
    with torch.no_grad():
        for start, stop in groups(
            len(tokens), row_bytes(tokens.shape[1], model.hidden_size * held), model.states_bytes
        ):
            batches = model.start(tokens[start:stop], None if real is None else real[start:stop])
            for batch in batches:
                model.check_per_token(batch.hidden, batch.tokens)
                for observer in observers:
                    observer.begin(batch)
            for index in range(model.depth):
                with model.layer(index) as apply, _watched(watchers, index, model.module(index)):
                    for batch in batches:
                        for watcher in watchers:
                            watcher.batch = batch
                        before = batch.hidden
                        after = apply(batch, before)
                        for observer in observers:
                            observer.see(index, batch, before, after)
                        if progress:
                            progress(batch.tokens.numel())
            for observer in observers:
                observer.end_group()
    for observer in observers:
        observer.add_up(summed)
    for watcher in watchers:
        watcher.add_up(summed)


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
    widths: Collection[str] = (),
    evaluate: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, list[Any]], dict[str, dict[str, Any]], float | None]:
    """Return all scores of layers that share one pass, and by each ranking of `widths` that of each axis's positions.

    With `evaluate` the mean next-token loss too, which costs the head. `real` is False for padding.
    """
    observers = _observers(model.depth, all_tokens=all_tokens)
    rankings = [name for name in widths if WIDTHS[name].input == "text"]
    watchers = _watchers(model.anatomy, rankings) if rankings else []
    loss = FinalLoss(model) if evaluate else None
    looking_on = [*observers.values(), *([] if loss is None else [loss])]
    observe(model, tokens, looking_on, watchers=watchers, real=real, progress=progress)
    layers = {
        name: getattr(observers[method.observer], method.result)()
        for name, method in METHODS.items()
        if method.observer
    }
    importance = {
        name: {axis: values.tolist() for watcher in watchers for axis, values in watcher.result(name).items()}
        for name in rankings
    }
    return layers, importance, None if loss is None else loss.result()


def _observers(depth: int, *, all_tokens: bool) -> dict[str, Observer]:
    """Return the observers of the scores that share the pass, by their names: one may give two scores."""
    return {
        method.observer: named(method.observer)(depth, **({"all_tokens": all_tokens} if method.token_choice else {}))
        for method in METHODS.values()
        if method.observer
    }


def _watchers(anatomy: Anatomy, rankings: Collection[str]) -> list[Watcher]:
    from surgeon.measure.routing import Routing

    experts = anatomy.sizes.get("experts")
    return [Activations(anatomy, rankings), *([] if experts is None else [Routing(anatomy.depth, experts)])]


def named(place: str) -> Any:
    """Return what a row of METHODS names: "surgeon.measure.taylor:taylor"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


class FinalLoss(Observer):
    """Sums the next-token loss of the whole model, at the end of the pass that other observers share."""

    def __init__(self, model: StreamedModel) -> None:
        model.check_predicts()
        self._model = model
        self._batches: list[Batch] = []
        self._sum, self._count = 0.0, 0

    def begin(self, batch: Batch) -> None:
        """Remember a batch; its hidden states are the final ones when the group ends."""
        self._batches.append(batch)

    def end_group(self) -> None:
        """Add the loss of the group."""
        with self._model.finish(self._batches) as head:
            for batch in self._batches:
                total, count = loss_sum(head, batch, batch.hidden)
                self._sum += total
                self._count += count
        self._batches = []

    def add_up(self, of_all: Callable[[Tensor], Tensor]) -> None:
        """Make the sums those of all processes."""
        self._sum, count = of_all(torch.tensor([self._sum, self._count], dtype=torch.float64)).tolist()
        self._count = int(count)

    def result(self) -> float:
        """Return the mean loss of a next token, in nats."""
        return mean_loss(self._sum, self._count)


def score(
    source: Source,
    tokens: Tensor | None,
    request: ScoreRequest,
    *,
    data: Mapping[str, Any] | None = None,
    meter: Meter | None = None,
) -> Scores:
    """Return the scores of a model that `request` names, and those that the shared pass gives with them.

    `tokens` has shape (R, T), None where no score reads text; `data` says where they are from.

    Raises MeasureError when the model cannot run on text.
    """
    layers: dict[str, list[Any]] = {}
    widths: dict[str, Any] = {}
    order, loss = None, None
    if tokens is not None:
        runs_again = any(METHODS[name].function for name in request.layers)
        model = streamed_model(source, request.device, resident=runs_again)
        layers, importance, loss = score_states(
            model,
            tokens,
            all_tokens=request.all_tokens,
            widths=request.widths,
            evaluate=request.evaluate and predicts_next(source),
            progress=(meter or announced)("scoring", tokens.numel(), model.depth),
        )
        widths |= {name: axes for name, axes in importance.items() if axes}
        own_passes, order = _scores_by_own_pass(model, tokens, request, meter or announced)
        layers |= own_passes
    of_weights = {name: method.weights for name, method in METHODS.items() if name in request.layers and method.weights}
    layers |= {name: named(function)(source) for name, function in of_weights.items()}
    if "magnitude" in request.widths:
        from surgeon.measure.magnitude import width_magnitudes

        widths["magnitude"] = {axis: values.tolist() for axis, values in width_magnitudes(source).items()}
    dtype = str(compute_dtype(source, request.device)).removeprefix("torch.")
    return Scores(
        model=source.provenance(),
        depth=read_anatomy(spec_of(source)).depth,
        data=data,
        tokens=0 if tokens is None else tokens.numel(),
        seed=request.seed,
        options={"tokens": "all" if request.all_tokens else "last", "dtype": dtype, "device": request.device},
        layers=layers,
        widths=widths,
        greedy=order,
        loss=loss,
    )


def _scores_by_own_pass(
    model: StreamedModel, tokens: Tensor, request: ScoreRequest, meter: Meter
) -> tuple[dict[str, list[Any]], dict[str, Any] | None]:
    """Return the scores that run the model themselves, and the order of a greedy removal, None where there is none."""
    layers: dict[str, list[Any]] = {}
    order: dict[str, Any] | None = None
    for name, method in METHODS.items():
        if name not in request.layers or not method.function:
            continue
        if request.rounds is not None and method.greedy is not None:
            remove = named(method.greedy.by)
            removed, after = remove(model, tokens, request.rounds, protect=request.protect, meter=meter)
            order = {"order": removed, "perplexity": after, "protect": list(request.protect)}
        else:
            layers[name] = named(method.function)(model, tokens, meter=meter)
    return layers, order


def perplexity(source: Source, tokens: Tensor, *, device: str = "cpu", meter: Meter | None = None) -> float:
    """Return the perplexity of a model on rows of tokens, shape (R, T)."""
    model = streamed_model(source, device, resident=False)
    loss = FinalLoss(model)
    observe(model, tokens, [loss], progress=(meter or announced)("perplexity", tokens.numel(), model.depth))
    return perplexities([loss.result()])[0]


def removal_curve(
    source: Source,
    tokens: Tensor,
    removed: Sequence[Collection[int]],
    *,
    device: str = "cpu",
    meter: Meter | None = None,
) -> list[float]:
    """Return the perplexity of a model without each of these sets of layers, in one streamed pass."""
    model = streamed_model(source, device, resident=False)
    steps = sum(model.depth - len(dropped) for dropped in removed)
    progress = (meter or announced)("perplexity", tokens.numel(), steps)
    return perplexities(losses_without(model, tokens, [frozenset(dropped) for dropped in removed], progress=progress))


def streamed_model(source: Source, device: str, *, resident: bool, dtype: torch.dtype | None = None) -> StreamedModel:
    """Return the model; with `resident` its weights stay in memory once they are read, where memory allows."""
    dtype = dtype or compute_dtype(source, device)
    size = sum(item.spec.num_parameters for item in source.tensors.values()) * dtype.itemsize
    fits = resident and 2 * size < available_memory(device)
    return StreamedModel(source, device=device, dtype=dtype, resident=fits)


# --- losses ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a layer that may be left out alone, by its path in the layer: what it adds is zeros then."""

    layer: int
    path: str


Removed = frozenset[int] | frozenset[int | Part]  # layers, and parts of layers that stay


def losses_without(
    model: StreamedModel,
    tokens: Tensor,
    removed: Sequence[Removed],
    *,
    real: Tensor | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Return the mean next-token loss, in nats, of the model without each of these sets of layers.

    `tokens` has shape (R, T); the loss is taken inside rows, over targets that are no padding.
    """
    sums, sizes = row_losses_without(model, tokens, removed, real=real, progress=progress)
    return [mean_loss(float(total), int(sizes.sum())) for total in sums.sum(-1)]


def row_losses_without(
    model: StreamedModel,
    tokens: Tensor,
    removed: Sequence[Removed],
    *,
    real: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the losses of `losses_without`, summed over each row, (N, R), in float64, and the targets of each row."""
    model.check_predicts()
    sums = torch.zeros(len(removed), len(tokens), dtype=torch.float64)
    sizes = torch.zeros(len(tokens), dtype=torch.long)
    of_paths = tokens.shape[1] * model.hidden_size * 4 * (len(set(removed)) + 1)  # bytes of a row
    own = own_rows(len(tokens))
    with torch.no_grad():
        for first, last in groups(own.stop - own.start, of_paths, model.states_bytes):
            start, stop = own.start + first, own.start + last
            batches = model.embed(tokens[start:stop], None if real is None else real[start:stop])
            counted = [targets_of(batch)[1] for batch in batches]
            paths = _through(model, batches, removed, progress)
            sizes[start:stop] = torch.cat([places.sum(-1).cpu() for places in counted])
            with model.head() as head:
                for variants, states in paths:
                    rows = [row_sums(head, *each) for each in zip(batches, states, counted, strict=True)]
                    sums[variants, start:stop] = torch.cat(rows)
    return summed(sums), summed(sizes)


def _through(
    model: StreamedModel,
    batches: Sequence[Batch],
    removed: Sequence[Removed],
    progress: Progress | None,
) -> list[tuple[list[int], list[Tensor]]]:
    """Return the final states of each choice, once for choices that agree, with the numbers of those choices."""
    paths = [(list(range(len(removed))), [batch.hidden for batch in batches])]
    parts = {(v, item.layer): item for v, choice in enumerate(removed) for item in choice if isinstance(item, Part)}
    for index in range(model.depth):
        ways: list[tuple[Part | None, list[int], list[Tensor]]] = []
        skipping = []
        for variants, states in paths:
            if skipped := [v for v in variants if index in removed[v]]:
                skipping.append((skipped, states))
            without: dict[Part | None, list[int]] = {}
            for v in variants:
                if index not in removed[v]:
                    without.setdefault(parts.get((v, index)), []).append(v)
            ways += [(part, chosen, states) for part, chosen in without.items()]
        paths = skipping
        if ways:
            with model.layer(index) as apply:
                while ways:  # free each path's states once they are through: those of all would double the memory
                    part, through, states = ways.pop()
                    with nullcontext() if part is None else silenced(model.module(index).get_submodule(part.path)):
                        moved = [apply(batch, state) for batch, state in zip(batches, states, strict=True)]
                    paths.append((through, moved))
                    if progress:
                        progress(sum(batch.tokens.numel() for batch in batches))
    return paths


def targets_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the next tokens, shape (B, T - 1), and which of them count: a token after a token, no padding."""
    following = batch.tokens[:, 1:]
    if batch.real is None:
        return following, torch.ones_like(following, dtype=torch.bool)
    return following, batch.real[:, 1:] & batch.real[:, :-1]


def losses_of(head: Callable[[Tensor], Tensor], batch: Batch, states: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield the sum of next-token losses, in nats, of a few of a batch's tokens at a time, and how many they are."""
    following, counted = targets_of(batch)
    flat, targets = states[:, :-1][counted], following[counted]
    size = min(head_tokens(states.device), batch.tokens.shape[1])  # no more than the model has positions for
    for at in range(0, len(flat), size):
        logits, next_tokens = head(flat[at : at + size]).float(), targets[at : at + size]
        yield nn.functional.cross_entropy(logits, next_tokens, reduction="sum"), len(next_tokens)


def loss_sum(head: Callable[[Tensor], Tensor], batch: Batch, states: Tensor) -> tuple[float, int]:
    """Return the sum of a batch's next-token losses, in nats, and the number of tokens in it."""
    counted = targets_of(batch)[1]
    return float(row_sums(head, batch, states, counted).sum()), int(counted.sum())


def mean_loss(total: float, count: int) -> float:
    """Return the mean loss of a next token. Raises MeasureError when there is none."""
    if not count:
        raise MeasureError("a text of one token predicts nothing", hint="Give --data with more text.")
    return total / count
