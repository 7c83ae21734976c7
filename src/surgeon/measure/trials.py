"""Cuts of a search, measured on the rows of its stages: halves by the streamed tree, widths as plans not written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.halves import Pairing
from surgeon.checkpoint.source import Source
from surgeon.measure.candidates import Effort, Fitting, Reference
from surgeon.measure.compensation import Rows
from surgeon.measure.scoring import streamed_model
from surgeon.models.streaming import StreamedModel
from surgeon.plan.planned import PlannedSource
from surgeon.progress import stage as announced
from surgeon.search.budget import full_sizes, pairing_of
from surgeon.search.cuts import Candidate, Widths
from surgeon.search.figures import Figures
from surgeon.transforms.prune import prune
from surgeon.transforms.scores import CONTRIBUTION

MOST_REFERENCES = 2  # stages whose whole model's states are kept
MOST_FINISHED = 4  # results of narrower cuts that are kept


class Trials:
    """Measures cuts of a source. `rows` are tokens, shape (R, T), by stage.

    `values` are the importances of positions by `criterion`: they decide what a narrower cut keeps. With `fit`, rows of
    a text of their own, every cut is repaired before it is measured, but in the stages that are `bare`. Cuts of the
    whole width are repaired in front of their seams, within the tree; a narrower one has to be repaired in every layer,
    so `finish` returns its result as a source.
    """

    def __init__(
        self,
        source: Source,
        anatomy: Anatomy,
        rows: Mapping[str, Tensor],
        *,
        device: str,
        halves: bool,
        values: Mapping[str, Any] | None = None,
        criterion: str = CONTRIBUTION,
        fit: Rows | None = None,
        finish: Callable[[Candidate], Source] | None = None,
        bare: Sequence[str] = (),
    ) -> None:
        self._source, self._anatomy, self._rows = source, anatomy, rows
        self._device, self._halves, self._values, self._criterion = device, halves, values, criterion
        self._fit, self._bare = fit, frozenset(bare)
        self._fitting: Fitting | None = None
        self._finish, self._finished = finish, dict[Candidate, Source]()
        self._model: StreamedModel | None = None
        self._references: dict[str, Reference] = {}
        self._spent = Effort()

    @property
    def effort(self) -> Effort:
        """The work so far, in passes of the whole model over the rows of each stage."""
        spent = Effort(self._spent.passes, self._spent.heads)
        for reference in self._references.values():
            spent.passes += reference.effort.passes
            spent.heads += reference.effort.heads
        return spent

    def measure(self, stage: str, candidates: Sequence[Candidate]) -> list[Figures]:
        """Return the figures of cuts on the rows of a stage, in their order: cuts of one width share what they can."""
        by_widths: dict[Widths, list[Candidate]] = {}
        for each in candidates:
            by_widths.setdefault(each.widths, []).append(each)
        found: dict[Candidate, Figures] = {}
        with announced(f"measuring {len(candidates)} cuts" if len(candidates) > 1 else "measuring a cut"):
            for widths, cuts in by_widths.items():
                found |= dict(zip(cuts, self._figures(stage, widths, cuts), strict=True))
        return [found[each] for each in candidates]

    def _figures(self, stage: str, widths: Widths, cuts: Sequence[Candidate]) -> list[Figures]:
        whole = self._reference(stage)
        pairings = [pairing_of(self._anatomy, each) for each in cuts]
        is_bare = self._fit is None or stage in self._bare
        if not widths:
            return whole.measure(pairings, repair=None if is_bare else self._repair())
        if not is_bare:
            return [self._of_result(stage, each) for each in cuts]
        sizes = full_sizes(self._anatomy, widths)
        plan = prune(self._anatomy, sizes=sizes, criterion=self._criterion, values=self._values)
        return self._against(stage, PlannedSource(self._source, plan), pairings)

    def _of_result(self, stage: str, cut: Candidate) -> Figures:
        """Return what a narrower cut is worth once it is repaired: in all its layers, so as a result of its own."""
        assert self._finish is not None, "narrower cuts are repaired"
        if cut not in self._finished:
            if len(self._finished) >= MOST_FINISHED:
                del self._finished[next(iter(self._finished))]
            self._finished[cut] = self._finish(cut)
        kept = self._anatomy.depth - len(cut.pieces)
        return self._against(stage, self._finished[cut], [Pairing.of_layers(range(kept))])[0]

    def _against(self, stage: str, narrow: Source, pairings: Sequence[Pairing]) -> list[Figures]:
        """Return what cuts of a narrower model are worth, beside the whole model that it comes from."""
        model = streamed_model(narrow, self._device, resident=len(pairings) > 1)
        reference = Reference(model, self._rows[stage], halves=self._halves, against=self._reference(stage))
        figures = reference.measure(pairings)
        self._spent.passes += reference.effort.passes
        self._spent.heads += reference.effort.heads
        return figures

    def _repair(self) -> Fitting:
        """Return how cuts of the whole width are repaired."""
        if self._fitting is None:
            assert self._fit is not None
            assert self._model is not None, "a cut is measured on it"
            text = Reference(self._model, self._fit.tokens, real=self._fit.real, halves=self._halves)
            self._fitting = Fitting(text, self._fit.held)
        return self._fitting

    def _reference(self, stage: str) -> Reference:
        """Return the whole model on the rows of a stage; of a few stages it is kept."""
        if stage not in self._references:
            if self._model is None:
                self._model = streamed_model(self._source, self._device, resident=True)
            if len(self._references) >= MOST_REFERENCES:
                gone = self._references.pop(next(iter(self._references)))
                self._spent.passes += gone.effort.passes
                self._spent.heads += gone.effort.heads
            self._references[stage] = Reference(self._model, self._rows[stage], halves=self._halves)
        return self._references[stage]
