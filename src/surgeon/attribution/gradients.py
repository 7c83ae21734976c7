"""Gradients of single rows, by hooks: one backward pass gives those of every row of a batch, packed or not.

The weight of a linear map has the gradient sum_t d_t a_t', over the tokens t of a row: a_t went into the map, and d_t
is the gradient of what came out of it. Hooks see both. The weights themselves need no gradient then, so a pass with
hooks is cheaper than a step of training.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgeon.errors import MeasureError, PlanError
from surgeon.models.device import wide

SIDES = (128, 64, 32, 16, 8, 4)  # of a map's projected gradient
MOST_NUMBERS = 1 << 17  # of a row's gradient
MOST_BYTES = 2 << 30  # of all gradients that are kept
AGREES = 1e-3  # of the size of its terms; float32 sums of 1e5 terms in another order differ by less than 1e-4 of it


@dataclass(eq=False)
class Map:
    """A linear map whose weight, as a matrix of `outs` × `ins`, is attributed.

    A row's gradient G is kept as left' G right, or whole where a side is None; `scale`, (outs, ins), multiplies it
    first.
    """

    name: str
    module: nn.Module
    is_transposed: bool  # the module's weight is (ins, outs), as in GPT-2
    outs: int
    ins: int
    left: Tensor | None = None
    right: Tensor | None = None
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The two sizes of what is kept of a row."""
        left = self.outs if self.left is None else self.left.shape[1]
        return left, self.ins if self.right is None else self.right.shape[1]

    def oriented(self, matrix: Tensor) -> Tensor:
        """Return a matrix of the weight's shape as outs × ins."""
        return matrix.t() if self.is_transposed else matrix

    def project(self, seed: int, number: int, side: int) -> None:
        """Draw the projections to `side` numbers a side, where a side has more; entries are of variance 1 / side.

        So a dot product of projected gradients is in expectation that of the gradients.
        Source: Choe et al. 2024, arXiv:2405.13954 (LoGra): a projection of a map's input and of its output.
        """
        for place, (name, size) in enumerate((("left", self.outs), ("right", self.ins))):
            if size > side:
                drawn = np.random.default_rng([seed, number, place]).standard_normal((size, side), np.float32)
                setattr(self, name, torch.from_numpy(drawn / np.sqrt(side, dtype=np.float32)))

    def to(self, device: torch.device) -> None:
        for name in ("left", "right", "scale"):
            if (matrix := getattr(self, name)) is not None:
                setattr(self, name, matrix.to(device))

    def of_rows(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Return the gradients, (R, left, right), of rows: of `inputs`, (R, T, ins), and `grads`, (R, T, outs)."""
        if self.scale is None:  # the projections of the factors are cheaper than that of the product
            inputs = inputs if self.right is None else inputs @ self.right
            grads = grads if self.left is None else grads @ self.left
            return torch.bmm(grads.mT, inputs)
        product = torch.bmm(grads.mT, inputs) * self.scale
        product = product if self.right is None else product @ self.right
        return product if self.left is None else self.left.t() @ product


def maps_of(model: Any) -> list[Map]:
    """Return the trained linear maps of a model, without the head that gives the logits of tokens.

    Raises PlanError where there is none.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads = {id(bare.get_output_embeddings()), id(bare.get_input_embeddings())}
    found = []
    for name, module in model.named_modules():
        if id(module) in heads or not isinstance(module, nn.Linear | Conv1D) or not module.weight.requires_grad:
            continue
        is_transposed = isinstance(module, Conv1D)
        outs, ins = module.weight.shape[::-1] if is_transposed else module.weight.shape
        found.append(Map(name, module, is_transposed, int(outs), int(ins)))
    if not found:
        raise PlanError(
            f"no linear map of {type(bare).__name__} is trained, and the gradients of rows are those of linear maps",
            hint="Leave out --train and --freeze.",
        )
    return found


def widest(maps: Sequence[Map], kept: int) -> int | None:
    """Return the side to which maps are projected, so that the gradients of `kept` rows fit; None for no projection.

    A row has at most MOST_NUMBERS numbers, and all kept rows together MOST_BYTES, in float32.
    """
    room = min(MOST_NUMBERS, MOST_BYTES // (4 * max(1, kept)))
    if sum(each.outs * each.ins for each in maps) <= room:
        return None
    fitting = (side for side in SIDES if numbers_of(maps, side) <= room)
    return next(fitting, SIDES[-1])


def numbers_of(maps: Sequence[Map], side: int | None) -> int:
    """Return how many numbers a row's gradient has, projected to `side` numbers a side of each map."""
    if side is None:
        return sum(each.outs * each.ins for each in maps)
    return sum(min(side, each.outs) * min(side, each.ins) for each in maps)


@dataclass(frozen=True, eq=False)
class Spans:
    """Where the rows of a packed batch lie: `places` (R, T) in its tokens, counted along its sequences; -1: nowhere.

    `tokens` is how many places the batch has, with padding.
    """

    places: Tensor
    tokens: int

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], width: int) -> "Spans":
        """Return the spans of sequences of `width` tokens, of which each holds rows of these lengths, one by one."""
        spans = []
        for number, each in enumerate(lengths):
            starts = number * width + np.cumsum([0, *each[:-1]])
            spans += list(zip(starts.tolist(), each, strict=True))
        places = np.full((len(spans), max(length for _, length in spans)), -1)
        for line, (start, length) in zip(places, spans, strict=True):
            line[:length] = np.arange(start, start + length)
        return cls(torch.from_numpy(places), len(lengths) * width)

    def taken(self, values: Tensor) -> Tensor:
        """Return the values of each row's tokens, (R, T, D), of those of all, (B, S, D); zeros behind its end."""
        places = self.places.to(values.device)
        flat = values.reshape(-1, values.shape[-1])
        return flat[places.clamp(min=0)] * (places >= 0)[..., None]


