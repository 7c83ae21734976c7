"""The importance of neurons, heads and channels on a text: by their activations, and by what they add to the state.

By activation: Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.2: |activation| averaged over a sample's
tokens, then the L2 norm over samples. A neuron is seen where the down projection reads it, a head where the output
projection does, a channel of the residual stream after the norms before attention and MLP.

By contribution: the size of what goes from the state when one neuron or head goes: the root of the mean over tokens of
|W_i a_i|², with a_i its activations and W_i the part of the projection that reads them. For one neuron that is its
activation's RMS times the norm of its column: Wanda's product (Sun et al. 2023, arXiv:2306.11695), of whole columns.
"""

from collections.abc import Callable, Collection, Iterator
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

    def result(self, ranking: str = "activation") -> dict[str, Tensor]:
        """Return the importance of positions, by axis; what is seen in one way only is the same for any ranking."""
        return {}


class Activations(Watcher):
    """Sums mean activations or contributions, squared, in float32, over the samples of a text, for each of `rankings`.

    Channels of the residual stream add nothing by themselves: they are ranked by activation either way.
    """

    def __init__(self, anatomy: Anatomy, rankings: Collection[str] = ("activation",)) -> None:
        family = anatomy.require_family(partial=True)
        self._anatomy = anatomy
        norms = [
            rest
            for rest, row in family.stacks[0].rows.items()
            if row.kind == "gain" and axes_of(row.axes[-1]) == {"hidden"}
        ]
        self._norms = [rest for rest in norms if rest not in family.branch_norms] or norms
        sizes, depth = anatomy.sizes, anatomy.depth
        self._sums = {
            ranking: {axis: torch.zeros(depth, sizes[axis]) for axis in ("ffn", "heads")} for ranking in rankings
        }
        self._hidden = torch.zeros(depth, len(self._norms), sizes["hidden"])

    @contextmanager
    def watch(self, layer: int, module: nn.Module) -> Iterator[None]:
        """Return a context in which the inputs and outputs of a layer's parts are counted."""
        handles = []
        for part, axis, is_transposed in self._readers(layer, module):
            for ranking, sums in self._sums.items():
                own = sums[axis][layer]
                hook = self._reads(own) if ranking == "activation" else self._adds(own, axis, part, is_transposed)
                handles.append(part.register_forward_pre_hook(hook))
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
        self._hidden = of_all(self._hidden)
        self._sums = {
            ranking: {axis: of_all(own) for axis, own in sums.items()} for ranking, sums in self._sums.items()
        }

    def result(self, ranking: str = "activation") -> dict[str, Tensor]:
        """Return "hidden" (D,), "ffn" (L, F), "heads" (L, kv_heads, group), "kv_heads" (L, kv_heads), by a ranking.

        Axes that were never seen are left out: where all MLPs are experts there are no neurons in common.
        """
        sizes, sums = self._anatomy.sizes, self._sums[ranking]
        heads = sums["heads"].view(-1, sizes["kv_heads"], sizes["group"])
        importance = {
            "hidden": self._hidden.sqrt().sum((0, 1)),
            "ffn": sums["ffn"].sqrt(),
            "heads": heads.sqrt(),
            "kv_heads": heads.sum(-1).sqrt(),
        }
        return {axis: scores.double() for axis, scores in importance.items() if bool(scores.any())}

    def _readers(self, layer: int, module: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
        """Yield the modules that read neurons or heads, by the table's rows of this layer's tensors.

        With each, whether its weight is stored as (in, out).
        """
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
                yield part, axis, row.kind == "conv1d"

    def _reads(self, sums: Tensor) -> Any:
        """Return the hook that counts the activations of each neuron, or of all dims of each head."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums.add_(self._squares(args[0]).view(len(sums), -1).sum(-1))

        return hook

    def _adds(self, sums: Tensor, axis: str, part: nn.Module, is_transposed: bool) -> Any:
        """Return the hook that counts what each neuron or head adds: a head's a W W' a', by its own (dims, dims)."""
        weight: Tensor = part.weight.detach()  # type: ignore[operator]
        weight = weight if is_transposed else weight.T  # (in, out)
        if axis == "ffn":
            squared = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        else:
            by_head = weight.float().view(len(sums), -1, weight.shape[1])
            squared = by_head @ by_head.mT

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            states = args[0].detach().float()
            if axis == "ffn":
                added = states.square() * squared
            else:
                of_heads = states.view(*states.shape[:-1], len(squared), -1)
                added = (torch.einsum("...hd,hde->...he", of_heads, squared) * of_heads).sum(-1)
            sums.add_(self._means(added).sum(0).cpu())

        return hook

    def _writes(self, layer: int, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._hidden[layer, number] += self._squares(output)

        return hook

    def _squares(self, states: Tensor) -> Tensor:
        """Return Σ over samples of (mean over tokens of |x|)², shape (F,)."""
        return self._means(states.detach().abs().float()).square().sum(0).cpu()

    def _means(self, values: Tensor) -> Tensor:
        """Return the mean over each sample's tokens, padding left out, shape (B, F)."""
        batch = self.batch
        assert batch is not None, "a layer runs on a batch"
        values = values.view(*batch.tokens.shape, -1)
        if batch.real is None:
            return values.mean(1)
        return (values * batch.real[..., None]).sum(1) / batch.real.sum(1, keepdim=True)


def _submodule(module: nn.Module, rest: str) -> nn.Module | None:
    """Return the part of a layer that holds tensor `rest`, None where transformers fuses it into another."""
    return dict(module.named_modules()).get(rest.rpartition(".")[0])
