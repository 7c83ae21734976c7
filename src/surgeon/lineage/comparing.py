"""The child beside one candidate: first whether and which layers, then the maps of other axes and the tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from surgeon.anatomy.axes import Axis, Product, Sum
from surgeon.lineage.layers import (
    Gains,
    RowEvidence,
    compare_gains,
    compare_rows,
    decide,
    hidden_of,
    p_of_rows,
    profiles,
)
from surgeon.lineage.maps import AxisMap, matched
from surgeon.lineage.numbers import Array
from surgeon.lineage.parts import Blocks, Difference, difference
from surgeon.lineage.roles import HEADS, HIDDEN, KV_HEADS, RESIDUAL, Roles, heads_of, kv_heads_of, positions
from surgeon.lineage.samples import Samples
from surgeon.lineage.tokens import TokenPairs, same_ids, same_texts

LOOKED_AT = 4  # layers whose tensors are compared
COLUMNS_OF = 64  # rows of the hidden state by which the columns of a matrix are told apart
ROLE_ROWS, LEAST_ROWS, ROLE_BYTES = 128, 32, 1_000_000  # rows of a role: as many as a megabyte holds, within these
RELATED = 0.01  # p-value of the gains below which two models have to do with one another
SEVERAL = 0.25  # share of the child's layers that must be the candidate's


@dataclass(eq=False)
class Model:
    """A checkpoint that is read: its samples, its roles and its gains."""

    samples: Samples

    @cached_property
    def roles(self) -> Roles:
        """Its tensors by what they do."""
        return Roles(self.samples.anatomy)

    @cached_property
    def profiles(self) -> list[dict[str, Array]]:
        """The gains of each layer."""
        return profiles(self.samples, self.roles)

    @property
    def label(self) -> str:
        """Its name."""
        return self.samples.label


@dataclass(eq=False)
class Comparison:
    """What is known of a child and one candidate. `layers` are None where the two have nothing to do with one another.

    `maps` are the axes' maps, of neurons and heads those of the first layer that was looked at.
    """

    child: Model
    parent: Model
    hidden: AxisMap | None = None
    gains: Gains | None = None
    rows: RowEvidence | None = None
    tokens: TokenPairs | None = None
    layers: list[int | None] = field(default_factory=list)
    maps: dict[str, AxisMap] = field(default_factory=dict)
    layer_maps: dict[int, dict[str, AxisMap]] = field(default_factory=dict)
    blocks: dict[tuple[str, int | None], Blocks] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    is_found: bool = False  # whether the hidden state was mapped by the embeddings, and not taken to be the same
    row_p: float | None = None  # the p-value of the rows, where there are no gains

    @property
    def is_related(self) -> bool:
        """Whether some of the child's layers are the candidate's."""
        return any(layer is not None for layer in self.layers)

    @property
    def p(self) -> float:
        """The p-value of the gains, of rows where there are none, and 1 where nothing could be tested."""
        known = self.row_p if self.gains is None else self.gains.p
        return 1.0 if known is None else known

    @property
    def test(self) -> str | None:
        """What the p-value is of."""
        return "rows" if self.row_p is not None else None if self.gains is None else "gains"

    @property
    def num_layers(self) -> int:
        """How many of the child's layers are the candidate's."""
        return sum(layer is not None for layer in self.layers)

    @cached_property
    def distance(self) -> float:
        """The root mean square relative distance of the matrices that were looked at; infinite where none was."""
        found = [each.distance for each in self.differences if each.status != "zero"]
        return float(np.sqrt(np.mean(np.square(found)))) if found else np.inf

    @property
    def axes(self) -> dict[str, str]:
        """The kind of the map of each axis."""
        return {axis: each.kind for axis, each in self.maps.items()}


# Whether, and which layers


def begin(child: Model, parent: Model, *, permutations: int, seed: int) -> Comparison:
    """Return the comparison down to the layers: from 256 rows of the embeddings and all gains, else from rows too."""
    found = Comparison(child, parent)
    find_hidden(found)
    if found.hidden is None:
        return found
    found.gains = compare_gains(child.profiles, parent.profiles, found.hidden, permutations=permutations, seed=seed)
    if found.gains is not None and found.gains.p <= RELATED:
        _accept(found, decide(found.gains, None, child.roles, parent.roles))
    elif found.is_found or found.gains is None:  # else nothing but the size is the same
        confirm(found, permutations=permutations, seed=seed)
    return found


def confirm(found: Comparison, *, permutations: int, seed: int) -> None:
    """Look at rows of each layer too: they decide where gains are of two minds, and say how far each layer is."""
    assert found.hidden is not None
    child, parent = found.child, found.parent
    found.rows = compare_rows(child.samples, parent.samples, child.roles, parent.roles, found.hidden)
    if found.gains is None and found.rows is not None:
        found.row_p = p_of_rows(found.rows, permutations=permutations, seed=seed)
    gains = found.gains if found.gains is not None and found.gains.p <= RELATED else None
    _accept(found, decide(gains, found.rows, child.roles, parent.roles))


def _accept(found: Comparison, layers: list[int | None]) -> None:
    """Set the layers where they are enough, and with them the maps of hidden state and tokens."""
    assert found.hidden is not None
    is_enough = sum(layer is not None for layer in layers) >= max(1, SEVERAL * len(layers))
    found.layers, found.maps = layers if is_enough else [], {}
    if not is_enough:
        return
    if found.tokens is None or found.tokens.map.kind != "identity":  # ids of another size of vocabulary may have moved
        find_tokens(found)
    found.maps[HIDDEN] = found.hidden
    if found.tokens is not None:
        found.maps["vocab"] = found.tokens.map


def find_hidden(found: Comparison) -> None:
    """Set the map of the hidden state: by embeddings of the same ids, else of the same tokens, else by its size."""
    child, parent = found.child, found.parent
    for pairs in (same_ids, same_texts):
        if pairs is same_texts and hidden_of(child.roles, parent.roles) is not None:
            break  # the gains can say whether that size is the same state
        found.tokens = pairs(child.samples, parent.samples, child.roles, parent.roles)
        if found.tokens is not None and (known := _by_tokens(found, found.tokens)) is not None:
            found.hidden, found.is_found = known, True
            return
    found.tokens = None
    found.hidden = hidden_of(child.roles, parent.roles)


def find_tokens(found: Comparison) -> None:
    """Set the pairs of tokens of two related models by what they spell, where their tokenizers can be read."""
    pairs = same_texts(found.child.samples, found.parent.samples, found.child.roles, found.parent.roles)
    if pairs is not None and (known := _by_tokens(found, pairs)) is not None:
        found.tokens, found.hidden, found.is_found = pairs, known, True


def _by_tokens(found: Comparison, pairs: TokenPairs) -> AxisMap | None:
    child, parent = found.child.samples, found.parent.samples
    one = child.rows(found.child.roles.table_of_tokens or "", pairs.child)
    other = parent.rows(found.parent.roles.table_of_tokens or "", pairs.parent)
    return matched(one, other, centred=True)


# The other axes, and the tensors


def finish(found: Comparison, layers: Sequence[int]) -> None:
    """Compare the tensors of some of the child's layers, all gains, and the embedding."""
    look_at(found, layers)
    _compare_gains(found)
    _compare_tokens(found)


