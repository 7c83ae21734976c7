"""Which layer of a candidate each layer of the child is: by norm gains, then by a few rows of one matrix a layer.

Gains are one number for each position of the hidden state, unlike from layer to layer and hardly moved by training, so
they find the layers in a few kilobytes each. Rows decide where the two disagree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgeon.anatomy.axes import Axis
from surgeon.lineage.maps import AxisMap
from surgeon.lineage.numbers import Array
from surgeon.lineage.roles import HIDDEN, MATRICES, RESIDUAL, Roles
from surgeon.lineage.samples import Samples

ALIKE = 0.5  # cosine of the gains of two layers that are one
CERTAIN = 0.9  # of those that are one though their rows do not say so
ROWS, AMONG = 16, 64  # rows of each of the child's layers, and of the candidate's, among which they are looked for
MOST_BYTES = 16_000_000  # of the candidate's rows; above, only as many as of the child's are read
ROW_ALIKE = 0.35  # mean cosine of rows and their nearest that are the same
TESTED = 4  # of the child's layers, whose rows are tested where there are no gains
FEWEST = 4  # layers of which a drift can be told
UNITS = 1024  # positions of the hidden state that the p-value is computed on
LEAST_GAIN = 1e-6


@dataclass(frozen=True, eq=False)
class Gains:
    """How alike the gains of all pairs of layers are, shape (child's layers, candidate's); and how likely by chance.

    `statistic` is the mean over the child's layers of the best of each row; `p` and `z` compare it with the same under
    permutations of the child's positions.
    """

    alike: Array
    statistic: float
    p: float
    z: float


def profiles(samples: Samples, roles: Roles) -> list[dict[str, Array]]:
    """Return for each layer its gains, log |gain|, and its shifts, by role. Reads all of them at once."""
    names = [roles.gains(layer) for layer in range(len(roles.layers))]
    samples.load((name, np.arange(1)) for found in names for name in found.values())
    profiles = []
    for found in names:
        vectors = {}
        for role, name in found.items():
            value = samples.vector(name) + roles.added(name)
            is_gain = roles.row(name).kind == "gain"
            vectors[role] = np.log(np.maximum(np.abs(value), LEAST_GAIN)) if is_gain else value
        profiles.append(vectors)
    return profiles


def compare_gains(
    child: Sequence[dict[str, Array]],
    parent: Sequence[dict[str, Array]],
    hidden: AxisMap,
    *,
    permutations: int,
    seed: int,
) -> Gains | None:
    """Return how alike the gains of two models are, None where they have none in common, or constant ones.

    Of each role the candidate's mean over layers is subtracted from both, then each vector's own mean: what all layers
    share says nothing about which layer one is. The p-value is (1 + those at least as high) / (1 + permutations), with
    one permutation of the hidden state for all layers and roles, for the gains of one model are not independent.
    """
    units, random = hidden.matched, np.random.default_rng(seed)
    sets = []
    for role in dict.fromkeys(role for vectors in child for role in vectors):
        ours, theirs = _varied(child, role, units), _varied(parent, role, hidden.index[units])
        if ours and theirs:
            a = np.stack([child[j][role] for j in ours])[:, units]
            b = np.stack([parent[i][role] for i in theirs])[:, hidden.index[units]]
            sets.append((ours, theirs, a, b))
    if not sets or len(units) < 8:
        return None
    shape = (len(child), len(parent))
    alike = _alike(sets, shape, None)
    chosen = random.permutation(len(units))[:UNITS] if len(units) > UNITS else np.arange(len(units))
    few = [(ours, theirs, a[:, chosen], b[:, chosen]) for ours, theirs, a, b in sets]
    statistic = _statistic(_alike(few, shape, None))
    chance = np.array([_statistic(_alike(few, shape, random.permutation(len(chosen)))) for _ in range(permutations)])
    p = (1 + int(np.sum(chance >= statistic))) / (1 + permutations)
    return Gains(
        _without_drift(sets, alike), statistic, p, float((statistic - chance.mean()) / max(1e-9, float(chance.std())))
    )


def _varied(model: Sequence[dict[str, Array]], role: str, units: Array) -> list[int]:
    """Return the layers whose gains differ from position to position: fresh ones are all alike, and say nothing."""
    return [i for i, vectors in enumerate(model) if role in vectors and float(np.ptp(vectors[role][units])) > 1e-6]


_Set = tuple[list[int], list[int], Array, Array]


def _alike(sets: Sequence[_Set], shape: tuple[int, int], order: Array | None) -> Array:
    """Return the cosines of all pairs of layers, averaged over the roles that both have; -1 where they share none."""
    total, count = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for ours, theirs, a, b in sets:
        shared = b.mean(0) if len(b) > 1 else 0.0
        found = _unit((a if order is None else a[:, order]) - shared) @ _unit(b - shared).T
        total[np.ix_(ours, theirs)] += found
        count[np.ix_(ours, theirs)] += 1
    return np.where(count > 0, total / np.maximum(count, 1), -1)


def _without_drift(sets: Sequence[_Set], alike: Array) -> Array:
    """Return how alike the layers are once what training did to all of them alike is subtracted.

    Of each layer it is the median change of the others, from the candidate's layers that are most like them: a layer's
    own change would make it like any layer, and a few layers may be taken for others, or be new.
    """
    best, shape = alike.argmax(1), alike.shape
    if shape[0] < FEWEST:
        return alike
    still = []
    for ours, theirs, a, b in sets:
        at = {layer: place for place, layer in enumerate(theirs)}
        known = [k for k, j in enumerate(ours) if best[j] in at and alike[j, best[j]] > ALIKE]
        change = {k: a[k] - b[at[best[ours[k]]]] for k in known}
        still.append((ours, theirs, a - np.stack([_median(change, a[k], but=k) for k in range(len(ours))]), b))
    return _alike(still, shape, None)


def _median(change: Mapping[int, Array], like: Array, *, but: int) -> Array:
    """Return the median of the changes of all layers but one, zeros of fewer than three."""
    others = [each for k, each in change.items() if k != but]
    middle: Array = np.median(others, axis=0) if len(others) > 2 else np.zeros_like(like)
    return middle


def _statistic(alike: Array) -> float:
    return float(alike.max(1).mean())


def _unit(vectors: Array) -> Array:
    values = vectors - vectors.mean(1, keepdims=True)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    normal: Array = values / np.where(lengths > 1e-12, lengths, 1)
    return normal


# Rows


@dataclass(frozen=True, eq=False)
class RowEvidence:
    """How alike rows of all pairs of layers are: the mean over the child's rows of the highest cosine.

    `distance` is the relative distance of the rows of each pair, `floor` is what a pair has by chance and no more.
    `few` are the rows of a few of the child's layers and of all the candidate's, for a test.
    """

    alike: Array
    distance: Array
    floor: float
    few: tuple[Array, Array]


def compare_rows(child: Samples, parent: Samples, own: Roles, other: Roles, hidden: AxisMap) -> RowEvidence | None:
    """Return how alike the layers are by rows that read or write the whole hidden state; None without such rows.

    The child's first rows are looked for among the candidate's first ones, wherever they stand: neurons may have been
    dropped, or be in another order.
    """
    shape = (len(own.layers), len(other.layers))
    alike, distance = np.full(shape, -1, np.float32), np.full(shape, np.inf, np.float32)
    units, floor = hidden.matched, 0.0
    groups = _probes(own, other)
    few: list[tuple[Array, Array]] = []
    for role, (ours, theirs) in groups.items():
        mine, yours = [own.layers[j][role] for j in ours], [other.layers[i][role] for i in theirs]
        among = AMONG if len(yours) * AMONG * parent.row_bytes(yours[0]) <= MOST_BYTES else ROWS
        count, among = min(ROWS, child.shape(mine[0])[0]), min(among, parent.shape(yours[0])[0])
        child.load((name, np.arange(count)) for name in mine)
        parent.load((name, np.arange(among)) for name in yours)
        a = np.stack([child.rows(name, np.arange(count)) for name in mine])[:, :, units] * hidden.signs[units]
        b = np.stack([parent.rows(name, np.arange(among)) for name in yours])[:, :, hidden.index[units]]
        cosines, gaps = _nearest(a, b)
        some = np.unique(np.linspace(0, len(a) - 1, TESTED).astype(int))
        few.append((a[some].reshape(-1, len(units)), b[:, :ROWS].reshape(-1, len(units))))
        alike[np.ix_(ours, theirs)], distance[np.ix_(ours, theirs)] = cosines, gaps
        floor = max(floor, 1.5 * float(np.sqrt(2 * np.log(max(2, among)) / len(units))))
    return RowEvidence(alike, distance, max(ROW_ALIKE, floor), few[0]) if groups else None


def p_of_rows(rows: RowEvidence, *, permutations: int, seed: int) -> float:
    """Return the p-value of rows: how likely by chance they are as close to the candidate's, for models without gains.

    The statistic is the mean over rows of the highest cosine; the permutations are of the child's positions, the same
    for all rows.
    """
    random = np.random.default_rng(seed)
    a, b = rows.few
    if a.shape[1] > UNITS:
        chosen = random.permutation(a.shape[1])[:UNITS]
        a, b = a[:, chosen], b[:, chosen]
    a, b = (each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-30) for each in (a, b))
    observed = float((a @ b.T).max(1).mean())
    chance = [float((a[:, random.permutation(a.shape[1])] @ b.T).max(1).mean()) for _ in range(permutations)]
    return (1 + sum(each >= observed for each in chance)) / (1 + permutations)


def _probes(own: Roles, other: Roles) -> dict[str, tuple[list[int], list[int]]]:
    """Return roles whose columns are the hidden state, each with layers of both models; together all that have one.

    Neurons come before heads: there are more of them, and each is unlike the others.
    """
    counts: dict[str, list[int]] = {}
    for layer, tensors in enumerate(own.layers):
        for role, name in tensors.items():
            outer, last = own.dims(name)
            if own.row(name).kind in MATRICES and last == RESIDUAL and len(outer) == 1 and ".experts." not in role:
                counts.setdefault(role, []).append(layer)
    ordered = sorted(counts, key=lambda role: (-len(counts[role]), _rank(own, role), role))
    found: dict[str, tuple[list[int], list[int]]] = {}
    done: set[int] = set()
    for role in ordered:
        ours = [layer for layer in counts[role] if layer not in done]
        theirs = [layer for layer, tensors in enumerate(other.layers) if role in tensors]
        if ours and theirs and other.dims(other.layers[theirs[0]][role])[1] == RESIDUAL:
            found[role] = (ours, theirs)
            done |= set(ours)
    return found


def _rank(roles: Roles, role: str) -> int:
    name = next(tensors[role] for tensors in roles.layers if role in tensors)
    return 0 if roles.dims(name)[0] == (Axis("ffn"),) else 1


def _nearest(a: Array, b: Array) -> tuple[Array, Array]:
    """Return for all pairs of layers the mean highest cosine of rows, and the relative distance to those rows.

    Shapes (J, r, d) and (I, s, d); both results (J, I).
    """
    long_a, long_b = np.linalg.norm(a, axis=2), np.linalg.norm(b, axis=2)
    unit_a = a / np.where(long_a > 0, long_a, 1)[:, :, None]
    unit_b = b / np.where(long_b > 0, long_b, 1)[:, :, None]
    flat = unit_b.reshape(-1, b.shape[2])
    cosines, gaps = np.zeros((len(a), len(b)), np.float32), np.zeros((len(a), len(b)), np.float32)
    for j, rows in enumerate(unit_a):
        found = (rows @ flat.T).reshape(len(rows), len(b), -1)
        best, height = found.argmax(2), found.max(2)
        cosines[j] = height.mean(0)
        near = long_b[np.arange(len(b))[None], best]
        squares = long_a[j][:, None] ** 2 + near**2 - 2 * height * long_a[j][:, None] * near
        gaps[j] = np.sqrt(np.maximum(squares, 0).sum(0) / np.maximum((near**2).sum(0), 1e-24))
    return cosines, gaps


# Both together


def decide(gains: Gains | None, rows: RowEvidence | None, own: Roles, other: Roles) -> list[int | None]:
    """Return the candidate's layer that each layer of the child is, None for one that is none of them.

    Rows decide where they are alike. Else gains do, unless the rows of most other layers are alike: then this one's
    rows are not the candidate's, and only gains that are nearly the same count.
    """
    shape = (len(own.layers), len(other.layers))
    by_gains = np.full(shape, -1.0) if gains is None else gains.alike
    by_rows, floor = (np.full(shape, -1.0), 2.0) if rows is None else (rows.alike, rows.floor)
    apart = np.array([[own.stack(j) != other.stack(i) for i in range(shape[1])] for j in range(shape[0])])
    by_gains, by_rows = np.where(apart, -1, by_gains), np.where(apart, -1, by_rows)
    rows_hold = bool(np.mean(by_rows.max(1) > floor) > 0.5)
    found: list[int | None] = []
    for j in range(shape[0]):
        before = found[-1] if found else None
        if by_rows[j].max() > floor:
            found.append(_best(by_rows[j] + 1e-3 * by_gains[j], before))
        elif by_gains[j].max() > (CERTAIN if rows_hold else ALIKE):
            found.append(_best(by_gains[j], before))
        else:
            found.append(None)
    return found


def _best(scores: Array, before: int | None) -> int:
    """Return the best layer; of equal ones, which a candidate with repeated layers has, the one that continues."""
    best = int(scores.argmax())
    following = -1 if before is None else before + 1
    return following if 0 <= following < len(scores) and scores[following] > scores[best] - 1e-4 else best


def hidden_of(child: Roles, parent: Roles) -> AxisMap | None:
    """Return the map of the hidden state onto itself, None where the sizes differ."""
    same = child.sizes[HIDDEN] == parent.sizes[HIDDEN]
    return AxisMap.same(child.sizes[HIDDEN]) if same else None
