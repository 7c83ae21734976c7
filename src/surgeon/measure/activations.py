"""The importance of neurons, heads and channels by their activations on a text.

Source: Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.2: |activation| averaged over a sample's
tokens, then the L2 norm over samples. A neuron is seen where the down projection reads it, a head where the output
projection does, a channel of the residual stream after the norms before attention and MLP.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.models.passage import Batch


class Watcher:
    """Sees the inside of a layer. `batch` is the one that goes through it."""

    batch: Batch | None = None

    def watch(self, layer: int, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the inside of a layer is seen."""
        return nullcontext()

    def add_up(self, of_all: Callable[[Tensor], Tensor]) -> None:
        """Make the sums those of all processes: `of_all` returns the sum of a tensor over them."""

    def result(self) -> dict[str, Tensor]:
        """Return the importance of positions, by axis."""
        return {}


class Activations(Watcher):
    """Sums the squares of mean activations, in float32, over the samples of a text."""

    def __init__(self, anatomy: Anatomy) -> None:
        family = anatomy.require_family(partial=True)
        self._anatomy = anatomy
        norms = [
            rest
            for rest, row in family.stacks[0].rows.items()
            if row.kind == "gain" and axes_of(row.axes[-1]) == {"hidden"}
        ]
        self._norms = [rest for rest in norms if rest not in family.branch_norms] or norms
        sizes, depth = anatomy.sizes, anatomy.depth
        self._ffn = torch.zeros(depth, sizes["ffn"])
        self._heads = torch.zeros(depth, sizes["heads"])
        self._hidden = torch.zeros(depth, len(self._norms), sizes["hidden"])

    @contextmanager
    def watch(self, layer: int, module: nn.Module) -> Iterator[None]:
        """Return a context in which the inputs and outputs of a layer's parts are counted."""
        handles = [
            part.register_forward_pre_hook(self._reads(layer, axis)) for part, axis in self._readers(layer, module)
        ]
        for number, rest in enumerate(self._norms):
            if norm := _submodule(module, rest):
                handles.append(norm.register_forward_hook(self._writes(layer, number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_up(self, of_all: Callable[[Tensor], Tensor]) -> None:
        """Make the sums those of all processes."""
        self._ffn, self._heads, self._hidden = of_all(self._ffn), of_all(self._heads), of_all(self._hidden)

    def result(self) -> dict[str, Tensor]:
        """Return "hidden" (D,), "ffn" (L, F), "heads" (L, kv_heads, group), "kv_heads" (L, kv_heads).

        Axes that were never seen are left out: where all MLPs are experts there are no neurons in common.
        """
        sizes = self._anatomy.sizes
        heads = self._heads.view(-1, sizes["kv_heads"], sizes["group"])
        importance = {
            "hidden": self._hidden.sqrt().sum((0, 1)),
            "ffn": self._ffn.sqrt(),
            "heads": heads.sqrt(),
            "kv_heads": heads.sum(-1).sqrt(),
        }
        return {axis: scores.double() for axis, scores in importance.items() if bool(scores.any())}

    def _readers(self, layer: int, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        """Yield the modules that read neurons or heads, by the table's rows of this layer's tensors."""
        stack = self._anatomy.stacks[0]
        for name in self._anatomy.spec.tensors:
            place = stack.locate(name)
            if place is None or place[0] != layer:
                continue
            row, _ = self._anatomy.row(name)
            if row.kind not in ("linear", "conv1d") or len(row.axes) != 2:
                continue
            axes = axes_of(row.axes[1 if row.kind == "linear" else 0])
            axis = "ffn" if axes == {"ffn"} else "heads" if {"group", "v_dim"} <= axes else None
            if axis and (part := _submodule(module, place[1])):
                yield part, axis

    def _reads(self, layer: int, axis: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares = self._squares(args[0])
            if axis == "ffn":
                self._ffn[layer] += squares
            else:
                self._heads[layer] += squares.view(self._heads.shape[1], -1).sum(-1)

        return hook

    def _writes(self, layer: int, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._hidden[layer, number] += self._squares(output)

        return hook

    def _squares(self, states: Tensor) -> Tensor:
        """Return Σ over samples of (mean over tokens of |x|)², shape (F,)."""
        batch = self.batch
        assert batch is not None, "a layer runs on a batch"
        sizes = states.detach().abs().float().view(*batch.tokens.shape, -1)
        if batch.real is None:
            mean = sizes.mean(1)
        else:
            mean = (sizes * batch.real[..., None]).sum(1) / batch.real.sum(1, keepdim=True)
        return mean.square().sum(0).cpu()


def _submodule(module: nn.Module, rest: str) -> nn.Module | None:
    """Return the part of a layer that holds tensor `rest`, None where transformers fuses it into another."""
    return dict(module.named_modules()).get(rest.rpartition(".")[0])
