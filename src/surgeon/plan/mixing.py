"""One tensor made of several models': the arithmetic of a Mix, in torch, block by block.

A rule of the first kind is a sum of the tensors whose coefficients follow from their inner products: linear, task
arithmetic, slerp, nuslerp, karcher, model-stock. The tensors are read once for the products, where the rule asks for
them, and once for the sum. A rule of the second kind (ties, dare) looks at every number: what the models add to the
base is thinned out, may be outvoted, and is summed.

Tensors of 32 bits and more are computed in float64, so that what is the same in all models stays the same bit for bit;
those of 16 bits in float32, except where differences are taken.

Sources: task arithmetic arXiv:2212.04089; TIES arXiv:2306.01708, here per tensor, as mergekit has it; DARE
arXiv:2311.03099; Model Stock arXiv:2403.19522; slerp and its straight line for nearly parallel tensors as in mergekit.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from surgeon.plan.expressions import Mix
from surgeon.plan.rules import KINDS
from surgeon.plan.summing import SUMMED, MakeRows, key_of, row_ranges, total_of

PARALLEL = 0.9995  # the cosine from which slerp goes straight
ALIKE = 1e-16  # 1 - cosine^2 up to which nuslerp does
STEPS, NEAR = 10, 1e-5  # of the search for a mean on the sphere: at most so many, down to an angle of so much
BINS = 1 << 16  # of a histogram of magnitudes: the upper 16 of their 31 bits, then the lower 15

Gram = Sequence[Sequence[float]]  # inner products of tensors


def mixed(
    mix: Mix, parts: Sequence[MakeRows], base: MakeRows | None, shape: tuple[int, ...], stored: Collection[str]
) -> MakeRows:
    """Return the function that makes rows of a Mix of the given shape, in float32 or float64.

    `parts` and `base` make rows of its tensors, whose dtypes are `stored`.
    """
    kind = KINDS[mix.rule.name]
    differs = kind.votes or kind.trims or kind.drops
    wide = torch.float64 if differs or {"F32", "F64"} & set(stored) else torch.float32
    if differs:
        assert base is not None, f"{mix.rule.name} needs a base"
        return _summed_differences(mix, parts, base, shape)
    terms = _terms(mix, parts, base, shape)

    def rows(start: int, stop: int) -> Tensor:
        total: Tensor | None = None
        for coefficient, make in terms:
            term = make(start, stop).to(wide) * coefficient
            total = term if total is None else total.add_(term)
        return torch.zeros((stop - start, *shape[1:]), dtype=wide) if total is None else total

    return rows


def _terms(
    mix: Mix, parts: Sequence[MakeRows], base: MakeRows | None, shape: tuple[int, ...]
) -> list[tuple[float, MakeRows]]:
    """Return the tensors that are summed, each with its coefficient, which is not 0."""
    name, weights = mix.rule.name, _shares(mix)
    find = _COEFFICIENTS.get(name)
    own = weights if find is None else find(inner_products(parts, base, shape), weights)
    own = [mix.rule.scale * weight for weight in own]
    found = list(zip(own, parts, strict=True))
    if base is not None:
        found.append((1.0 - sum(own), base))
    return [(coefficient, make) for coefficient, make in found if coefficient]


def _shares(mix: Mix) -> list[float]:
    """Return the weights, divided by their sum where the rule says so and there is one."""
    total = math.fsum(mix.weights)
    return [weight / total for weight in mix.weights] if mix.rule.normalize and total else list(mix.weights)


# Coefficients from inner products


def inner_products(parts: Sequence[MakeRows], base: MakeRows | None, shape: tuple[int, ...]) -> list[list[float]]:
    """Return the inner products of the tensors, or of their differences from `base`, in float64.

    They are summed in an order that is fixed here, so that they are the same on every machine.
    """
    count = len(parts)
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    sums = torch.zeros(len(pairs), dtype=torch.float64)
    for start, stop in row_ranges(shape, SUMMED):
        values = [make(start, stop).to(torch.float64).flatten() for make in parts]
        if base is not None:
            origin = base(start, stop).to(torch.float64).flatten()
            values = [value - origin for value in values]
        for number, (i, j) in enumerate(pairs):
            sums[number] += total_of(values[i] * values[j], 0)[0] if values[i].numel() else 0.0
    gram = [[0.0] * count for _ in range(count)]
    for (i, j), value in zip(pairs, sums.tolist(), strict=True):
        gram[i][j] = gram[j][i] = value
    return gram


def cosine(gram: Gram, i: int, j: int) -> float:
    """Return the cosine of two tensors, 0 where one is zero."""
    norms = math.sqrt(gram[i][i]) * math.sqrt(gram[j][j])
    return max(-1.0, min(1.0, gram[i][j] / norms)) if norms else 0.0


def _slerp(gram: Gram, shares: Sequence[float]) -> list[float]:
    """Return the coefficients of the point between two tensors on their arc, which is straight where it is short."""
    return _on_arc(cosine(gram, 0, 1), shares, straight=lambda angle: abs(angle) > PARALLEL)


def _nuslerp(gram: Gram, shares: Sequence[float]) -> list[float]:
    """Return the coefficients of the point on the arc, also where that is short."""
    return _on_arc(cosine(gram, 0, 1), shares, straight=lambda angle: 1 - angle * angle <= ALIKE)


def _on_arc(angle: float, shares: Sequence[float], *, straight: Callable[[float], bool]) -> list[float]:
    if straight(angle):
        return list(shares)
    theta = math.acos(angle)
    return [math.sin(share * theta) / math.sin(theta) for share in shares]


def _model_stock(gram: Gram, shares: Sequence[float]) -> list[float]:
    """Return the same coefficient for each difference: t / N, with t = N c / (1 + (N - 1) c) and c their mean cosine.

    t lies between 0 and 1: where the differences point apart, the formula would go to the other side of the base.
    """
    count = len(gram)
    pairs = [cosine(gram, i, j) for i in range(count) for j in range(i)]
    mean = max(0.0, math.fsum(sorted(pairs)) / len(pairs))
    ratio = min(1.0, count * mean / (1 + (count - 1) * mean))
    return [ratio / count] * count


def _karcher(gram: Gram, shares: Sequence[float]) -> list[float]:
    """Return the coefficients of the mean of the directions on the sphere, with the mean of the lengths.

    Each step of the search stays a sum of the directions, so that their inner products are all that it needs.
    """
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    length = math.fsum(share * norm for share, norm in zip(shares, norms, strict=True))
    used = [i for i, norm in enumerate(norms) if norm > NEAR]
    total = math.fsum(shares[i] for i in used)
    if not used or not total:
        return [0.0] * len(gram)
    directions = np.array([[1.0 if i == j else cosine(gram, i, j) for j in used] for i in used])
    parts = np.array([shares[i] / total for i in used])

    def norm_of(mean: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
        return math.sqrt(max(0.0, float((mean[:, None] * mean[None, :] * directions).sum())))

    mean = parts.copy()
    norm = norm_of(mean)
    mean = np.eye(len(used))[0] if norm < NEAR else mean / norm
    for _ in range(STEPS):
        cosines = np.clip((directions * mean[None, :]).sum(axis=1), -1.0, 1.0)
        angles = np.arccos(cosines)
        tangent = np.zeros(len(used))
        for i, angle in enumerate(angles.tolist()):
            if angle >= NEAR and math.sin(angle) > 0:
                tangent += parts[i] * (angle / math.sin(angle)) * (np.eye(len(used))[i] - cosines[i] * mean)
        size = norm_of(tangent)
        if size < NEAR:
            break
        mean = math.cos(size) * mean + math.sin(size) * tangent / size
        norm = norm_of(mean)
        mean = mean / norm if norm > NEAR else mean
    found = dict(zip(used, mean.tolist(), strict=True))
    return [length * found.get(i, 0.0) / norm if norm > NEAR else 0.0 for i, norm in enumerate(norms)]


_COEFFICIENTS: dict[str, Callable[[Gram, Sequence[float]], list[float]]] = {
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "model-stock": _model_stock,
    "karcher": _karcher,
}


# Differences that are thinned out and vote


def _summed_differences(mix: Mix, parts: Sequence[MakeRows], base: MakeRows, shape: tuple[int, ...]) -> MakeRows:
    kind, rule = KINDS[mix.rule.name], mix.rule
    differences = [_difference(part, base) for part in parts]
    for number, density in enumerate(mix.densities):
        if density < 1 and kind.trims:
            differences[number] = _trimmed(differences[number], shape, density)
        elif density < 1 and kind.drops:
            differences[number] = _dropped(differences[number], shape, density, key_of(rule.seed, mix.streams[number]))

    def rows(start: int, stop: int) -> Tensor:
        values = [make(start, stop) for make in differences]
        weighted = [value * weight for value, weight in zip(values, mix.weights, strict=True)]
        count: Tensor | float = math.fsum(mix.weights)
        if kind.votes:
            is_up = _sum(weighted) >= 0
            agree = [torch.where(is_up, value > 0, value < 0) for value in weighted]
            weighted = [value * voice for value, voice in zip(weighted, agree, strict=True)]
            count = _sum([voice * weight for voice, weight in zip(agree, mix.weights, strict=True)])
        total = _sum(weighted)
        if rule.normalize:
            total = total / (torch.where(count == 0, 1.0, count) if isinstance(count, Tensor) else count or 1.0)
        return total.mul_(rule.scale).add_(base(start, stop))

    return rows


def _sum(values: Sequence[Tensor]) -> Tensor:
    total = values[0].to(torch.float64, copy=True)
    for value in values[1:]:
        total.add_(value)
    return total


def _difference(part: MakeRows, base: MakeRows) -> MakeRows:
    return lambda start, stop: part(start, stop).to(torch.float64) - base(start, stop).to(torch.float64)


def _trimmed(rows: MakeRows, shape: tuple[int, ...], density: float) -> MakeRows:
    """Return rows with only the largest magnitudes of the tensor: so many as `density` says, and their equals."""
    least = _least_kept(rows, shape, density)

    def make(start: int, stop: int) -> Tensor:
        value = rows(start, stop)
        return value * (_magnitudes(value) >= least)

    return make


def _least_kept(rows: MakeRows, shape: tuple[int, ...], density: float) -> int:
    """Return the magnitude of the last number that stays, as the bits of a float32, in two passes over the tensor."""
    kept = max(1, int(density * math.prod(shape)))

    def found(bins: Iterator[Tensor], left: int) -> tuple[int, int]:
        """Return the highest bin with so many numbers in it and above it, and how many of them are to be in it."""
        counts = sum(bins, torch.zeros(BINS, dtype=torch.int64)).tolist()
        for number in range(BINS - 1, -1, -1):
            if counts[number] >= left:
                return number, left
            left -= counts[number]
        return 0, left

    ranges = list(row_ranges(shape, SUMMED))
    upper = (torch.bincount(_magnitudes(rows(*each)).flatten() >> 15, minlength=BINS) for each in ranges)
    high, left = found(upper, kept)

    def lower(start: int, stop: int) -> Tensor:
        magnitudes = _magnitudes(rows(start, stop)).flatten()
        return torch.bincount(magnitudes[magnitudes >> 15 == high] & 0x7FFF, minlength=BINS)

    return high << 15 | found((lower(*each) for each in ranges), left)[0]


def _magnitudes(value: Tensor) -> Tensor:
    """Return the bits of |value| in float32 as integers, which are in the order of the numbers."""
    return value.abs().to(torch.float32).view(torch.int32)


def _dropped(rows: MakeRows, shape: tuple[int, ...], density: float, key: int) -> MakeRows:
    """Return rows of which each number stays with probability `density`, divided by it, or is 0."""
    columns, bound = math.prod(shape[1:]), round(density * 2**32)

    def make(start: int, stop: int) -> Tensor:
        first, last = start * columns, stop * columns
        word = first // 2  # of 64 bits: two numbers
        drawn = np.random.PCG64(key).advance(word).random_raw(-(-last // 2) - word).view(np.uint32)
        stays = torch.from_numpy(drawn[first % 2 :][: last - first] < bound).view(stop - start, *shape[1:])
        return rows(start, stop) * stays / density

    return make
