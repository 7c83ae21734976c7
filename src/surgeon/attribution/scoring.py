"""The scores of rows by gradients: of one checkpoint of a run, or of several together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgeon.attribution.estimators import Method, Scores, dots, trak
from surgeon.attribution.gradients import Map, RowGradients, maps_of, widest
from surgeon.attribution.ledger import Ledger
from surgeon.attribution.rows import Batches, gradients_of
from surgeon.errors import PlanError
from surgeon.models.device import available_memory
from surgeon.progress import stage

EPS = 1e-8  # of Adam, outside of the root as there
SCORES = "scores-{}.f32"  # of a checkpoint: the file of a ledger, by the checkpoint's number
GRADIENTS = "gradients-{}.f32"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A checkpoint of a training. `weight` is its learning rate; `load` returns the model, with its loss attached.

    `second` returns Adam's mean squares of the gradients of a loaded model, by the names of its parameters, corrected
    for their start at zero; None where the optimiser's state is not there.
    """

    label: str
    load: Callable[[], Any]
    weight: float = 1.0
    second: Callable[[Any], dict[str, torch.Tensor]] | None = None


@dataclass(frozen=True, eq=False)
class Scorer:
    """How rows are scored: of these `rows`, for groups of pieces of `queries`, by a method.

    `side` is the side of projections, None for as wide as fits (`widest`), 0 for none. `apart` says of a model whether
    documents in one sequence see each other; it is asked where rows are packed. `seen` has, once a model was looked at,
    how many `numbers` a row's gradient has, the `share` of the trained numbers that it is of, and whether it was
    `shaped` by Adam's mean squares.
    """

    rows: Batches
    queries: Batches
    groups: Sequence[NDArray[np.int64]]
    method: Method
    ridge: float
    side: int | None
    seed: int
    device: str
    apart: Callable[[Any], bool] | None = None
    seen: dict[str, Any] = field(default_factory=dict)

    def scores(self, snapshots: Sequence[Snapshot], directory: Path) -> Scores:
        """Return the scores of all rows, (pieces, groups), in the order of `rows.pieces`: means over the snapshots.

        What is computed is kept in `directory`, from which another call goes on.
        """
        has_states = all(each.second is not None for each in snapshots)  # else their scores would not go together
        self.seen["shaped"] = self.method.shape is not None and (has_states or self.method.needs_shape)
        weights = np.array([each.weight if self.method.by_rate else 1.0 for each in snapshots])
        total = np.zeros((len(self.rows.pieces), len(self.groups)))
        for number, (snapshot, weight) in enumerate(zip(snapshots, weights / weights.sum(), strict=True)):
            total += weight * self._of_one(snapshot, number, directory)
        return total

    def gradients(self, snapshot: Snapshot, number: int) -> tuple[RowGradients, RowGradients]:
        """Return the gradients of rows, and of queries: the same but for the shape of Adam's step."""
        model = snapshot.load().to(self.device)
        if self.apart is not None and not self.apart(model):
            raise PlanError(
                f"documents in one sequence of {snapshot.label} may see each other", hint="Leave out --packing."
            )
        maps = maps_of(model)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.seen["share"] = sum(each.outs * each.ins for each in maps) / trained
        kept = len(self.rows.pieces) if self.method.solves else len(self.groups)
        side = widest(maps, kept) if self.side is None else self.side or None
        plain = maps_of(model)
        for index, (each, other) in enumerate(zip(maps, plain, strict=True)):
            if side is not None:
                each.project(self.seed + 7919 * number, index, side)
                other.left, other.right = each.left, each.right
        self._shape(snapshot, model, maps, plain)
        self.seen["numbers"] = RowGradients(model, maps).width
        return RowGradients(model, maps), RowGradients(model, plain)

    def _shape(self, snapshot: Snapshot, model: Any, rows: Sequence[Map], queries: Sequence[Map]) -> None:
        """Divide the gradients of rows, and of queries, by roots of Adam's mean squares, as the method says."""
        if not self.seen["shaped"]:
            return
        if snapshot.second is None:
            raise PlanError(
                f"{snapshot.label} has no state of its optimiser, by which less shapes gradients",
                hint="finetune --keep-checkpoints 2 keeps it; --method trak and cosine do without.",
            )
        second = snapshot.second(model)
        for row, query in zip(rows, queries, strict=True):
            root = row.oriented(second[f"{row.name}.weight"].float()).sqrt() + EPS
            row.scale = (1 / (root if self.method.shape == "rows" else root.sqrt())).contiguous()
            query.scale = row.scale if self.method.shape == "both" else None

    def _of_one(self, snapshot: Snapshot, number: int, directory: Path) -> Scores:
        """Return the scores by one snapshot."""
        rows_count = len(self.rows.pieces)
        scored = Ledger(directory / SCORES.format(number), rows=rows_count, width=len(self.groups))
        if scored.done == rows_count:
            scored.close()
            return _sorted(scored.read(), self.rows)
        with stage(f"loading {snapshot.label}"):
            rows, queries = self.gradients(snapshot, number)
        with queries.ready(), stage("the queries' gradients"):
            queries.check(next(iter(self.queries))[1])
            asked = gradients_of(self.queries, queries, self.groups)
        if self.method.solves:
            ledger = Ledger(directory / GRADIENTS.format(number), rows=rows_count, width=rows.width)
            self._fill(ledger, rows, lambda made: made)
            with stage(f"solving for {min(rows_count, rows.width):,} unknowns"):
                found = trak(ledger.read(), asked, ridge=self.ridge, free=available_memory("cpu"))
            scored.add(found[scored.done :].astype(np.float32))
            scored.close()
            ledger.remove()
        else:
            self._fill(scored, rows, lambda made: dots(made, asked, is_cosine=self.method.is_cosine))
        return _sorted(scored.read(), self.rows)

    def _fill(self, ledger: Ledger, gradients: RowGradients, kept: Callable[[Any], Any]) -> None:
        """Add to a ledger what is kept of the gradient of each row, of those that it does not have yet."""
        with gradients.ready(), stage("gradients of rows", len(self.rows.pieces), "rows") as count:
            for pieces, batch, counts, spans in _after(self.rows, ledger.done):
                count(len(pieces))
                made = kept(gradients(batch, counts, spans, taught=True).numpy())
                ledger.add(made.astype(np.float32))
        ledger.close()


def _after(rows: Batches, done: int) -> Iterator[Any]:
    """Yield the batches after `done` rows, which end a batch."""
    seen = 0
    for item in rows:
        seen += len(item[0])
        if seen > done:
            yield item


def _sorted(scores: NDArray[np.float32], rows: Batches) -> Scores:
    """Return scores in the order of the batches in that of `rows.pieces`."""
    result = np.empty(scores.shape)
    result[np.searchsorted(rows.pieces, rows.order())] = scores
    return result
