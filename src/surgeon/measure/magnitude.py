"""The magnitude of weights: of whole layers, and of each neuron, head, channel and expert.

Source: the Mag score of Kim et al. 2024 (Shortened LLaMA, arXiv:2402.02834), Σ |w|. It reads no text.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy, read_anatomy
from surgeon.anatomy.axes import Dim, Places, axes_of, places
from surgeon.checkpoint.header import is_quantized
from surgeon.checkpoint.source import Source, StoredTensor, ranges_by_file, spec_of
from surgeon.errors import MeasureError
from surgeon.plan.arithmetic import TORCH_DTYPES, read

GROUP = 1_000_000_000  # bytes of weights that are fetched at once where they are on the Hub


def layer_magnitudes(source: Source) -> list[float]:
    """Return the sum of the absolute values of each layer's weights; of an encoder-decoder, of layer i in both stacks.

    Raises MeasureError for a quantized checkpoint, whose numbers mean nothing until they are scaled.
    """
    anatomy = read_anatomy(spec_of(source))
    sums = [0.0] * anatomy.depth
    for name, tensor in _tensors(source):
        if anatomy.family and anatomy.row(name)[1] == "buffer":  # old GPT-2 files carry their causal masks
            continue
        place = next(filter(None, (stack.locate(name) for stack in anatomy.stacks)), None)
        if place and place[0] < anatomy.depth:  # stacks of two depths are cut by no list of layers
            sums[place[0]] += float(tensor.abs().sum(dtype=torch.float64))
    return sums


def width_magnitudes(source: Source) -> dict[str, Tensor]:
    """Return Σ |w| over all weights that belong to a position of an axis.

    "hidden" has shape (D,), of the whole model; "ffn" and "expert_ffn" (L, F), "heads" (L, kv_heads, group), "kv_heads"
    (L, kv_heads) and "experts" (L, E) are of each layer, zero where a layer has none of the axis. An encoder's layers
    follow the decoder's.

    Raises PlanError when the model type has no table.
    """
    anatomy = read_anatomy(spec_of(source))
    anatomy.require_family(partial=True)
    sizes, depth = anatomy.sizes, anatomy.num_layers
    shapes = {"ffn": (depth, sizes["ffn"]), "hidden": (1, sizes["hidden"])}
    shapes["heads"] = (depth, sizes["kv_heads"] * sizes["group"])
    shapes["kv_heads"] = (depth, sizes["kv_heads"])
    shapes |= {axis: (depth, sizes[axis]) for axis in ("expert_ffn", "experts") if axis in sizes}
    sums = {axis: torch.zeros(shape, dtype=torch.float64) for axis, shape in shapes.items()}
    for name, tensor in _tensors(source):
        _add(sums, anatomy, name, tensor)
    importance = {axis: total for axis, total in sums.items() if bool(total.any())}
    if "hidden" in importance:
        importance["hidden"] = importance["hidden"][0]
    if "heads" in importance:
        importance["heads"] = importance["heads"].view(depth, sizes["kv_heads"], sizes["group"])
    return importance


def _add(sums: Mapping[str, Tensor], anatomy: Anatomy, name: str, tensor: Tensor) -> None:
    row, part = anatomy.row(name)
    place = anatomy.locate(name)
    if part in ("buffer", "other"):
        return
    expert = EXPERT_NUMBER.search(name) if "experts" in sums else None
    for number, dim in enumerate(row.axes):
        others = [other for other in range(tensor.ndim) if other != number]
        weights = tensor.abs().sum(others, dtype=torch.float64) if others else tensor.abs().double()
        for axis, total in sums.items():
            if axis != "hidden" and place is None:
                continue
            labels = _labels(dim, anatomy.sizes, axis) if axes_of(dim) <= anatomy.sizes.keys() else None
            if labels is not None:
                known = labels >= 0
                total[0 if axis == "hidden" or place is None else place[0]].index_add_(0, labels[known], weights[known])
    if expert is not None and place is not None:
        sums["experts"][place[0], int(expert.group())] += tensor.abs().sum(dtype=torch.float64)


def _labels(dim: Dim, sizes: Mapping[str, int], axis: str) -> Tensor | None:
    """Return which position of `axis` each position of a dimension belongs to, -1 for none; None without the axis."""
    present = axes_of(dim)
    if axis == "heads":
        if "group" not in present:
            return None
        keys, members = _labels(dim, sizes, "kv_heads"), _labels(dim, sizes, "group")
        assert keys is not None
        assert members is not None
        return torch.where(members < 0, -1, keys * sizes["group"] + members)
    if axis not in present:
        return None

    labelled, size = axis, sizes[axis]

    def mark(axis: str, block: frozenset[str]) -> Places | None:
        if axis != labelled:
            return None
        return Places(tuple(range(size)), tuple(float(i + 2) for i in range(size)))

    return torch.tensor([int(scale) - 2 if scale > 1 else -1 for scale in places(dim, sizes, mark).scale])


def _tensors(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating tensors of a source, one at a time, in the order of its files."""
    if is_quantized(source.config):
        raise MeasureError(
            f"{source.label} is quantized; scores are taken from unquantized weights",
            hint="Score the unquantized checkpoint, then cut this one: --scores-from scores.json.",
        )
    stored = {name: item for name, item in source.tensors.items() if item.spec.dtype in TORCH_DTYPES}
    everything = ranges_by_file(stored, stored)
    for names in _in_groups(stored):
        parts = source.parts(ranges_by_file(stored, names), among=everything)
        for name in names:
            yield name, read(stored[name], parts[stored[name].file])


def _in_groups(stored: Mapping[str, StoredTensor]) -> Iterator[list[str]]:
    """Yield the names in the order of the files, in groups that are fetched together."""
    group: list[str] = []
    nbytes = 0
    for name in sorted(stored, key=lambda name: (stored[name].file, stored[name].start)):
        if group and nbytes + stored[name].spec.nbytes > GROUP:
            yield group
            group, nbytes = [], 0
        group.append(name)
        nbytes += stored[name].spec.nbytes
    yield group