def look_at(found: Comparison, layers: Sequence[int]) -> None:
    """Compare the matrices of some of the child's layers, after finding the maps of their axes."""
    pairs = [(layer, place) for layer in layers if (place := found.layers[layer]) is not None]
    _load_columns(found, pairs)
    for layer, place in pairs:
        found.layer_maps[layer] = maps = _maps_of_layer(found, layer, place)
        for axis, each in maps.items():
            found.maps.setdefault(axis, each)
    for layer, place in pairs:
        for role, name in found.child.roles.matrices(layer).items():
            _compare(found, role, name, layer, place)


def layers_to_look_at(found: Comparison) -> list[int]:
    """Return a few of the child's layers that are the candidate's, from the first to the last."""
    known = [layer for layer, place in enumerate(found.layers) if place is not None]
    places = np.unique(np.linspace(0, len(known) - 1, min(LOOKED_AT, len(known))).round().astype(int))
    return [known[place] for place in places]


def _hidden_rows(found: Comparison) -> Array:
    """Return positions of the child's hidden state that are the candidate's: as many as tell columns apart.

    They lie one after the other where they can, so that they are one range of bytes in both.
    """
    assert found.hidden is not None
    units = found.hidden.matched
    start = max(0, len(units) // 3 - COLUMNS_OF)
    return units[start : start + COLUMNS_OF]


def _load_columns(found: Comparison, pairs: Sequence[tuple[int, int]]) -> None:
    """Read, of all layers at once, the rows that are read anyway."""
    assert found.hidden is not None
    rows = _hidden_rows(found)
    for model, places, at in (
        (found.child, [layer for layer, _ in pairs], rows),
        (found.parent, [place for _, place in pairs], found.hidden.index[rows]),
    ):
        roles = model.roles
        names = [name for layer in places for name in roles.matrices(layer).values() if _writes_hidden(roles, name)]
        model.samples.load((name, at) for name in names)


def _writes_hidden(roles: Roles, name: str) -> bool:
    """Return whether the rows of a matrix are positions of the hidden state."""
    return roles.dims(name)[0] == (RESIDUAL,)


def _maps_of_layer(found: Comparison, layer: int, place: int) -> dict[str, AxisMap]:
    """Return the maps of the axes of a layer: of neurons and heads by columns, of experts by the rows of the router."""
    child, parent, hidden = found.child, found.parent, found.hidden
    assert hidden is not None
    maps: dict[str, AxisMap] = {HIDDEN: hidden}
    rows = _hidden_rows(found)
    signs = hidden.signs[rows, None]
    for role, name in child.roles.matrices(layer).items():
        other = parent.roles.layers[place].get(role)
        if other is None or parent.roles.row(other).axes != child.roles.row(name).axes:
            continue
        outer, last = child.roles.dims(name)
        if outer == (RESIDUAL,):
            one = child.samples.rows(name, rows) * signs
            two = parent.samples.rows(other, hidden.index[rows])
            _map_columns(maps, last, one, two, child.roles, parent.roles)
        elif last == RESIDUAL and outer == (Axis("experts"),):
            one = child.samples.rows(name, np.arange(child.samples.shape(name)[0]))
            two = parent.samples.rows(other, np.arange(parent.samples.shape(other)[0]))
            units = hidden.matched
            one, two = one[:, units] * hidden.signs[units], two[:, hidden.index[units]]
            if (known := matched(one.T, two.T, centred=False)) is not None:
                maps.setdefault("experts", known)
    return maps


def _map_columns(maps: dict[str, AxisMap], dim: Any, one: Array, two: Array, child: Roles, parent: Roles) -> None:
    """Add the maps of the axes that the columns of two samples have: those of each block where several lie in line."""
    at = other_at = 0
    for block in dim.blocks if isinstance(dim, Sum) else (dim,):
        size, other = child.size(block), parent.size(block)
        if size is None or other is None:
            return
        is_heads = isinstance(block, Product) and block.factors[:2] == (Axis(KV_HEADS), Axis("group"))
        axis = HEADS if is_heads else block.name if isinstance(block, Axis) else None
        if axis is not None and axis not in maps:
            known = matched(one[:, at : at + size], two[:, other_at : other_at + other], centred=False)
            if known is not None and is_heads:
                heads = heads_of(known, size // (child.sizes[KV_HEADS] * child.sizes["group"]))
                if heads is not None:
                    maps[HEADS] = heads
                    if (shared := kv_heads_of(heads, child, parent)) is not None:
                        maps[KV_HEADS] = shared
            elif known is not None:
                maps[axis] = known
        at, other_at = at + size, other_at + other


def _compare(found: Comparison, role: str, name: str, layer: int, place: int) -> None:
    """Add the difference of a matrix, on some of its rows and the columns that both have."""
    child, parent = found.child, found.parent
    other = parent.roles.layers[place].get(_renumbered(found, role, layer))
    if other is None or parent.roles.row(other).axes != child.roles.row(name).axes:
        return
    outer, last = child.roles.dims(name)
    maps = found.layer_maps[layer]
    rows = positions(outer, child.roles, parent.roles, maps)
    columns = positions((last,), child.roles, parent.roles, maps)
    if rows is None or columns is None:
        return
    chosen = _hidden_rows(found) if _writes_hidden(child.roles, name) else _block_of_rows(found, name, rows)
    used = np.flatnonzero(columns >= 0)
    if len(chosen) < 2 or len(used) < 2:
        return
    one = child.samples.rows(name, chosen)[:, used]
    two = parent.samples.rows(other, rows[chosen])[:, columns[used]]
    if found.hidden is not None and (signs := found.hidden.signs).min() < 0:
        two = two * signs[used] if last == RESIDUAL else two * signs[chosen, None] if outer == (RESIDUAL,) else two
    blocks = Blocks(one, two, child.samples.dtype(name), parent.samples.dtype(other))
    found.blocks[role, layer] = blocks
    is_transposed = child.roles.row(name).kind == "conv1d"
    found.differences.append(difference(role, layer, blocks, is_matrix=True, is_transposed=is_transposed))


def _renumbered(found: Comparison, role: str, layer: int) -> str:
    """Return the candidate's role of the child's first expert."""
    known = found.layer_maps[layer].get("experts")
    if known is None or ".experts.0." not in role or known.index[0] < 0:
        return role
    return role.replace(".experts.0.", f".experts.{known.index[0]}.")


def _block_of_rows(found: Comparison, name: str, rows: Array) -> Array:
    """Return rows of a matrix that both have: in the middle, beginning with a head."""
    known = np.flatnonzero(rows >= 0)
    count = int(np.clip(ROLE_BYTES // max(1, found.child.samples.row_bytes(name)), LEAST_ROWS, ROLE_ROWS))
    if len(known) and len(np.unique(np.diff(rows[known]))) > len(known) // 4:
        count = LEAST_ROWS  # another order: each row is a range of its own
    width = found.child.roles.head_width(name)
    start = max(0, min(len(known) // 3, len(known) - count)) // width * width
    return known[start : start + count]


def _compare_gains(found: Comparison) -> None:
    """Add the differences of all gains, which have been read."""
    child, parent, hidden = found.child, found.parent, found.hidden
    assert hidden is not None
    units = hidden.matched
    for layer, place in enumerate(found.layers):
        for role, name in child.roles.gains(layer).items() if place is not None else ():
            other = parent.roles.gains(place or 0).get(role)
            if other is None:
                continue
            one = child.samples.vector(name)[None, units]
            two = parent.samples.vector(other)[None, hidden.index[units]]
            blocks = Blocks(one, two, child.samples.dtype(name), parent.samples.dtype(other))
            found.differences.append(difference(role, layer, blocks, is_matrix=False, is_transposed=False))


def _compare_tokens(found: Comparison) -> None:
    """Add the difference of the embedding, on the tokens by which the hidden state was found."""
    child, parent, hidden, pairs = found.child, found.parent, found.hidden, found.tokens
    if pairs is None or hidden is None:
        return
    name, other = child.roles.table_of_tokens or "", parent.roles.table_of_tokens or ""
    units = hidden.matched
    one = child.samples.rows(name, pairs.child)[:, units]
    two = parent.samples.rows(other, pairs.parent)[:, hidden.index[units]] * hidden.signs[units]
    blocks = Blocks(one, two, child.samples.dtype(name), parent.samples.dtype(other))
    role = next(role for role, each in child.roles.outside.items() if each == name)
    found.blocks[role, None] = blocks
    found.differences.append(difference(role, None, blocks, is_matrix=True, is_transposed=False))
