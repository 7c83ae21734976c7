"""The expressions of a plan: what makes one tensor of the result from tensors of the source. Data, and its words."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import starmap

from surgeon.anatomy.axes import Index, Scale
from surgeon.checkpoint.header import TensorSpec
from surgeon.plan.rules import Rule
from surgeon.plan.schemes import Part, Scheme


@dataclass(frozen=True, slots=True)
class Read:
    """The source tensor called `name`, bit for bit."""

    name: str


@dataclass(frozen=True, slots=True, init=False)
class Gather:
    """Position j along `dim` is position index[j] of `source` times scale[j]; where index[j] is -1 it is new.

    A new position holds `fill` plus `mean` times the mean of `source` along `dim`.
    """

    source: "Expr"
    dim: int
    index: Index
    scale: Scale
    fill: float = 0.0
    mean: float = 0.0

    def __init__(
        self,
        source: "Expr",
        dim: int,
        index: Iterable[int],
        scale: Iterable[float],
        fill: float = 0.0,
        mean: float = 0.0,
    ) -> None:
        values = (source, dim, Index.of(index), Scale.of(scale), fill, mean)
        for name, value in zip(self.__match_args__, values, strict=True):
            object.__setattr__(self, name, value)


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
class Joined:
    """Tensors of one dtype laid end to end along `dim`."""

    parts: tuple["Expr", ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Uniform:
    """Numbers of mean 0, uniform, with `ratio` times the standard deviation of `like`, in its dtype.

    If `like` is constant, as in a layer of zeros, `fallback` replaces its standard deviation.
    `stream` names the tensor's own random stream under `seed`, so that a draw depends neither on the order of
    execution nor on other draws.
    """

    shape: tuple[int, ...]
    like: "Expr"
    ratio: float
    seed: int
    stream: str
    fallback: float = 0.0


@dataclass(frozen=True, slots=True)
class Normal:
    """A new tensor drawn from a normal distribution of mean 0; `seed` and `stream` as for Uniform."""

    spec: TensorSpec
    std: float
    seed: int
    stream: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A new tensor with one value everywhere."""

    spec: TensorSpec
    value: float


@dataclass(frozen=True, slots=True)
class Cast:
    """`source` in another floating dtype, rounded to nearest."""

    source: "Expr"
    dtype: str


@dataclass(frozen=True, slots=True)
class Rounded:
    """`source` rounded to its own dtype, as if its step had been written to disk."""

    source: "Expr"


@dataclass(frozen=True, slots=True)
class Mapped:
    """Blocks of `inner` positions along `dim`, in each stretch of old x inner: j is the sum of matrix[j, i] times i."""

    source: "Expr"
    matrix: "Expr"  # of shape (new, old)
    dim: int
    inner: int = 1


@dataclass(frozen=True, slots=True)
class Weighted:
    """The sum of `parts` of one shape, each times its number in one row of `weights`, shape (rows, parts)."""

    parts: tuple["Expr", ...]
    weights: "Expr"
    row: int


@dataclass(frozen=True, slots=True)
class Mix:
    """One tensor of several models' `parts` of one shape, by a rule, rounded once to `dtype`.

    With a `base`, the rule is applied to the differences from it. `densities` are the parts of each that stay, where
    the rule thins them out. `streams` name the random stream of each, so that a draw depends neither on the order of
    the parts nor on the files that hold them.
    """

    parts: tuple["Expr", ...]
    base: "Expr | None"
    weights: tuple[float, ...]
    rule: Rule
    dtype: str
    densities: tuple[float, ...] = ()
    streams: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Regress:
    """A linear map, or its bias, that does on each model's text what that model's map does (`plan/regressing.py`).

    `maps` are the models' weights, `biases` their biases where they have one, `grams` the Gram matrices of the inputs,
    None where a model has no text.
    """

    maps: tuple["Expr", ...]
    biases: tuple["Expr", ...]
    grams: tuple["Expr | None", ...]
    weights: tuple[float, ...]
    alpha: float
    dtype: str
    is_transposed: bool = False  # stored as inputs x outputs
    is_bias: bool = False  # which of the two this is


@dataclass(frozen=True, slots=True)
class Quantized:
    """A part of a weight that is stored as codes: the codes, their scales, or the shape (`plan/quantizing.py`)."""

    source: "Expr"
    scheme: Scheme
    part: Part


@dataclass(frozen=True, slots=True)
class Dequantized:
    """The weight, shape (outputs, inputs), that `codes` and `scale` stand for."""

    codes: "Expr"
    scale: "Expr"
    scheme: Scheme


Expr = (
    Read | Gather | Affine | Add | Joined | Uniform | Normal | Constant | Cast | Rounded
    | Mapped | Weighted | Mix | Regress | Quantized | Dequantized
)  # fmt: skip


def describe(expr: Expr) -> str:  # noqa: C901  # one case a kind
    """Return `expr` in one line, as a plan prints it: "bf16(model.norm.weight)"."""
    match expr:
        case Read(name):
            return name
        case Gather(source, dim, index, scale):
            scaled = (
                "" if scale.factors <= {1.0} else f" times {_listed(f'{factor:.6g} x{n}' for factor, n in scale.runs)}"
            )
            return f"gather({describe(source)}, dim {dim}: {_listed(starmap(_span, index.runs))}{scaled})"
        case Affine(source, factor, offset):
            return f"{factor:.6g} * {describe(source)}" + (f" + {offset:.6g}" if offset else "")
        case Add(parts):
            return " + ".join(map(describe, parts))
        case Regress(maps, grams=grams, weights=weights, alpha=alpha):
            each = (f"{weight:.6g} {describe(part)}" for weight, part in zip(weights, maps, strict=True))
            known = sum(gram is not None for gram in grams)
            return f"regmean({', '.join(each)}; {known} Gram matrices, alpha {alpha:.4g})"
        case Mix(parts, base, weights, rule):
            each = (f"{weight:.6g} {describe(part)}" for weight, part in zip(weights, parts, strict=True))
            return f"{rule.name}({', '.join(each)}{'' if base is None else f'; base {describe(base)}'})"
        case Joined(parts, dim):
            return f"joined({', '.join(map(describe, parts))}, dim {dim})"
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
        case Mapped(source, matrix, dim, inner):
            return f"map({describe(source)}, dim {dim} in blocks of {inner}: {describe(matrix)})"
        case Quantized(source, scheme, part):
            return f"{scheme.method} {part} of {describe(source)} ({scheme.words})"
        case Dequantized(codes, scale, scheme):
            return f"dequantized({describe(codes)}, {describe(scale)}; {scheme.words})"
        case Weighted(parts, weights, row):
            return f"mix({_listed(map(describe, parts))}: row {row} of {describe(weights)})"


def _span(first: int, length: int) -> str:
    return "new" if first == -1 else str(first) if length == 1 else f"{first}-{first + length - 1}"


def _listed(words: Iterable[str]) -> str:
    listed = list(words)
    return ", ".join(listed if len(listed) <= 6 else [*listed[:5], f"... ({len(listed)} runs)"])
