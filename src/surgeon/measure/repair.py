"""Solve one output map of a model anew while its layer is in memory, and take the solution where it helps."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.anatomy.outputs import OutputMap
from surgeon.errors import MeasureError
from surgeon.measure.refit import LINEAR_RIDGE, RIDGES, Error, Sums, solve
from surgeon.models.device import wide
from surgeon.models.passage import Batch
from surgeon.models.streaming import SAME, StreamedModel
from surgeon.plan.arithmetic import TORCH_DTYPES
from surgeon.processes import of_the_first

Apply = Callable[[Batch, Tensor], Tensor]
IN_EACH = 8  # rows, of which one is held out


def held_out(num_rows: int) -> Tensor:
    """Return which rows no fit sees, shape (R,): one of every eight, the last of fewer. Raises MeasureError for one.

    Its place among the eight changes, so that of texts that come in turns it is not always the same one.
    """
    if num_rows < 2:
        raise MeasureError(
            f"{num_rows} row of text; a compensation needs one to fit and one to be judged by",
            hint="Give more text with --data, or shorter rows with --sequence-length.",
        )
    if num_rows < IN_EACH:
        return torch.arange(num_rows) == num_rows - 1
    group, place = torch.arange(num_rows) // IN_EACH, torch.arange(num_rows) % IN_EACH
    return place == (IN_EACH - 1 - 3 * group) % IN_EACH


@dataclass(frozen=True)
class Repair:
    """A solved map: its tensors by name, in the stored dtype, and what it changed. Errors are before and after.

    They are of the states behind what is missing, relative to the source's, on the rows of the fit and on held-out
    rows. Where it does not lower the latter it is not taken: there are no tensors then, and the old ones stay.
    """

    tensors: Mapping[str, Tensor]
    ridge: float
    fit: tuple[float, float]
    held: tuple[float, float]
    num_tokens: tuple[int, int]  # of the fit, and held out

    @property
    def is_taken(self) -> bool:
        """Whether the map is solved, and not left as it was."""
        return bool(self.tensors)


def repair(
    model: StreamedModel,
    known: OutputMap,
    apply: Apply,
    batches: Sequence[Batch],
    states: Sequence[Tensor],
    wanted: Sequence[Tensor],
    held: Tensor,
    *,
    then: Apply | None = None,
    ridges: Sequence[float] = RIDGES,
) -> Repair:
    """Return the repair of an output map: with it `apply` brings the states as close to those `wanted` as it can.

    All are a batch each. `held`, shape (R,), says which rows only judge. Where the repair is taken, the module has the
    new weights as long as its layer is in memory. With `then`, the states are wanted behind that, which runs next: the
    fit takes it to add what it adds now, and the repair is judged by what it truly adds. `ridges` are those to try.

    Raises MeasureError where the layer does not add just what the map puts out, times a constant.
    """
    output = Output(model, known)
    text = _Text(batches, states, wanted, held)
    scale = output.scale(apply, batches[0], states[0])
    fit, judge = text.sums(output, scale, apply, then)
    if not (math.isfinite(fit.error()) and math.isfinite(judge.error())):
        raise MeasureError(
            f"the states of {model.label} are no numbers in front of {known.weight!r}, or too large for one",
            hint="Is the checkpoint whole? surgeon evaluate measures its perplexity.",
        )
    solution = solve(fit, judge, ridges)
    old, change = wide(output.columns), of_the_first(solution.change)
    is_linear = solution.ridge == LINEAR_RIDGE
    if is_linear:  # what float32 and the ridge have left of it is solved once more
        with output.kept():
            output.put(output.rounded(old + change.to(old.device), torch.float32))
            change = change + of_the_first(text.sums(output, scale, apply, then)[0].solve(LINEAR_RIDGE))
    dtype = TORCH_DTYPES[model.anatomy.spec.tensors[known.weight].dtype]
    tensors = output.rounded(old + change.to(old.device), dtype)
    if then is None and not is_linear:
        change = (output.columns_of(tensors).to(old) - old).to(change)
        errors = fit.error(change), judge.error(change)
    else:  # the sums do not say it, or not to enough digits
        with output.kept():
            output.put(tensors)
            errors = text.errors(apply, then)
    if is_taken := errors[1] < judge.error():
        output.put(tensors)
    pairs = (fit.error(), errors[0]), (judge.error(), errors[1])
    return Repair(tensors if is_taken else {}, solution.ridge, *pairs, (fit.num_rows, judge.num_rows))


@dataclass(frozen=True, eq=False)
class _Text:
    """Batches, their states in front of what is repaired, those that are wanted, and which rows are held out."""

    batches: Sequence[Batch]
    states: Sequence[Tensor]
    wanted: Sequence[Tensor]
    held: Tensor

    def rows(self) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
        """Yield each batch, its states, those that are wanted, and which of its tokens are held out, (N,)."""
        at = 0
        for batch, before, aim in zip(self.batches, self.states, self.wanted, strict=True):
            rows = self.held[at : at + len(batch.tokens), None].expand(batch.tokens.shape).to(before.device)
            at += len(batch.tokens)
            yield batch, before, aim, batch.chosen(rows)

    def sums(self, output: "Output", scale: float, apply: Apply, then: Apply | None) -> tuple[Sums, Sums]:
        """Return the sums for an output map that `apply` runs: over the rows of the fit, and over those held out."""
        fit, judge = (Sums(output.columns.shape, constant=output.has_bias) for _ in range(2))
        for batch, before, aim, is_held in self.rows():
            with output.seen() as last:
                after = apply(batch, before)
            features = scale * output.inputs(batch.chosen(last[0].view(*after.shape[:-1], -1)))
            reached = batch.chosen(after if then is None else then(batch, after))
            for sums, chosen in ((fit, ~is_held), (judge, is_held)):
                sums.add(features[chosen], reached[chosen], batch.chosen(aim)[chosen], first_tokens(batch)[chosen])
        fit.add_up()
        judge.add_up()
        return fit, judge

    def errors(self, apply: Apply, then: Apply | None) -> tuple[float, float]:
        """Return the errors of the states behind both: on the rows of the fit, and on those held out."""
        fit, judge = Error(), Error()
        for batch, before, aim, is_held in self.rows():
            after = apply(batch, before)
            reached = batch.chosen(after if then is None else then(batch, after))
            for error, chosen in ((fit, ~is_held), (judge, is_held)):
                error.add(reached[chosen], batch.chosen(aim)[chosen], first_tokens(batch)[chosen])
        fit.add_up()
        judge.add_up()
        return fit.value(), judge.value()


def first_tokens(batch: Batch) -> Tensor:
    """Return which of a batch's tokens that are no padding are the first of their rows, shape (N,)."""
    real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.real is None else batch.real
    return (real & (real.cumsum(-1) == 1))[real]