@dataclass(eq=False)
class RowGradients:
    """The gradients of rows: `model` is one of train/model.py with its loss attached, in evaluation mode.

    `maps` are the attributed ones, projected; `width` is how many numbers a row's gradient has.
    """

    model: Any
    maps: Sequence[Map]
    _seen: dict[int, Tensor] = field(default_factory=dict, init=False)
    _spans: Spans | None = field(default=None, init=False)
    _rows: int = field(default=0, init=False)

    @property
    def width(self) -> int:
        return sum(left * right for left, right in (each.shape for each in self.maps))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Return a context in which the model's weights need no gradient, and hooks see what they would have.

        Dropout is off. Attention and everything else is the model's own.
        """
        was_training = self.model.training
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        handles = [
            each.module.register_forward_hook(partial(self._see, number)) for number, each in enumerate(self.maps)
        ]
        embeddings = (module for module in self.model.modules() if isinstance(module, nn.Embedding))
        handles += [module.register_forward_hook(_with_gradient) for module in embeddings]  # where a graph begins
        self.model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        for each in self.maps:
            each.to(each.module.weight.device)  # type: ignore[arg-type]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trained:
                parameter.requires_grad_(True)
            self.model.train(was_training)

    def __call__(self, batch: Mapping[str, Any], counts: Tensor, spans: Spans | None, *, taught: bool) -> Tensor:
        """Return the gradient of each row's mean loss, shape (R, width), float32 on the CPU.

        `batch` is what a collator of train/data.py makes, and `counts` how many tokens of each row are trained. Without
        `spans` each sequence is a row. With `taught` false the loss is the cross-entropy, whatever teacher there is.
        """
        self._spans, self._rows = spans, len(counts)
        self._seen.clear()
        self._backward(batch, taught=taught)
        parts = [self._of_map(number, each) for number, each in enumerate(self.maps)]
        gradients = torch.cat(parts, 1) / counts.to(parts[0].device).clamp(min=1)[:, None]
        self._seen.clear()
        return gradients.float().cpu()

    def check(self, batch: Mapping[str, Any]) -> None:
        """Compare what the hooks see of a batch with the gradients that training would have.

        Of each map one number is compared: u' G v, for a random u and v. Raises MeasureError for a map where they
        differ, such as one that is also used outside of its module.
        """
        probes = []
        generator = torch.Generator().manual_seed(0)
        for each in self.maps:
            weight: Any = each.module.weight
            weight.requires_grad_(True)
            probes.append([torch.randn(size, generator=generator).to(weight) for size in (each.outs, each.ins)])
        sums = [[0.0, 0.0] for _ in self.maps]
        self._probe = (probes, sums)
        try:
            self._backward(batch, taught=True)
            for each, (left, right), (found, size) in zip(self.maps, probes, sums, strict=True):
                weight = each.module.weight
                gradient = 0.0 if weight.grad is None else float(left @ each.oriented(weight.grad) @ right)
                if abs(found - gradient) > AGREES * size**0.5 + 1e-12:
                    raise MeasureError(
                        f"the gradient of {each.name} is not that of a linear map: {gradient:g} where its input and "
                        f"output give {found:g}",
                        hint="Rows of such a model cannot be attributed; --method bm25 needs no model.",
                    )
        finally:
            del self._probe
            for each in self.maps:
                weight = each.module.weight
                weight.grad = None
                weight.requires_grad_(False)

    def _backward(self, batch: Mapping[str, Any], *, taught: bool) -> None:
        device = self.maps[0].module.weight.device
        plan = self.model._surgeon_plan(batch) if taught else self.model._surgeon_plan.untaught()(batch)
        inputs = _moved({**batch, **({"plan": plan} if plan else {})}, device)
        self.model(**inputs, num_items=1, taught=taught)["loss"].backward()

    def _see(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and output.requires_grad:
            output.register_hook(partial(self._add, number, inputs[0].detach()))

    @torch.no_grad()
    def _add(self, number: int, inputs: Tensor, grads: Tensor) -> None:
        each = self.maps[number]
        if (probe := getattr(self, "_probe", None)) is not None:
            left, right = probe[0][number]
            terms = wide((grads @ left) * (inputs @ right))
            probe[1][number][0] += float(terms.sum())
            probe[1][number][1] += float(terms.square().sum())
            return
        inputs, grads = (self._by_row(values.float(), each.name) for values in (inputs, grads))
        made = each.of_rows(inputs, grads)
        self._seen[number] = self._seen[number] + made if number in self._seen else made

    def _by_row(self, values: Tensor, name: str) -> Tensor:
        """Return the values of the tokens of each row, (R, T, D)."""
        num_tokens, rest = divmod(values.numel() // values.shape[-1], 1 if self._spans else self._rows)
        if self._spans is not None and num_tokens == self._spans.tokens:
            return self._spans.taken(values)
        if self._spans is not None or rest:
            raise MeasureError(
                f"{name} does not see all tokens of a row, so its gradient has no rows",
                hint="Rows of such a model cannot be attributed; --method bm25 needs no model.",
            )
        return values.reshape(self._rows, -1, values.shape[-1])

    def _of_map(self, number: int, each: Map) -> Tensor:
        """Return what was seen of a map, (R, its numbers); zeros of one that the rows did not run through."""
        left, right = each.shape
        made = self._seen.get(number)
        if made is None:
            return torch.zeros(self._rows, left * right, device=each.module.weight.device)  # type: ignore[arg-type]
        return made.flatten(1)


def _with_gradient(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True)


def _moved(values: Any, device: Any) -> Any:
    """Return the tensors of a batch, and of the plans in it, on a device."""
    if isinstance(values, Tensor):
        return values.to(device)
    return {name: _moved(value, device) for name, value in values.items()} if isinstance(values, Mapping) else values
