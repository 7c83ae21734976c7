"""The rounding that the stored dtype will cause, known from the plan alone."""

import math
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import and_, or_

from surgeon.anatomy.axes import runs_of
from surgeon.checkpoint.header import TensorSpec
from surgeon.plan.expressions import Add, Affine, Cast, Expr, Gather, Rounded
from surgeon.plan.plan import STORED_DTYPES, Plan, children, infer

COST = "expect a change of about 1 % of the logit range"  # measured: bfloat16, six families, factors 1.22 to 3
_NARROW = {code: word for word, code in STORED_DTYPES.items() if word != "float32"}
_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}  # of the significand


def dtype_cost(plan: Plan, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Return a note on the rounding of the result of `plan` in its stored dtype; none if the result is exact.

    A tensor stored in 16 bits is exact if its numbers come from the same dtype and are only moved and multiplied by
    powers of two. Another factor, a sum of two numbers, or a wider source rounds. A plan that is approximate anyway
    gets no note. `tensors` are those of the source.
    """
    if plan.approximate:
        return ()
    factors: set[float] = set()
    causes: set[str] = set()
    dtypes: set[str] = set()
    for expr in plan.tensors.values():
        dtype = infer(expr, tensors).dtype
        if dtype not in _NARROW:
            continue
        own_factors = set(_factors(expr))
        own_causes = {"sums with noise"} if _adds(expr) else set()
        own_causes |= {f"weights in {word}" for word in _wider_than(expr, dtype, tensors)}
        if own_factors or own_causes:
            dtypes.add(_NARROW[dtype])
        factors |= own_factors
        causes |= own_causes
    if not dtypes:
        return ()
    shown = sorted({f"{factor:.5g}" for factor in factors}, key=float)
    inexact = [f"factors such as {shown[-1]}"] if shown else []
    inexact += sorted(causes)
    return (
        f"stored as {', '.join(sorted(dtypes))}: {' and '.join(inexact)} round; {COST}; --dtype float32 keeps it exact",
    )


def _factors(expr: Expr) -> Iterator[float]:
    """Yield the factors in an expression that are not powers of two."""
    match expr:
        case Gather(_, _, index, scale, _, mean):
            used = scale.factors
            if not all(map(_is_power_of_two, used)):  # those of new positions count for nothing
                used = frozenset(run.scale for run in runs_of(index, scale) if run.first >= 0)
            used |= {mean} if mean and index.has_new else set()
            yield from (abs(factor) for factor in used if not _is_power_of_two(factor))
        case Affine(_, factor) if not _is_power_of_two(abs(factor)):
            yield abs(factor)
        case _:
            pass
    for child in children(expr):
        yield from _factors(child)


def _is_power_of_two(factor: float) -> bool:
    return factor == 0 or abs(math.frexp(factor)[0]) == 0.5


def _adds(expr: Expr) -> bool:
    """Return whether an expression adds two numbers anywhere; blocks side by side are no sums."""
    match expr:
        case Affine(_, _, offset) if offset:
            return True
        case Add((first, *rest)):
            earlier = [first]
            for part in rest:
                if any(_overlap(part, other) for other in earlier):
                    return True
                earlier.append(part)
        case _:
            pass
    return any(_adds(child) for child in children(expr))


def _overlap(part: Expr, other: Expr) -> bool:
    """Return whether two addends may both be nonzero in one place. `part` is gathered along one dimension."""
    if not isinstance(part, Gather):
        return True
    zeros = _zeros(part, part.dim) | _zeros(other, part.dim)
    return zeros.bit_count() < len(part.index)


def _zeros(expr: Expr, dim: int) -> int:
    """Return the positions along `dim` at which the expression shows that the whole tensor is zero, one bit for each.

    A number is the cheapest set of the positions of a long axis.
    """
    match expr:
        case Gather(source, along, index, scale, fill, mean):
            if along != dim:
                return 0 if fill else _zeros(source, dim)
            new_are_zero = not fill and not mean
            runs = (run for run in runs_of(index, scale) if (new_are_zero if run.first < 0 else run.scale == 0.0))
            return reduce(or_, ((1 << run.length) - 1 << run.at for run in runs), 0)
        case Affine(source, _, offset):
            return 0 if offset else _zeros(source, dim)
        case Add(parts):
            return reduce(and_, (_zeros(part, dim) for part in parts))
        case Cast(source) | Rounded(source):
            return _zeros(source, dim)
        case _:
            return 0


def _wider_than(expr: Expr, dtype: str, tensors: Mapping[str, TensorSpec]) -> Iterator[str]:
    """Yield the dtypes from which an expression is rounded to one with fewer bits, as --dtype spells them."""
    if isinstance(expr, Cast):
        inner = infer(expr.source, tensors).dtype
        if _BITS[inner] > _BITS[dtype]:
            yield next((word for word, code in STORED_DTYPES.items() if code == inner), "float64")
