"""Whether the weights that a growth added can learn: none without gradient, no copies that stay copies forever.

Judged from the stored weights and one gradient. The tables of the families give the slices of tensors that belong to
a position of an axis; no family is named here.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any
from zlib import crc32

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import Dim, Places, axes_of, places
from surgeon.anatomy.families import written_and_read
from surgeon.checkpoint.source import Source, ranges_by_file

if TYPE_CHECKING:
    from torch import Tensor

LARGE_GRADIENT = 100.0  # times the neighbours': a new layer of a model with norms on its branches can have 600
BLOCK = 1 << 22  # numbers hashed at a time: bounds the memory of a hash to 64 MB
# One axis under two names: the residual stream in layers and in the embedding; the dims of queries and of keys.
_ONE_AXIS = ({"hidden", "embed"}, {"q_dim", "k_dim"})
_MET_IN_PRODUCT = frozenset({"q_dim", "k_dim"})  # positions differ by their rotary frequency, whatever their weights


@dataclass(frozen=True, slots=True)
class AxisHealth:
    """The number of positions of an axis that are new or copies (in all layers), and of those that cannot learn.

    `dead` positions have no gradient and zero weights in every tensor that writes them: training never changes that.
    `symmetric` ones are copies with the same weights as the first copy in every tensor, hence the same gradients.
    """

    added: int
    dead: int
    symmetric: int


@dataclass(frozen=True)
class Trainability:
    """The new weights of a model that cannot learn: none where it `is_sound`.

    `dead_layers` are new layers in which no parameter has a gradient; `loud_layers` are new layers with more than 100
    times the gradient of their neighbours, with the ratio. `noise` is the noise that was added to copies.
    """

    axes: Mapping[str, AxisHealth]
    dead_layers: tuple[int, ...] = ()
    loud_layers: Mapping[int, float] = field(default_factory=dict)
    noise: float = 0.0

    @property
    def is_sound(self) -> bool:
        """Whether everything that was added can learn."""
        return not self.dead_layers and not any(axis.dead or axis.symmetric for axis in self.axes.values())

    def to_dict(self) -> dict[str, Any]:
        """Return this as `--json` prints it."""
        return {
            "axes": {
                name: {"added": axis.added, "dead": axis.dead, "symmetric": axis.symmetric}
                for name, axis in self.axes.items()
            },
            "dead_layers": list(self.dead_layers),
            "loud_layers": {str(layer): round(ratio, 1) for layer, ratio in self.loud_layers.items()},
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return this for people: a line if all is well, else a line per warning."""
        lines: list[tuple[str, str]] = []
        for name, axis in self.axes.items():
            if axis.dead:
                lines.append(
                    ("warning", f"{name}: {axis.dead} of {axis.added} new positions are dead: no gradient, ever")
                )
            if axis.symmetric:
                lines.append(("warning", f"{name}: {axis.symmetric} copies equal their original, and will forever"))
        if lines and not self.noise:
            lines.append(("hint", "set new weights apart with --noise 0.5"))
        lines += [
            ("warning", f"layer {layer} is dead: none of its weights has a gradient") for layer in self.dead_layers
        ]
        ratios = [f"{layer} ({ratio:.0f}x)" for layer, ratio in self.loud_layers.items()]
        if ratios:
            over = f"over {LARGE_GRADIENT:.0f}x"
            lines.append(("warning", f"new layers with {over} their neighbours' gradient: {', '.join(ratios)}"))
        return [*([("trainable", "no dead weights, no symmetric copies")] if self.is_sound else []), *lines]


