"""The expressions of a plan: each says how one tensor of the result is made from tensors of the source.

They are plain data. They know shapes and dtypes, never numbers, and need neither torch nor the weights. What they
compute is computed in float32 or wider, and rounded to the dtype of the expression once, where the plan ends or the
next plan begins (`Rounded`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from surgeon.checkpoint.spec import TensorSpec
from surgeon.errors import PlanError

FLOAT_DTYPES = frozenset({"F64", "F32", "BF16", "F16"})


@dataclass(frozen=True, slots=True)
class Read:
    """The source tensor called `name`, bit for bit."""

    name: str


@dataclass(frozen=True, slots=True)
class Gather:
    """Position j along `dim` is position index[j] of `source` times scale[j]; where index[j] is -1 it is new.

    A new position holds `fill` plus `mean` times the mean of `source` along `dim`.
    """

    source: "Expr"
    dim: int
    index: tuple[int, ...]
    scale: tuple[float, ...]
    fill: float = 0.0
    mean: float = 0.0


@dataclass(frozen=True, slots=True)
class Affine:
    """`source` times `factor` plus `offset`."""

    source: "Expr"
    factor: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Add:
    """The sum of tensors of one shape."""

    parts: tuple["Expr", ...]


@dataclass(frozen=True, slots=True)
class Uniform:
    """Numbers of mean 0, uniform, with `ratio` times the standard deviation of `like`, in its dtype.

    Where `like` is constant, as what a silent layer writes, `fallback` takes the place of its standard deviation.
    `stream` names the tensor's own random stream under `seed`, so that a draw depends neither on the order of
    execution nor on what else the plan draws.
    """

    shape: tuple[int, ...]
    like: "Expr"
    ratio: float
    seed: int
    stream: str
    fallback: float = 0.0


@dataclass(frozen=True, slots=True)
class Normal:
    """A fresh tensor drawn from a normal distribution of mean 0; `seed` and `stream` as for Uniform."""

    spec: TensorSpec
    std: float
    seed: int
    stream: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A fresh tensor with one value everywhere."""

    spec: TensorSpec
    value: float


@dataclass(frozen=True, slots=True)
class Cast:
    """`source` in another floating dtype, rounded to nearest."""

    source: "Expr"
    dtype: str


@dataclass(frozen=True, slots=True)
class Rounded:
    """`source` rounded to its own dtype: what a step that was written to disk would have left."""

    source: "Expr"


Expr = Read | Gather | Affine | Add | Uniform | Normal | Constant | Cast | Rounded


def children(expr: Expr) -> tuple[Expr, ...]:
    """Return the expressions that `expr` is made of."""
    match expr:
        case Gather(source) | Affine(source) | Cast(source) | Rounded(source):
            return (source,)
        case Add(parts):
            return parts
        case Uniform(_, like):
            return (like,)
        case Read() | Normal() | Constant():
            return ()


def substitute(expr: Expr, replacement: Callable[[str], Expr]) -> Expr:
    """Return `expr` with every Read of a name replaced by what `replacement` says of that name."""
    match expr:
        case Read(name):
            return replacement(name)
        case Gather(source) | Affine(source) | Cast(source) | Rounded(source):
            return replace(expr, source=substitute(source, replacement))
        case Add(parts):
            return Add(tuple(substitute(part, replacement) for part in parts))
        case Uniform(_, like):
            return replace(expr, like=substitute(like, replacement))
        case Normal() | Constant():
            return expr


def reads(expr: Expr) -> tuple[str, ...]:
    """Return the names of the source tensors that `expr` reads, each once, in the order of their first use."""
    return tuple(dict.fromkeys(_reads(expr)))


def infer(expr: Expr, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    """Return the dtype and shape that `expr` makes. Raises PlanError when it cannot be made from `tensors`."""
    match expr:
        case Read(name):
            if name not in tensors:
                raise PlanError(f"the source has no tensor {name!r}")
            return tensors[name]
        case Gather(source, dim, index):
            spec = _number(source, tensors)
            if dim >= len(spec.shape) or max(index, default=-1) >= spec.shape[dim] or min(index, default=0) < -1:
                raise PlanError(f"cannot gather {len(index)} positions along dim {dim} of {list(spec.shape)}")
            return replace(spec, shape=(*spec.shape[:dim], len(index), *spec.shape[dim + 1 :]))
        case Affine(source):
            return _number(source, tensors)
        case Add(parts):
            specs = {_number(part, tensors) for part in parts}
            if len(specs) != 1:
                shapes = sorted(f"{spec.dtype} {list(spec.shape)}" for spec in specs)
                raise PlanError(f"cannot add {' and '.join(shapes)}")
            return specs.pop()
        case Cast(source, dtype):
            return replace(_number(source, tensors), dtype=dtype)
        case Rounded(source):
            return infer(source, tensors)
        case Uniform(shape, like):
            return replace(_number(like, tensors), shape=shape)
        case Normal(spec) | Constant(spec):
            return spec


def describe(expr: Expr) -> str:
    """Return `expr` in one line, as a plan prints it: "bf16(model.norm.weight)"."""
    match expr:
        case Read(name):
            return name
        case Gather(source, dim, index, scale):
            factors = ((factor, len(list(run))) for factor, run in groupby(scale))
            scaled = "" if set(scale) <= {1.0} else f" times {_listed(f'{f:.6g} x{n}' for f, n in factors)}"
            return f"gather({describe(source)}, dim {dim}: {_listed(map(_span, _consecutive(index)))}{scaled})"
        case Affine(source, factor, offset):
            return f"{factor:.6g} * {describe(source)}" + (f" + {offset:.6g}" if offset else "")
        case Add(parts):
            return " + ".join(map(describe, parts))
        case Cast(source, dtype):
            return f"{dtype.lower()}({describe(source)})"
        case Rounded(source):
            return f"rounded({describe(source)})"
        case Uniform(shape, like, ratio, seed):
            return f"uniform({ratio:.4g} std of {describe(like)}, seed {seed}, {list(shape)})"
        case Normal(spec, std, seed):
            return f"normal(std {std:.4g}, seed {seed}, {spec.dtype} {list(spec.shape)})"
        case Constant(spec, value):
            return f"constant({value:g}, {spec.dtype} {list(spec.shape)})"


def _number(expr: Expr, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    spec = infer(expr, tensors)
    if spec.dtype not in FLOAT_DTYPES:
        raise PlanError(f"cannot compute with {describe(expr)}: it is stored as {spec.dtype}")
    return spec


def _reads(expr: Expr) -> Iterator[str]:
    if isinstance(expr, Read):
        yield expr.name
    for child in children(expr):
        yield from _reads(child)


def _consecutive(index: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, last) of each run of positions that count up by one; new positions run by themselves."""
    runs: list[tuple[int, int]] = []
    for i in index:
        if runs and ((i == -1 and runs[-1][1] == -1) or (i > 0 and runs[-1][1] == i - 1 != -1)):
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    return runs


def _span(run: tuple[int, int]) -> str:
    first, last = run
    return "new" if first == -1 else str(first) if first == last else f"{first}-{last}"


def _listed(words: Iterable[str]) -> str:
    found = list(words)
    return ", ".join(found if len(found) <= 6 else [*found[:5], f"... ({len(found)} runs)"])