class Output:
    """The module of an output map whose weights are in memory."""

    def __init__(self, model: StreamedModel, known: OutputMap) -> None:
        self._known, self._label = known, model.label
        modules: dict[str, nn.Module] = dict(model.module(known.layer).named_modules())
        module = modules.get(known.module)
        shape = getattr(getattr(module, "weight", None), "shape", None)
        if module is None or shape != model.anatomy.spec.tensors[known.weight].shape:
            raise MeasureError(
                f"transformers keeps {known.weight!r} of {model.label} in another form than the files",
                hint=UNCOMPENSATED,
            )
        self.module = module
        assert (getattr(module, "bias", None) is None) == (known.bias is None)

    @property
    def has_bias(self) -> bool:
        """Whether the map has a bias."""
        return self._known.bias is not None

    @property
    def columns(self) -> Tensor:
        """The weight, shape (inputs, outputs), and below it the bias where there is one: (P, D)."""
        return self._columns(self.module.weight, getattr(self.module, "bias", None))

    def columns_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return these tensors of the map, by their names in the files, as `columns` are."""
        return self._columns(tensors[self._known.weight], tensors.get(self._known.bias or ""))

    def _columns(self, weight: Any, bias: Any) -> Tensor:
        columns: Tensor = weight if self._known.reads == 0 else weight.T
        return columns if bias is None else torch.cat([columns, bias[None]])

    def inputs(self, seen: Tensor) -> Tensor:
        """Return inputs of the map, (N, inputs), with a constant one beside them where there is a bias: (N, P)."""
        return seen if self._known.bias is None else torch.cat([seen, torch.ones_like(seen[:, :1])], dim=-1)

    def rounded(self, columns: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return tensors of the map, given as `columns` are, in a stored dtype, by their names in the files."""
        new, bias = columns.to(dtype).cpu(), self._known.bias
        weight = new if bias is None else new[:-1]
        tensors = {self._known.weight: (weight if self._known.reads == 0 else weight.T).contiguous()}
        return tensors if bias is None else tensors | {bias: new[-1].clone()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Make these the tensors of the module, as long as its layer is in memory."""
        for name, key in ((self._known.weight, "weight"), (self._known.bias, "bias")):
            if name is not None:
                old = self.module._parameters[key]
                assert old is not None
                new = tensors[name].to(old.device, old.dtype)
                self.module._parameters[key] = nn.Parameter(new, requires_grad=False)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Return a context behind which the module has its weights of before."""
        before = dict(self.module._parameters)
        try:
            yield
        finally:
            self.module._parameters.update(before)

    @contextmanager
    def seen(self) -> Iterator[list[Tensor]]:
        """Return a context whose list holds the input and the output of the map's last call."""
        last: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            last[:] = [args[0], output.clone()]  # a parallel block adds to it in place

        handle = self.module.register_forward_hook(hook)
        try:
            yield last
        finally:
            handle.remove()

    def scale(self, apply: Apply, batch: Batch, states: Tensor) -> float:
        """Return by what the layer multiplies the map's output before it adds it. Raises MeasureError for no constant.

        It is found on the rows themselves: with the map's output, and with zeros in its place.
        """
        with self.seen() as last:
            whole = apply(batch, states)
        output = last[1]
        if not bool(output.any()):  # any other would do as well
            draw = torch.Generator().manual_seed(0)
            output = torch.randn(output.shape, generator=draw).to(output)
            with _answering(self.module, output):
                whole = apply(batch, states)
        with _answering(self.module, torch.zeros_like(output)):
            without = apply(batch, states)
        put_out = batch.chosen(output.view(whole.shape)).float()
        after, before = batch.chosen(whole).float(), batch.chosen(without).float()
        scale = float(((after - before) * put_out).sum() / put_out.square().sum())
        left = float((after - before - scale * put_out).norm())
        rounding = torch.finfo(whole.dtype).eps * float(after.norm())
        if not left <= SAME[whole.dtype.itemsize] * float((after - before).norm()) + rounding:
            raise MeasureError(
                f"layer {self._known.layer} of {self._label} does not add what {self._known.module} puts out, times a "
                "constant, so no change of that map makes up for what is missing",
                hint=UNCOMPENSATED,
            )
        return scale


UNCOMPENSATED = "Leave out --compensate."


@contextmanager
def _answering(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Return a context in which a module puts out this."""
    handle = module.register_forward_hook(lambda *_: output.clone())
    try:
        yield
    finally:
        handle.remove()