def trainability(
    source: Source,
    anatomy: Anatomy,
    gradients: "Mapping[str, Tensor]",
    *,
    axes: Mapping[str, Sequence[int]],
    layer_map: Sequence[int | None],
    noise: float = 0.0,
) -> Trainability:
    """Return whether the new weights of the checkpoint `source` can learn.

    `gradients` are those of a loss, by the names of the stored tensors (a tensor without one is tied to another);
    `axes` and `layer_map` are those of the plan: the origins of positions and layers.
    """
    from surgeon.plan.arithmetic import read

    fresh = {layer for layer, origin in enumerate(layer_map) if origin is None}
    tallies = _tallies(anatomy, axes)
    for name, stored in source.tensors.items():
        holding = [tally for tally in tallies if tally.holds(anatomy, name)]
        if holding:
            weights = read(stored, source.parts(ranges_by_file({name: stored}, [name]))[stored.file])
            for tally in holding:
                tally.add(anatomy, name, weights, gradients.get(name))
    dead, large = _layers(anatomy, gradients, fresh)
    everywhere = set(anatomy.in_all_stacks(sorted(fresh)))
    return Trainability({tally.name: tally.health(everywhere) for tally in tallies if tally.layers}, dead, large, noise)


def _layers(
    anatomy: Anatomy, gradients: "Mapping[str, Tensor]", fresh: set[int]
) -> tuple[tuple[int, ...], dict[int, float]]:
    """Return the new layers without gradient, and the ratios of those with far more than their old neighbours."""
    from surgeon.models.device import wide

    squares: Counter[int] = Counter()
    for name, gradient in gradients.items():
        for stack in anatomy.stacks:
            if place := stack.locate(name):
                squares[place[0]] += wide(gradient).square().sum().item()  # type: ignore[assignment]
    old = [layer for layer in range(anatomy.depth) if layer not in fresh]
    large: dict[int, float] = {}
    for layer in sorted(fresh):
        before, after = [i for i in old if i < layer][-1:], [i for i in old if i > layer][:1]
        near = median(math.sqrt(squares[i]) for i in before + after) if old else 0.0
        if near and math.sqrt(squares[layer]) > LARGE_GRADIENT * near:
            large[layer] = math.sqrt(squares[layer]) / near
    return tuple(layer for layer in sorted(fresh) if not squares[layer]), large


# --- one axis ---------------------------------------------------------------------------------------------------


@dataclass
class _Positions:
    """For each position of an axis: sums of |gradient| and of |weights that write it|, and a hash of its weights."""

    gradient: "Tensor"
    written: "Tensor"
    hash: "Tensor"


