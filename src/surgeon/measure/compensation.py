"""Compensate a cut without training: solve the output maps in front of what is missing, one after the other.

The source and its cut run side by side on the same rows, with one layer of each in memory. Before a map of the cut is
solved (`surgeon.measure.refit`), all before it are solved already: what it reads is what the result will give it. Rows
that no sum of the fit sees choose the ridge, and decide whether the new map is taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.outputs import OutputMap
from surgeon.errors import MeasureError
from surgeon.measure.refit import Sums, solve
from surgeon.models.passage import Batch, silenced
from surgeon.models.streaming import SAME, Progress, StreamedModel
from surgeon.plan.arithmetic import TORCH_DTYPES
from surgeon.transforms.seams import Site, Sites

UNCOMPENSATED = "Leave out --compensate."
Apply = Callable[[Batch, Tensor], Tensor]


@dataclass(frozen=True)
class Repair:
    """A solved map: its tensors by name, in the stored dtype, and what it changed. Errors are before and after.

    They are of the states behind what is missing, relative to the source's, on the rows of the fit and on held-out
    rows. Where it did not lower the latter it `is_taken` not: the tensors are empty then, and the old ones stay.
    """

    site: Site
    tensors: Mapping[str, Tensor]
    ridge: float
    fit: tuple[float, float]
    held: tuple[float, float]
    num_tokens: int
    is_taken: bool


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of tokens, shape (R, T): those of the fit, and those that it does not see. `real` are False for padding."""

    fit: Tensor
    held: Tensor
    fit_real: Tensor | None = None
    held_real: Tensor | None = None


def compensate(
    source: StreamedModel, result: StreamedModel, rows: Rows, sites: Sites, *, progress: Progress | None = None
) -> Iterator[Repair]:
    """Yield a repair for each of the sites of `result`, a cut of `source`, from the first layer to the last.

    Raises MeasureError where a layer does not add just what its output map puts out, times a constant.
    """
    by_layer: dict[int, list[Site]] = {}
    for site in sites.sites:
        by_layer.setdefault(site.map.layer, []).append(site)
    with torch.no_grad():
        wanted = _Source(source, _embedded(source, rows), progress)
        batches = _embedded(result, rows)
        num_fit = len(rows.fit)
        states = [batch.hidden for batch in batches]
        for layer in range(max(by_layer, default=-1) + 1):
            with result.layer(layer) as apply:
                for site in by_layer.get(layer, ()):
                    at = _hidden(wanted.before(site.end), sites.hidden)
                    yield _repaired(result, apply, site, batches, states, at, num_fit)
                states = _applied(apply, batches, states, progress)


def _embedded(model: StreamedModel, rows: Rows) -> list[Batch]:
    """Return the batches of the fit, and those of the held-out rows after them."""
    return [*model.embed(rows.fit, rows.fit_real), *model.embed(rows.held, rows.held_real)]


def _applied(apply: Apply, batches: Sequence[Batch], states: list[Tensor], progress: Progress | None) -> list[Tensor]:
    """Return the states behind a layer; those before it are freed one by one."""
    for number, batch in enumerate(batches):
        states[number] = apply(batch, states[number])
        if progress:
            progress(batch.tokens.numel())
    return states


def _hidden(states: Sequence[Tensor], positions: Sequence[int] | None) -> Sequence[Tensor]:
    return states if positions is None else [state[..., list(positions)] for state in states]


class _Source:
    """The states of the source on the rows, in front of one of its halves after the other."""

    def __init__(self, model: StreamedModel, batches: Sequence[Batch], progress: Progress | None) -> None:
        self._model, self._batches, self._progress = model, batches, progress
        self._layer = 0  # in front of which the states stand
        self._states = [batch.hidden for batch in batches]
        self._between: tuple[int, list[Tensor]] | None = None  # a layer, and the states between its halves

    def before(self, half: int) -> list[Tensor]:
        """Return the states in front of a half of this number; the numbers never fall."""
        while self._layer < half // 2:
            with self._model.layer(self._layer) as apply:
                self._states = _applied(apply, self._batches, self._states, self._progress)
            self._layer += 1
        if half % 2 == 0:
            return self._states
        if self._between is None or self._between[0] != self._layer:
            with self._model.layer(self._layer) as apply, without_mlp(self._model, self._layer):
                between = [apply(*each) for each in zip(self._batches, self._states, strict=True)]
            self._between = self._layer, between
        return self._between[1]


@contextmanager
def without_mlp(model: StreamedModel, layer: int) -> Iterator[None]:
    """Return a context in which a layer ends in front of its MLP, which puts out zeros."""
    with silenced(_mlp(model, model.anatomy, layer)):
        yield


