"""Shallower candidates of one model, measured against it: many in one streamed pass, without writing any.

The whole model runs once. Its states before each half layer are kept, so a candidate runs from its first missing half
on, and candidates that agree so far share their states: a tree of choices, walked once from the first half to the last.
A candidate is compared with the whole model token by token, on the full vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from surgeon.anatomy.halves import ATTENTION, HALVES, Half, Pairing, place
from surgeon.anatomy.outputs import check_adds, output_maps
from surgeon.errors import MeasureError, PlanError
from surgeon.measure.figure_sums import FigureSums, compare
from surgeon.measure.kept import Kept
from surgeon.measure.repair import Apply, Output, held_out, repair
from surgeon.models.halves import HalfLayers
from surgeon.models.passage import Batch
from surgeon.models.streaming import Progress, StreamedModel
from surgeon.processes import least, shared_rows, summed
from surgeon.search.figures import Figures

REPAIRS_BYTES = 1_000_000_000  # of solved maps that are kept for candidates of later calls


@dataclass
class Effort:
    """The work that was done: passes of all layers over the rows, and applications of the head to the rows."""

    passes: float = 0.0
    heads: int = 0


class Reference:
    """A whole model on rows of text, shape (R, T): its states before each half layer, and after the last.

    `real` is False for padding. Without `halves` only whole layers can be left out, of any model whose layers run
    alone. `against` is another model on the same rows that candidates are compared with, in place of this one: that of
    which this one is a narrower form.

    Raises MeasureError for a model that does not predict the next token, or whose layers are no halves.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokens: Tensor,
        *,
        real: Tensor | None = None,
        halves: bool = True,
        against: "Reference | None" = None,
        progress: Progress | None = None,
    ) -> None:
        model.check_predicts()
        self.model, self.tokens, self.effort = model, tokens, Effort()
        self.against = self if against is None else against
        self._halves = HalfLayers(model) if halves else None
        self.own = shared_rows(len(tokens))
        with torch.no_grad():
            self.batches = model.embed(tokens[self.own], None if real is None else real[self.own])
            self._kept = Kept(2 * model.depth + 1, self.batches)
            self._keep(progress)

    @cached_property
    def whole(self) -> Figures:
        """What the whole model is worth: its KL to itself is 0."""
        return self.measure([Pairing.of_layers(range(self.model.depth))])[0]

    @property
    def nbytes(self) -> int:
        """The bytes of the states of all rows."""
        return self._kept.nbytes

    def states(self, boundary: int) -> list[Tensor]:
        """Return the whole model's states before half `boundary`, a batch each: 2 i before layer i, 2 i + 1 inside it.

        The last, 2 L, are those after the last layer.
        """
        return self._kept.get(boundary)

    def measure(
        self, candidates: Sequence[Pairing], *, repair: "Fitting | None" = None, progress: Progress | None = None
    ) -> list[Figures]:
        """Return what each candidate is worth on the rows, in their order; with a `repair` each after its own.

        The text of the repair is that of a reference of the same model.
        """
        assert repair is None or repair.text.model is self.model, "both run in the same layers"
        for candidate in candidates:
            candidate.check(self.model.depth)
            if self._halves is None and not candidate.is_of_layers:
                raise MeasureError("a half layer was left out of a model whose layers are not known by halves")
        order = sorted(range(len(candidates)), key=lambda i: _signature(candidates[i], self.model.depth))
        figures: dict[int, Figures] = {}
        held = self.nbytes + (repair.text.nbytes if repair else 0)
        size = least(max(1, self.model.states_bytes // held))  # all processes walk together
        with torch.no_grad():
            for start in range(0, len(order), size):
                chunk = order[start : start + size]
                found = _Walk(self, [candidates[i] for i in chunk], progress, repair).run()
                figures |= dict(zip(chunk, found, strict=True))
        return [figures[i] for i in range(len(candidates))]

    @property
    def first_row(self) -> int:
        """The first of the rows that this process measures."""
        return int(self.own.start)

    def steps(self, index: int) -> tuple[tuple[tuple[Half, ...], float], ...]:
        """Return what runs together in a layer, each with its share of the layer's work."""
        if self._halves is None:
            return ((HALVES, 1.0),)
        shares = self._halves.shares[index]
        return tuple(((half,), shares[half]) for half in HALVES)

    def layer(self, index: int) -> "_Layer":
        """Return a context with a layer's weights in memory: a function from a step, a batch and states to the next."""
        return _Layer(self.model, self._halves, index)

    def _keep(self, progress: Progress | None) -> None:
        states = [batch.hidden for batch in self.batches]
        self._kept.put(0, states)
        for index in range(self.model.depth):
            with self.layer(index) as run:
                for step, share in self.steps(index):
                    states = [run(step, batch, state) for batch, state in zip(self.batches, states, strict=True)]
                    self._kept.put(place((index, step[-1])) + 1, states)
                    self.effort.passes += share / self.model.depth
            if progress:
                progress(self.tokens.numel())


Run = Callable[[tuple[Half, ...], Batch, Tensor], Tensor]


class _Layer:
    """A context with a layer's weights in memory, by halves where they are known."""

    def __init__(self, model: StreamedModel, halves: HalfLayers | None, index: int) -> None:
        self._context = (model if halves is None else halves).layer(index)
        self._is_whole = halves is None

    def __enter__(self) -> Run:
        apply = self._context.__enter__()

        def run(step: tuple[Half, ...], batch: Batch, states: Tensor) -> Tensor:
            if self._is_whole:
                return apply(batch, states)  # type: ignore[call-arg, arg-type]
            (half,) = step
            return apply(half, batch, states)  # type: ignore[call-arg, arg-type]

        return run

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)  # type: ignore[arg-type]


class Fitting:
    """How candidates are repaired before they are measured: by output maps that are solved on a text of its own.

    `text` is the same model on rows of that text; rows that are `held`, shape (R,), choose the ridge and decide whether
    a repair is taken. Without `held` one of every eight is. The map in front of what is missing is solved, of the half
    that runs last there (`surgeon.measure.repair`), and where that is an attention the MLP in front of it as well.
    Candidates that agree so far share their repairs.

    Raises PlanError for a model whose layers do not add what their output maps put out.
    """

    def __init__(self, text: Reference, held: Tensor | None = None) -> None:
        check_adds(text.model.anatomy)
        self.text = text
        self.held = held_out(len(text.tokens)) if held is None else held
        self._maps = output_maps(text.model.anatomy)
        self._known: dict[tuple[object, ...], Mapping[str, Tensor]] = {}
        self._nbytes = 0

    def seams(self, candidate: Pairing) -> "dict[int, _Seam]":
        """Return the halves of a candidate that are repaired, by their numbers.

        Raises PlanError where there is none that could make up for what is missing.
        """
        halves = candidate.halves
        kept = [*map(place, halves), 2 * self.text.model.depth]
        seams: dict[int, _Seam] = {}
        for at, half in enumerate(halves):
            if kept[at + 1] == kept[at] + 1:
                continue
            before = halves[at - 1] if at else None
            is_ahead = half[1] == ATTENTION and before in self._maps and kept[at - 1] == kept[at] - 1
            if is_ahead:
                seams[kept[at - 1]] = _Seam(kept[at + 1], is_ahead=True)
            if half in self._maps:
                seams[kept[at]] = _Seam(kept[at + 1])
            elif not is_ahead:
                raise PlanError(
                    f"the {half[1]} of layer {half[0]} has no one output map that could make up for what is missing",
                    hint="Leave out --compensate.",
                )
        return seams

    @contextmanager
    def repaired(
        self, key: tuple[object, ...], half: tuple[int, Half], apply: Apply, states: Sequence[Tensor], seam: "_Seam"
    ) -> Iterator[None]:
        """Return a context in which a half has the output map that a seam asks for.

        `states` are those of the text in front of what `apply` runs; `key` tells all that decides the repair.
        """
        known = self._maps[half]
        output = Output(self.text.model, known)
        with output.kept():
            if (tensors := self._known.get(key)) is None:
                wanted, held = self.text.states(seam.end), self.held[self.text.own]
                text = (self.text.batches, states, wanted, held)
                with self._following(half[0] + 1) if seam.is_ahead else nullcontext() as then:
                    tensors = repair(self.text.model, known, apply, *text, then=then).tensors
                self._nbytes += sum(tensor.nbytes for tensor in tensors.values())
                if self._nbytes < REPAIRS_BYTES:
                    self._known[key] = tensors
            elif tensors:
                output.put(tensors)
            yield

    @contextmanager
    def _following(self, index: int) -> Iterator[Apply]:
        """Return a context with the attention of the next layer in memory."""
        with self.text.layer(index) as run:
            yield partial(run, (ATTENTION,))


@dataclass(frozen=True, slots=True)
class _Seam:
    """The number of the half in front of which a repair wants the whole model's states.

    `is_ahead`: the next attention runs before what is missing.
    """

    end: int
    is_ahead: bool = False


@dataclass
class _Path:
    """Candidates that agree so far, by their numbers, and their states, a batch each.

    `states` is None as long as they are the whole model's; `fitted` are those of the text of a fitting.
    """

    members: list[int]
    states: list[Tensor] | None = None
    fitted: list[Tensor] | None = None


class _Walk:
    """One walk through the tree of the choices that candidates make, from the first half to the last."""

    def __init__(
        self,
        reference: Reference,
        candidates: Sequence[Pairing],
        progress: Progress | None,
        fitting: Fitting | None,
    ) -> None:
        self._of, self._progress, self._fitting = reference, progress, fitting
        self._kept = [frozenset(candidate.halves) for candidate in candidates]
        self._seams = [fitting.seams(candidate) if fitting else {} for candidate in candidates]
        self._count = len(candidates)

    def run(self) -> list[Figures]:
        model = self._of.model
        paths = [_Path(list(range(self._count)))]
        for index in range(model.depth):
            if any(self._runs(path, index) for path in paths):
                with self._of.layer(index) as run:
                    for step, share in self._of.steps(index):
                        paths = list(self._after(paths, index, step, share, run))
            else:
                for step, _ in self._of.steps(index):
                    paths = list(self._after(paths, index, step, 0.0, None))
        return self._judged(paths)

    def _runs(self, path: _Path, index: int) -> bool:
        """Return whether some candidate of a path goes through a half of a layer, or is repaired in it."""
        halves = [(index, half) for half in HALVES]
        if path.states is None:
            return any(place(half) in self._seams[member] for member in path.members for half in halves)
        return any(half in self._kept[member] for member in path.members for half in halves)

    def _after(
        self, paths: Sequence[_Path], index: int, step: tuple[Half, ...], share: float, run: Run | None
    ) -> Iterator[_Path]:
        """Yield the paths after a step: candidates that keep it go through, the others pass it by."""
        boundary = place((index, step[0]))
        for path in paths:
            keeping: dict[_Seam | None, list[int]] = {}  # by what they are repaired for behind the step
            skipping = []
            for member in path.members:
                if (index, step[0]) in self._kept[member]:
                    keeping.setdefault(self._seams[member].get(place((index, step[-1]))), []).append(member)
                else:
                    skipping.append(member)
            if skipping:
                yield _Path(skipping, *self._before(path, boundary))
            for seam, members in keeping.items():
                if seam is None and path.states is None:
                    yield _Path(members)
                    continue
                assert run is not None, "a layer that a path goes through is in memory"
                yield self._through(_Path(members, *self._before(path, boundary)), (index, step), share, run, seam)

    def _before(self, path: _Path, boundary: int) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the states of a path in front of a half, also where they are the whole model's: judged and fitted."""
        if path.states is not None:
            return path.states, path.fitted
        return self._of.states(boundary), self._fitting.text.states(boundary) if self._fitting else None

    def _through(
        self, path: _Path, step: tuple[int, tuple[Half, ...]], share: float, run: Run, seam: _Seam | None
    ) -> _Path:
        """Return a path behind a step, which is repaired first where there is a seam."""
        index, halves = step
        fitting, apply = self._fitting, partial(run, halves)
        assert path.states is not None, "what goes through a step has states"
        with ExitStack() as stack:
            if fitting is not None and seam is not None:
                assert path.fitted is not None, "there are states to fit"
                so_far = sorted(place(half) for half in self._kept[path.members[0]])
                key = (tuple(half for half in so_far if half <= place((index, halves[-1]))), seam)
                stack.enter_context(fitting.repaired(key, (index, halves[-1]), apply, path.fitted, seam))
                fitting.text.effort.passes += share / self._of.model.depth
            moved = self._moved(self._of, apply, path.states, share)
            fitted = (
                None if fitting is None or path.fitted is None else self._moved(fitting.text, apply, path.fitted, share)
            )
        return _Path(path.members, moved, fitted)

    def _moved(self, of: Reference, apply: Apply, states: Sequence[Tensor], share: float) -> list[Tensor]:
        """Return the states behind a step on the rows of a reference, and count the work."""
        of.effort.passes += share / of.model.depth
        if self._progress:
            self._progress(round(share * of.tokens.numel()))
        return [apply(batch, state) for batch, state in zip(of.batches, states, strict=True)]

    def _judged(self, paths: Sequence[_Path]) -> list[Figures]:
        of, against = self._of, self._of.against
        judged = [FigureSums(len(of.tokens)) for _ in paths]
        whole = against.states(2 * against.model.depth)
        if against is not of:  # a candidate with all halves is not the model that it is compared with
            last = of.states(2 * of.model.depth)
            paths = [path if path.states is not None else _Path(path.members, last) for path in paths]
        with against.model.head() as true_head, nullcontext(true_head) if against is of else of.model.head() as head:
            at = of.first_row
            for number, batch in enumerate(of.batches):
                for sums, path in zip(judged, paths, strict=True):
                    sums.begin(at, None if path.states is None else path.states[number])
                compare(head, batch, whole[number], judged, true_head=true_head)
                at += len(batch.tokens)
        of.effort.heads += 1 + sum(path.states is not None for path in paths)
        found: dict[int, Figures] = {}
        for path, sums in zip(paths, judged, strict=True):
            sums.values = summed(sums.values)
            found |= dict.fromkeys(path.members, sums.figures())
        return [found[i] for i in range(self._count)]


def _signature(candidate: Pairing, depth: int) -> tuple[bool, ...]:
    """Return which halves are kept, so that sorted candidates stand beside those that they share most with."""
    kept = set(candidate.halves)
    return tuple((layer, half) in kept for layer in range(depth) for half in HALVES)