@dataclass
class _Tally:
    """An axis and its positions: per layer where the axis exists inside layers, else of the whole model (None)."""

    name: str
    names: frozenset[str]
    index: tuple[int, ...]
    inside_layers: bool
    layers: dict[int | None, _Positions] = field(default_factory=dict)
    _known: "dict[Dim, tuple[Tensor, Tensor]]" = field(default_factory=dict)

    def holds(self, anatomy: Anatomy, name: str) -> bool:
        """Return whether a tensor has the axis."""
        row, part = anatomy.row(name)
        return part != "buffer" and any(axes_of(dim) & self.names for dim in row.axes)

    def add(self, anatomy: Anatomy, name: str, weights: "Tensor", gradient: "Tensor | None") -> None:
        """Add a tensor that has the axis."""
        import torch

        row, _ = anatomy.row(name)
        place = anatomy.locate(name) if self.inside_layers else None
        size = len(self.index)
        positions = self.layers.setdefault(
            place[0] if place else None,
            _Positions(torch.zeros(size), torch.zeros(size), torch.zeros(size, dtype=torch.int64)),
        )
        write, _ = written_and_read(row)
        for dim, axes in enumerate(row.axes):
            if not axes_of(axes) & self.names:
                continue
            where, order = self._where(axes, anatomy.sizes)
            on_axis = where >= 0
            inside = name if place is None else place[1]
            hashes = _hashes(_rows(weights, dim), inside + str(dim)) * order
            positions.hash.index_add_(0, where[on_axis], hashes[on_axis])
            if dim == write and row.kind != "gain":
                positions.written.index_add_(0, where[on_axis], _largest(weights, dim)[on_axis])
            if gradient is not None:
                positions.gradient.index_add_(0, where[on_axis], _largest(gradient, dim)[on_axis])

    def _where(self, axes: Dim, sizes: Mapping[str, int]) -> "tuple[Tensor, Tensor]":
        """Return, for each position of a dimension, its position on this axis (-1: none), and a factor for its hash.

        The factor tells a position's slices apart: the dims of a head, or the query and the key of a head.
        """
        import torch

        if axes not in self._known:
            numbered = Places(tuple(range(len(self.index))), tuple(float(j + 2) for j in range(len(self.index))))
            scales = places(axes, sizes, lambda axis, block: numbered if axis in self.names else None)
            where = [int(scale) - 2 if scale > 1 else -1 for scale in scales.scale]  # other axes scale by 1
            seen: Counter[int] = Counter()
            order = []
            for j in where:
                order.append(crc32(b"%d" % seen[j]) * 2 + 1)
                seen[j] += 1
            self._known[axes] = torch.tensor(where), torch.tensor(order)
        return self._known[axes]

    def health(self, fresh: set[int]) -> AxisHealth:
        """Return the counts over all layers. New layers are judged as a whole, so none of their positions is dead."""
        import torch

        copies = Counter(self.index)
        index = torch.tensor(self.index)
        added = torch.tensor([i < 0 or copies[i] > 1 for i in self.index])
        num_dead = num_symmetric = 0
        for layer, positions in self.layers.items():
            dead = added & (positions.gradient == 0) & (positions.written == 0)
            if layer not in fresh:
                num_dead += int(dead.sum())
            if not self.names & _MET_IN_PRODUCT:
                judged = added & ~dead
                identity = torch.stack([index[judged], positions.hash[judged]], dim=1)
                num_symmetric += len(identity) - len(identity.unique(dim=0))  # type: ignore[no-untyped-call]
        return AxisHealth(int(added.sum()) * len(self.layers), num_dead, num_symmetric)


def _tallies(anatomy: Anatomy, axes: Mapping[str, Sequence[int]]) -> list[_Tally]:
    """Return one tally per axis that was widened and still has its size in the checkpoint."""
    tallies: list[_Tally] = []
    for axis, index in axes.items():
        names = next((group & axes.keys() for group in _ONE_AXIS if axis in group), {axis})
        if any(tally.names == names for tally in tallies) or anatomy.sizes.get(axis) != len(index):
            continue
        outside = (name for name in anatomy.spec.tensors if not anatomy.locate(name))
        shared = any(axes_of(dim) & names for name in outside for dim in anatomy.row(name)[0].axes)
        tallies.append(_Tally(axis, frozenset(names), tuple(index), inside_layers=not shared))
    return tallies


def _rows(value: "Tensor", dim: int) -> "Tensor":
    """Return a tensor as a matrix with one row for each position along `dim`."""
    return value.movedim(dim, 0).reshape(value.shape[dim], -1)


def _largest(value: "Tensor", dim: int) -> "Tensor":
    return _rows(value, dim).abs().amax(1).float()


def _hashes(rows: "Tensor", stream: str) -> "Tensor":
    """Return an int64 per row: equal for rows that are equal bit for bit, and by chance once in 2**63.

    A sum of the bits times random odd numbers, modulo 2**64: the same in whatever order it is added up.
    """
    import torch

    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    generator = torch.Generator().manual_seed(crc32(stream.encode()))
    step = max(1, BLOCK // max(1, len(rows)))
    total = torch.zeros(len(rows), dtype=torch.int64)
    for block in rows.split(step, dim=1):  # type: ignore[no-untyped-call]
        bits = (block + 0.0).contiguous().view(kinds[block.element_size()]).long()  # + 0.0: -0.0 is 0.0
        odd = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator) * 2 + 1
        total += (bits * odd).sum(1)
    return total
