"""Merge experts into those that stay: their output maps are solved anew, for what the whole layer put out before.

The source and its cut run side by side on the same rows, with one layer of each in memory. The cut's router has the
rows of the kept experts, so a token that lost an expert goes to others, with other gates. Then expert after expert gets
the output map W that brings the states behind the layer closest to the source's, given what the other experts put out:

    minimise  sum over tokens routed to it of  v^2 |g W a - (t - rest)|^2,  with a ridge towards its own old W

where a are its neurons, g its gate for the token, t the source's state behind the layer and v its weight. Routers, and
the projections in front of the neurons, stay. Source: MergeMoE, arXiv:2510.14436, which merges experts by least squares
in their outputs; weights, ridge and its choice are those of `surgeon.measure.refit`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgeon.anatomy.halves import MLP, place
from surgeon.errors import MeasureError
from surgeon.measure.compensation import Rows, SourceStates, States
from surgeon.measure.refit import Error, Sums, solve
from surgeon.measure.repair import Apply, first_tokens
from surgeon.models.device import wide
from surgeon.models.experts import Experts
from surgeon.models.passage import Batch
from surgeon.models.streaming import SAME, Progress, StreamedModel
from surgeon.plan.arithmetic import TORCH_DTYPES
from surgeon.processes import of_the_first
from surgeon.transforms.merging import DROP_THEM, ExpertOutputs, expert_outputs


@dataclass(frozen=True)
class MergedLayer:
    """A layer whose experts were solved: its tensors by name, in the stored dtype, and what that changed.

    `ridges` has an entry for each expert whose new map was taken: it lowers the error on rows that the fit did not see.
    Errors are of the states behind the layer, relative to the source's, before and after, on the rows of the fit and on
    the others. `num_tokens` counts those rows' tokens.
    """

    layer: int
    tensors: Mapping[str, Tensor]
    ridges: Mapping[int, float]
    fit: tuple[float, float]
    held: tuple[float, float]
    num_tokens: tuple[int, int]


def merge_experts(
    source: StreamedModel, result: StreamedModel, rows: Rows, layers: Sequence[int], *, progress: Progress | None = None
) -> Iterator[MergedLayer]:
    """Yield each layer of `result` that has experts, merged; layer j is to leave the states of source layer layers[j].

    Held-out rows are not fitted: they choose ridges and judge. Raises MeasureError where a layer does not add what its
    experts put out, times a constant.
    """
    outputs = expert_outputs(result.anatomy)
    with torch.no_grad():
        rows = rows.own()
        wanted, batches = SourceStates(source, rows, progress), result.embed(rows.tokens, rows.real)
        states = States.of(batches)
        for layer in range(result.depth):
            goals = wanted.before(place((layers[layer], MLP)) + 1, keep=False)
            with result.layer(layer) as apply:
                if layer in outputs:
                    merging = _Merging(result, layer, outputs[layer], apply)
                    yield merging.merged(batches, states, goals, rows.held)
                states.move(apply, batches, progress)


@dataclass
class _Tokens:
    """The tokens of a batch that are no padding, N of them: what reaches the experts, and the states behind the layer.

    `hidden` (N, D) goes into the experts, `chosen` and `gates` (N, K) are the router's; `states` (N, D) are as they
    are, `goals` (N, D) as they are wanted; `first` (N,) are the first tokens of rows, `held` (N,) those of rows that
    only judge.
    """

    hidden: Tensor
    chosen: Tensor
    gates: Tensor
    states: Tensor
    goals: Tensor
    first: Tensor
    held: Tensor


class _Merging:
    """The experts of a layer of the cut whose weights are in memory."""

    def __init__(self, model: StreamedModel, layer: int, outputs: ExpertOutputs, apply: Apply) -> None:
        self._layer, self._outputs, self._apply = layer, outputs, apply
        self._label = f"layer {layer} of {model.label}"
        self._experts = Experts(model.module(layer), self._label, is_transposed=outputs.is_transposed, hint=DROP_THEM)
        self._dtype = TORCH_DTYPES[model.anatomy.spec.tensors[outputs.weights[0]].dtype]

    def merged(
        self, batches: Sequence[Batch], states: Sequence[Tensor], goals: Sequence[Tensor], held: Tensor
    ) -> MergedLayer:
        """Return the layer with its experts solved one after the other; the module has the new maps."""
        scale = self._scale(batches[0], states[0])
        sides = torch.split(held, [len(batch.tokens) for batch in batches])
        tokens = [self._tokens(*each) for each in zip(batches, states, goals, sides, strict=True)]
        before = [_error(tokens, held=side) for side in (False, True)]
        solved = {expert: self._solved(expert, scale, tokens) for expert in range(len(self._experts))}
        ridges = {expert: ridge for expert, ridge in solved.items() if ridge is not None}
        after = [_error(tokens, held=side) for side in (False, True)]
        fit, judged = ((one.value(), other.value()) for one, other in zip(before, after, strict=True))
        counts = before[0].num_rows, before[1].num_rows
        return MergedLayer(self._layer, self._tensors(tuple(ridges)), ridges, fit, judged, counts)

    def _solved(self, expert: int, scale: float, tokens: Sequence[_Tokens]) -> float | None:
        """Return the ridge of the new output map of an expert, which the module and the states have; None for none."""
        has_bias = self._experts.biases is not None
        old = wide(self._experts.columns(expert))
        fit, held = (Sums(old.shape, constant=has_bias) for _ in range(2))
        seen: list[tuple[_Tokens, Tensor, Tensor]] = []
        for each in tokens:
            is_its = each.chosen == expert
            places = is_its.any(-1).nonzero()[:, 0]
            if not len(places):
                continue
            share = scale * torch.where(is_its, each.gates, 0).sum(-1)[places].float()[:, None]
            inputs = share * self._experts.neurons(expert, each.hidden[places])
            inputs = torch.cat([inputs, share], dim=-1) if has_bias else inputs
            seen.append((each, places, inputs))
            for sums, some in ((fit, ~each.held[places]), (held, each.held[places])):
                if bool(some.any()):
                    sums.add(inputs[some], *(part[places[some]] for part in (each.states, each.goals, each.first)))
        fit.add_up()
        held.add_up()
        if not fit.num_rows or not held.num_rows:
            return None
        solution = solve(fit, held)
        new = (old + of_the_first(solution.change).to(old.device)).to(self._dtype)
        change = new.to(old) - old  # after rounding: that is what is measured
        if not held.error(change.to(held.gram)) < held.error():
            return None
        self._experts.put(expert, new)
        for each, places, inputs in seen:
            each.states[places] += inputs @ change.to(inputs)
        return solution.ridge

    def _tokens(self, batch: Batch, states: Tensor, goals: Tensor, held: Tensor) -> _Tokens:
        with self._experts.seen() as calls:
            after = self._apply(batch, states)
        rows = after.shape[:-1]
        hidden, chosen, gates = (batch.chosen(each.view(*rows, -1)) for each in calls[0])
        return _Tokens(
            hidden=hidden,
            chosen=chosen,
            gates=gates,
            states=batch.chosen(after).float(),
            goals=batch.chosen(goals).float(),
            first=first_tokens(batch),
            held=batch.chosen(held.to(after.device)[:, None].expand(rows)),
        )

    def _scale(self, batch: Batch, states: Tensor) -> float:
        """Return by what the layer multiplies the sum of its experts. Raises MeasureError where that is no constant."""
        seen: list[Tensor] = []

        def twice(hidden: Tensor, chosen: Tensor, gates: Tensor, *rest: Any) -> Tensor:
            seen.extend(self._experts.forward(hidden, chosen, times * gates, *rest) for times in (1, 2))
            return seen[0]

        with self._experts.answering(twice):
            whole = self._apply(batch, states)
        with self._experts.answering(lambda hidden, *_: torch.zeros_like(hidden)):
            without = self._apply(batch, states)
        put_out, added = seen[0].view(whole.shape).float(), whole.float() - without.float()
        scale = float((added * put_out).sum() / put_out.square().sum().clamp(min=torch.finfo(torch.float32).tiny))
        same = SAME[whole.dtype.itemsize]
        close = same * float(added.norm()) + torch.finfo(whole.dtype).eps * float(whole.norm())
        is_gated = float((seen[1] - 2 * seen[0]).float().norm()) <= same * float(put_out.norm())
        if not is_gated or not float((added - scale * put_out).norm()) <= close:
            raise MeasureError(
                f"{self._label} does not add what its experts put out by their gates, times a constant", hint=DROP_THEM
            )
        return scale

    def _tensors(self, taken: Sequence[int]) -> dict[str, Tensor]:
        """Return the tensors of the files that hold the new output maps of these experts."""
        outputs, maps, biases = self._outputs, self._experts.maps, self._experts.biases
        if not taken:
            return {}
        if not outputs.is_stacked:
            return {outputs.weights[expert]: _stored(maps[expert], self._dtype) for expert in taken}
        tensors = {outputs.weights[0]: _stored(maps, self._dtype)}
        return tensors if biases is None else tensors | {outputs.biases[0]: _stored(biases, self._dtype)}


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).clone()


def _error(tokens: Sequence[_Tokens], *, held: bool) -> Error:
    """Return the error of the states, on held-out rows or on the others."""
    error = Error()
    for each in tokens:
        some = each.held == held
        error.add(each.states[some], each.goals[some], each.first[some])
    error.add_up()
    return error