def _mlp(model: StreamedModel, anatomy: Anatomy, layer: int) -> nn.Module:
    """Return the module that is a layer's whole MLP, also one of experts."""
    paths = [
        place[1].split(".")[:-1]
        for name, (_, part) in anatomy.rows.items()
        if part == "mlp" and (place := anatomy.locate(name)) and place[0] == layer
    ]
    shared = []
    for words in zip(*paths, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    path = ".".join(shared)
    known: dict[str, nn.Module] = dict(model.module(layer).named_modules())
    if not path or path not in known:
        raise MeasureError(f"the MLP of layer {layer} of {model.label} is no one module", hint=UNCOMPENSATED)
    return known[path]


# --- one map --------------------------------------------------------------------------------------------------


class Output:
    """The output map of a half of a layer whose weights are in memory."""

    def __init__(self, model: StreamedModel, known: OutputMap) -> None:
        self._known, self._label = known, model.label
        modules = dict(model.module(known.layer).named_modules())
        spec = model.anatomy.spec.tensors[known.weight]
        module = modules.get(known.module)
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, Tensor) or tuple(weight.shape) != spec.shape:
            raise MeasureError(
                f"transformers keeps {known.weight!r} of {model.label} in another form than the files",
                hint=UNCOMPENSATED,
            )
        self.module: nn.Module = module
        self._inputs: list[Tensor] = []

    @property
    def columns(self) -> Tensor:
        """The weight, shape (inputs, outputs), and below it the bias where there is one: (P, D)."""
        return self.columns_of(
            {self._known.weight: self.module.weight, self._known.bias: getattr(self.module, "bias", None)}
        )

    def columns_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return these tensors of the map, by their names in the files, as `columns` are."""
        return self._columns(tensors[self._known.weight], tensors.get(self._known.bias or ""))

    def _columns(self, weight: Any, bias: Any) -> Tensor:
        columns: Tensor = weight if self._known.reads == 0 else weight.T
        return columns if self._known.bias is None else torch.cat([columns, bias[None]])

    def inputs(self, seen: Tensor) -> Tensor:
        """Return inputs of the map, (N, inputs), with a constant one beside them where there is a bias: (N, P)."""
        return seen if self._known.bias is None else torch.cat([seen, torch.ones_like(seen[:, :1])], dim=-1)

    @contextmanager
    def seen(self) -> Iterator[list[Tensor]]:
        """Return a context whose list holds the input and the output of the map's last call."""
        last: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            last[:] = [args[0], output]

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
def _answering(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Return a context in which a module puts out this."""
    handle = module.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()


def first_tokens(batch: Batch) -> Tensor:
    """Return which of a batch's tokens that are no padding are the first of their rows, shape (N,)."""
    real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.real is None else batch.real
    return (real & (real.cumsum(-1) == 1))[real]


def _repaired(
    result: StreamedModel,
    apply: Apply,
    site: Site,
    batches: Sequence[Batch],
    states: Sequence[Tensor],
    wanted: Sequence[Tensor],
    num_fit: int,
) -> Repair:
    """Return the repair of a map whose layer is in memory; where it is taken, the layer has the new weights."""
    output = Output(result, site.map)
    is_first_half = site.map.half == "attention"
    with without_mlp(result, site.map.layer) if is_first_half else nullcontext():
        scale = output.scale(apply, batches[0], states[0])
        fit, held = (Sums(constant=site.map.bias is not None) for _ in range(2))
        seen = 0
        for batch, before, aim in zip(batches, states, wanted, strict=True):
            with output.seen() as last:
                after = apply(batch, before)
            inputs = output.inputs(batch.chosen(last[0].view(*after.shape[:-1], -1)))
            sums = fit if seen < num_fit else held
            sums.add(scale * inputs, batch.chosen(after), batch.chosen(aim), first_tokens(batch))
            seen += len(batch.tokens)
    dtype = TORCH_DTYPES[result.anatomy.spec.tensors[site.map.weight].dtype]
    return taken(output, site, fit, held, dtype)


def taken(output: Output, site: Site, fit: Sums, held: Sums, dtype: torch.dtype) -> Repair:
    """Return the repair that the sums ask for. Where it lowers the error on held-out rows, the module has it now."""
    solution = solve(fit, held)
    old = output.columns.double()
    tensors = output.rounded(old + solution.change.to(old.device), dtype)
    change = (output.columns_of(tensors).to(old) - old).to(solution.change)  # after rounding: that is what is measured
    errors = (fit.error(), fit.error(change)), (held.error(), held.error(change))
    is_taken = errors[1][1] < errors[1][0]
    if is_taken:
        output.put(tensors)
    return Repair(site, tensors if is_taken else {}, solution.ridge, *errors, fit.num_rows, is_taken)
