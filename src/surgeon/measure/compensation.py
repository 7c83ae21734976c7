"""Compensate a cut without training: solve the output maps in front of what is missing, one after the other.

The source and its cut run side by side on the same rows, with one layer of each in memory. Before a map of the cut is
solved, all before it are solved already: what it reads is what the result will give it. Rows that no sum of the fit
sees choose the ridge, and decide whether the new map is taken.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.anatomy.halves import ATTENTION, MLP
from surgeon.errors import MeasureError
from surgeon.measure.refit import RIDGES
from surgeon.measure.repair import Apply, Repair, repair
from surgeon.models.halves import HalfLayers
from surgeon.models.passage import Batch, silenced
from surgeon.models.streaming import Progress, StreamedModel
from surgeon.processes import own_rows
from surgeon.transforms.seams import Site, Sites


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of tokens, shape (R, T), and which of them the fit does not see, (R,). `real` is False for padding."""

    tokens: Tensor
    held: Tensor
    real: Tensor | None = None


def compensate(
    source: StreamedModel,
    result: StreamedModel,
    rows: Rows,
    sites: Sites,
    *,
    ridges: Sequence[float] = RIDGES,
    progress: Progress | None = None,
) -> Iterator[tuple[Site, Repair]]:
    """Yield each of the sites of `result`, a cut of `source`, with its repair, from the first layer to the last.

    Raises MeasureError where a layer does not add just what its output map puts out, times a constant.
    """
    by_layer: dict[int, list[Site]] = {}
    for site in sites.sites:
        by_layer.setdefault(site.map.layer, []).append(site)
    with torch.no_grad():
        rows = _own(rows)
        wanted = _Source(source, rows, progress)
        batches = result.embed(rows.tokens, rows.real)
        states = _begun(batches)
        for layer in range(max(by_layer, default=-1) + 1):
            # The source goes on before the layer is read, so that one of its layers and this one are never both there.
            aims = [_hidden(wanted.before(site.end), sites.hidden) for site in by_layer.get(layer, ())]
            with result.layer(layer) as apply:
                for site, aim in zip(by_layer.get(layer, ()), aims, strict=True):
                    yield site, _repaired(result, apply, site, (batches, states, aim, rows.held), ridges)
                _apply(apply, batches, states, progress)


def _repaired(
    result: StreamedModel,
    apply: Apply,
    site: Site,
    text: tuple[Sequence[Batch], Sequence[Tensor], Sequence[Tensor], Tensor],
    ridges: Sequence[float],
) -> Repair:
    """Return the repair of a map whose layer is in memory, from the states in front of that layer."""
    layer = site.map.layer
    if site.is_ahead:
        with result.layer(layer + 1) as following, _until(result, layer + 1, is_inside=True):
            return repair(result, site.map, apply, *text, then=following, ridges=ridges)
    with _until(result, layer, is_inside=site.map.half == ATTENTION):
        return repair(result, site.map, apply, *text, ridges=ridges)


def _own(rows: Rows) -> Rows:
    """Return the rows of this process, of several that measure together."""
    own = own_rows(len(rows.tokens))
    if own.start == own.stop:
        raise MeasureError(
            f"{len(rows.tokens)} rows of text cannot be shared by more processes than that",
            hint="Start fewer processes, or fit on more: --samples.",
        )
    return Rows(rows.tokens[own], rows.held[own], None if rows.real is None else rows.real[own])


def num_passes(sites: Sites) -> int:
    """Return how many layers the rows go through beside each other, in the source and in the result."""
    last = max((site.map.layer for site in sites.sites), default=-1)
    return last + 1 + max((site.end // 2 for site in sites.sites), default=0)


def _begun(batches: Sequence[Batch]) -> list[Tensor]:
    """Return the first states of batches, which do not keep them."""
    states = [batch.hidden for batch in batches]
    for batch in batches:
        batch.hidden = batch.hidden[:0]
    return states


def _apply(apply: Apply, batches: Sequence[Batch], states: list[Tensor], progress: Progress | None) -> None:
    """Replace states by those behind a layer, a batch each: no two of all are in memory at once."""
    for number, batch in enumerate(batches):
        states[number] = apply(batch, states[number])
        if progress:
            progress(batch.tokens.numel())


def _hidden(states: Sequence[Tensor], positions: Sequence[int] | None) -> Sequence[Tensor]:
    return states if positions is None else [state[..., list(positions)] for state in states]


class _Source:
    """The states of the source on the rows, in front of one of its halves after the other."""

    def __init__(self, model: StreamedModel, rows: Rows, progress: Progress | None) -> None:
        self._model, self._progress = model, progress
        self._batches = model.embed(rows.tokens, rows.real)
        self._layer = 0  # in front of which the states stand
        self._states = _begun(self._batches)
        self._inside: list[Tensor] | None = None  # the states between its halves, where they were asked for

    def before(self, half: int) -> list[Tensor]:
        """Return the states in front of a half of this number; the numbers never fall."""
        while self._layer < half // 2:
            self._inside = None
            with self._model.layer(self._layer) as apply:
                _apply(apply, self._batches, self._states, self._progress)
            self._layer += 1
        if half % 2 == 0:
            return list(self._states)
        if self._inside is None:
            with self._model.layer(self._layer) as apply, _until(self._model, self._layer, is_inside=True):
                self._inside = [apply(*each) for each in zip(self._batches, self._states, strict=True)]
        return self._inside


@contextmanager
def _until(model: StreamedModel, layer: int, *, is_inside: bool) -> Iterator[None]:
    """Return a context in which a layer ends between its halves, or as it is."""
    with ExitStack() as stack:
        for part in HalfLayers(model).module(layer, MLP) if is_inside else ():
            stack.enter_context(silenced(part))
        yield
