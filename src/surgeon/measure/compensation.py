"""Compensate a cut without training: solve the output maps in front of what is missing, one after the other.

The source and its cut run side by side on the same rows, with one layer of each in memory. Before a map of the cut is
solved, all before it are solved already: what it reads is what the result will give it. Rows that no sum of the fit
sees choose the ridge, and decide whether the new map is taken.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from surgeon.anatomy.halves import ATTENTION, MLP
from surgeon.measure.kept import Kept
from surgeon.measure.refit import RIDGES
from surgeon.measure.repair import Apply, Repair, repair
from surgeon.models.halves import parts_of
from surgeon.models.passage import Batch, silenced
from surgeon.models.streaming import Progress, StreamedModel
from surgeon.processes import shared_rows
from surgeon.transforms.seams import Site, Sites


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of tokens, shape (R, T), and which of them the fit does not see, (R,). `real` is False for padding."""

    tokens: Tensor
    held: Tensor
    real: Tensor | None = None

    def own(self) -> "Rows":
        """Return the rows of this process, of several that measure together."""
        own = shared_rows(len(self.tokens))
        return Rows(self.tokens[own], self.held[own], None if self.real is None else self.real[own])


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
        rows = rows.own()
        wanted = SourceStates(source, rows, progress)
        batches = result.embed(rows.tokens, rows.real)
        states = States.of(batches)
        for layer in range(max(by_layer, default=-1) + 1):
            # The source goes on before the layer is read, so that one of its layers and this one are never both there.
            here = by_layer.get(layer, [])
            aims = [wanted.before(site.end, keep=site is not here[-1]).at(sites.hidden) for site in here]
            with result.layer(layer) as apply:
                for site, aim in zip(here, aims, strict=True):
                    yield site, _repaired(result, apply, site, (batches, states, aim, rows.held), ridges)
                states.move(apply, batches, progress)


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


def num_passes(sites: Sites) -> int:
    """Return how many layers the rows go through beside each other, in the source and in the result."""
    last = max((site.map.layer for site in sites.sites), default=-1)
    return last + 1 + max((site.end // 2 for site in sites.sites), default=0)


class States(Sequence[Tensor]):
    """The states of rows at one place of a model, a batch each, of all channels or of some."""

    def __init__(self, kept: Kept, channels: Sequence[int] | None = None) -> None:
        self._kept, self._channels = kept, None if channels is None else list(channels)

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "States":
        """Return the first states of batches, which do not keep them."""
        kept = Kept(1, batches)
        for number, batch in enumerate(batches):
            kept.put_one(0, number, batch.hidden)
            batch.hidden = batch.hidden[:0].clone()
        return cls(kept)

    def at(self, channels: Sequence[int] | None) -> "States":
        """Return the same states at some channels; None: at all."""
        return States(self._kept, channels)

    def move(self, apply: Apply, batches: Sequence[Batch], progress: Progress | None) -> None:
        """Replace the states by those behind a layer."""
        for number, batch in enumerate(batches):
            self._kept.put_one(0, number, apply(batch, self[number]))
            if progress:
                progress(batch.tokens.numel())

    def copy(self) -> "States":
        """Return states of their own."""
        return States(self._kept.copy())

    def __len__(self) -> int:
        return self._kept.num_batches

    @overload
    def __getitem__(self, number: int) -> Tensor: ...
    @overload
    def __getitem__(self, number: slice) -> list[Tensor]: ...
    def __getitem__(self, number: int | slice) -> Tensor | list[Tensor]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        states = self._kept.get_one(0, range(len(self))[number])
        return states if self._channels is None else states[..., self._channels]


class SourceStates:
    """The states of the source on the rows, in front of one of its halves after the other."""

    def __init__(self, model: StreamedModel, rows: Rows, progress: Progress | None) -> None:
        self._model, self._progress = model, progress
        self._batches = model.embed(rows.tokens, rows.real)
        self._layer = 0  # in front of which the states stand
        self._states = States.of(self._batches)
        self._inside: States | None = None  # the states between its halves, where they were asked for

    def before(self, half: int, *, keep: bool) -> States:
        """Return the states in front of a half of this number, which never falls; to `keep` when the next are asked."""
        while self._layer < half // 2:
            self._inside = None
            with self._model.layer(self._layer) as apply:
                self._states.move(apply, self._batches, self._progress)
            self._layer += 1
        if half % 2 == 0:
            return self._states.copy() if keep else self._states
        if self._inside is None:
            self._inside = self._states.copy()
            with self._model.layer(self._layer) as apply, _until(self._model, self._layer, is_inside=True):
                self._inside.move(apply, self._batches, None)
        return self._inside


@contextmanager
def _until(model: StreamedModel, layer: int, *, is_inside: bool) -> Iterator[None]:
    """Return a context in which a layer ends between its halves, or as it is."""
    with ExitStack() as stack:
        for part in parts_of(model, layer, MLP) if is_inside else ():
            stack.enter_context(silenced(part))
        yield
