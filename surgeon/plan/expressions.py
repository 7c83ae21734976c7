"""The expressions of a plan: each says how one tensor of the result is made from tensors of the source.

They are plain data. They know shapes and dtypes, never numbers, and need neither torch nor the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from surgeon.checkpoint.spec import TensorSpec
from surgeon.errors import PlanError

FLOAT_DTYPES = frozenset({"F64", "F32", "BF16", "F16"})


@dataclass(frozen=True, slots=True)
class Read:
    """The source tensor called `name`, bit for bit."""

    name: str


@dataclass(frozen=True, slots=True)
class Scale:
    """`source` with each position along `dim` multiplied by its factor, given as runs of (length, factor)."""

    source: "Expr"
    dim: int
    runs: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Cast:
    """`source` in another floating dtype, rounded to nearest."""

    source: "Expr"
    dtype: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A fresh tensor with one value everywhere."""

    spec: TensorSpec
    value: float


@dataclass(frozen=True, slots=True)
class Normal:
    """A fresh tensor drawn from a normal distribution of mean 0.

    `stream` names the tensor's own random stream under `seed`, so that a draw depends on neither the order of
    execution nor on what else the plan draws.
    """

    spec: TensorSpec
    std: float
    seed: int
    stream: str


Expr = Read | Scale | Cast | Constant | Normal


def infer(expr: Expr, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    """Return the dtype and shape that `expr` makes. Raises PlanError when it cannot be made from `tensors`."""
    match expr:
        case Read(name):
            if name not in tensors:
                raise PlanError(f"the source has no tensor {name!r}")
            return tensors[name]
        case Scale(source, dim, runs):
            spec = infer(source, tensors)
            length = sum(count for count, _ in runs)
            if spec.dtype not in FLOAT_DTYPES or length != spec.shape[dim]:
                raise PlanError(f"cannot scale {length} positions of dim {dim} of a {spec.dtype} {list(spec.shape)}")
            return spec
        case Cast(source, dtype):
            spec = infer(source, tensors)
            if spec.dtype not in FLOAT_DTYPES:
                raise PlanError(f"cannot turn {spec.dtype} into {dtype}")
            return replace(spec, dtype=dtype)
        case Constant(spec) | Normal(spec):
            return spec


def substitute(expr: Expr, replacement: Callable[[str], Expr]) -> Expr:
    """Return `expr` with every Read of a name replaced by what `replacement` says of that name."""
    match expr:
        case Read(name):
            return replacement(name)
        case Scale(source) | Cast(source):
            return replace(expr, source=substitute(source, replacement))
        case Constant() | Normal():
            return expr


def reads(expr: Expr) -> tuple[str, ...]:
    """Return the names of the source tensors that `expr` reads."""
    match expr:
        case Read(name):
            return (name,)
        case Scale(source) | Cast(source):
            return reads(source)
        case Constant() | Normal():
            return ()


def describe(expr: Expr) -> str:
    """Return `expr` in one line, as a plan prints it: "bfloat16(model.norm.weight)"."""
    match expr:
        case Read(name):
            return name
        case Scale(source, dim, runs):
            factors = ", ".join(f"{count} x {factor:.6g}" for count, factor in runs)
            return f"scale({describe(source)}, dim {dim}: {factors})"
        case Cast(source, dtype):
            return f"{dtype.lower()}({describe(source)})"
        case Constant(spec, value):
            return f"constant({value:g}, {spec.dtype} {list(spec.shape)})"
        case Normal(spec, std, seed):
            return f"normal(std {std:.4g}, seed {seed}, {spec.dtype} {list(spec.shape)})"
