"""Plans: a plan is the config of the result and one expression for each of its tensors.

Plans are pure data. Deciding one reads no weights; plans compose with `then`, and print as text or JSON.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any

from surgeon.anatomy.axes import Index
from surgeon.checkpoint.header import CheckpointSpec, TensorSpec, is_quantized
from surgeon.errors import PlanError
from surgeon.plan.expressions import (
    Add,
    Affine,
    Cast,
    Constant,
    Dequantized,
    Expr,
    Gather,
    Joined,
    Mapped,
    Mix,
    Normal,
    Quantized,
    Read,
    Regress,
    Rounded,
    Uniform,
    Weighted,
    describe,
)
from surgeon.showing import Shown

FLOAT_DTYPES = frozenset({"F64", "F32", "BF16", "F16"})


def children(expr: Expr) -> tuple[Expr, ...]:
    """Return the expressions that `expr` is made of."""
    kind = type(expr)  # a match takes several times as long, and this is asked a million times of a mixture of experts
    if kind in _OF_ONE:
        return (expr.source,)  # type: ignore[union-attr]
    if kind is Add or kind is Joined:
        return expr.parts  # type: ignore[union-attr]
    if isinstance(expr, Mix):
        return expr.parts if expr.base is None else (*expr.parts, expr.base)
    if isinstance(expr, Regress):
        return (*expr.maps, *expr.biases, *(gram for gram in expr.grams if gram is not None))
    if kind is Mapped:
        return expr.source, expr.matrix  # type: ignore[union-attr]
    if kind is Weighted:
        return *expr.parts, expr.weights  # type: ignore[union-attr]
    if isinstance(expr, Dequantized):
        return expr.codes, expr.scale
    return (expr.like,) if kind is Uniform else ()  # type: ignore[union-attr]


_OF_ONE = frozenset((Gather, Affine, Cast, Rounded, Quantized))


def substitute(expr: Expr, replacement: Callable[[str], Expr]) -> Expr:
    """Return `expr` with every Read of a name replaced by `replacement(name)`, and `expr` itself where all stay."""
    if isinstance(expr, Read):
        new = replacement(expr.name)
        return expr if new == expr else new
    old = children(expr)
    parts = tuple([substitute(part, replacement) for part in old])
    if all(map(is_, parts, old)):
        return expr
    match expr:
        case Gather() | Affine() | Cast() | Rounded() | Quantized():
            return replace(expr, source=parts[0])
        case Dequantized():
            return replace(expr, codes=parts[0], scale=parts[1])
        case Add() | Joined():
            return replace(expr, parts=parts)
        case Mix(of, base):
            return replace(expr, parts=parts[: len(of)], base=None if base is None else parts[-1])
        case Regress(maps, biases, grams):
            rest = iter(parts[len(maps) + len(biases) :])
            placed = tuple(None if gram is None else next(rest) for gram in grams)
            return replace(expr, maps=parts[: len(maps)], biases=parts[len(maps) :][: len(biases)], grams=placed)
        case Uniform():
            return replace(expr, like=parts[0])
        case Mapped():
            return replace(expr, source=parts[0], matrix=parts[1])
        case Weighted():
            return replace(expr, parts=parts[:-1], weights=parts[-1])
        case _:
            raise AssertionError(f"{expr} has no parts")


def reads(expr: Expr) -> tuple[str, ...]:
    """Return the names of the source tensors that `expr` reads, each once, in the order of their first use."""
    names = [expr.name] if isinstance(expr, Read) else [name for child in children(expr) for name in reads(child)]
    return tuple(dict.fromkeys(names)) if len(names) > 1 else tuple(names)


def infer(expr: Expr, tensors: Mapping[str, TensorSpec]) -> TensorSpec:  # noqa: C901  # one case a kind
    """Return the dtype and shape that `expr` makes. Raises PlanError if `tensors` do not allow it."""
    match expr:
        case Read(name):
            if name not in tensors:
                raise PlanError(f"the source has no tensor {name!r}")
            return tensors[name]
        case Gather(source, dim, index):
            spec = _number(source, tensors)
            if dim >= len(spec.shape) or index.highest >= spec.shape[dim]:
                raise PlanError(f"cannot gather {len(index)} positions along dim {dim} of {list(spec.shape)}")
            return TensorSpec(spec.dtype, (*spec.shape[:dim], len(index), *spec.shape[dim + 1 :]))
        case Affine(source):
            return _number(source, tensors)
        case Add(parts):
            first, *others = [_number(part, tensors) for part in parts]
            if any(other != first for other in others):
                shapes = sorted({f"{spec.dtype} {list(spec.shape)}" for spec in (first, *others)})
                raise PlanError(f"cannot add {' and '.join(shapes)}")
            return first
        case Regress(dtype=dtype):
            return TensorSpec(dtype, _number(expr.biases[0] if expr.is_bias else expr.maps[0], tensors).shape)
        case Mix(dtype=dtype):
            sizes = {_number(part, tensors).shape for part in children(expr)}
            if len(sizes) > 1:
                raise PlanError(f"cannot merge {' and '.join(str(list(shape)) for shape in sorted(sizes))}")
            return TensorSpec(dtype, sizes.pop())
        case Joined(parts, dim):
            specs = [_number(part, tensors) for part in parts]
            length = sum(spec.shape[dim] for spec in specs)
            if len({(spec.dtype, *spec.shape[:dim], length, *spec.shape[dim + 1 :]) for spec in specs}) > 1:
                raise PlanError(f"cannot lay {' and '.join(map(describe, parts))} end to end: their shapes differ")
            return TensorSpec(specs[0].dtype, (*specs[0].shape[:dim], length, *specs[0].shape[dim + 1 :]))
        case Cast(source, dtype):
            return TensorSpec(dtype, _number(source, tensors).shape)
        case Rounded(source):
            return infer(source, tensors)
        case Uniform(shape, like):
            return TensorSpec(_number(like, tensors).dtype, shape)
        case Normal(spec) | Constant(spec):
            return spec
        case Mapped() | Weighted():
            return _learned(expr, tensors)
        case Quantized(source, scheme, part):
            return scheme.spec(part, _number(source, tensors))
        case Dequantized(codes, scale, scheme):
            (outputs, columns), each = infer(codes, tensors).shape, _number(scale, tensors)
            return TensorSpec(each.dtype, (outputs, columns * scheme.codes_per_word))


def _learned(expr: Mapped | Weighted, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    if isinstance(expr, Weighted):
        if len(expr.parts) != (shape := _number(expr.weights, tensors).shape)[1] or expr.row >= shape[0]:
            raise PlanError(f"cannot mix {len(expr.parts)} tensors by row {expr.row} of {list(shape)} weights")
        return infer(Add(expr.parts), tensors)
    spec, (new, old), dim = _number(expr.source, tensors), _number(expr.matrix, tensors).shape, expr.dim
    if spec.shape[dim] % (old * expr.inner):
        raise PlanError(f"cannot map blocks of {old} x {expr.inner} positions along dim {dim} of {list(spec.shape)}")
    return TensorSpec(spec.dtype, (*spec.shape[:dim], spec.shape[dim] // old * new, *spec.shape[dim + 1 :]))


def _number(expr: Expr, tensors: Mapping[str, TensorSpec]) -> TensorSpec:
    spec = infer(expr, tensors)
    if spec.dtype not in FLOAT_DTYPES:
        raise PlanError(f"cannot compute with {describe(expr)}: it is stored as {spec.dtype}")
    return spec


# Plans

# The words of --dtype and config.json for the dtypes that a plan can store.
STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """A result as a function of its source.

    `layer_map[i]` is the source layer of result layer i, None for a new one; where the MLP halves are of other layers
    than the attentions, it tells of the attentions and `mlp_map` of the MLPs. `steps` holds the requested surgeries,
    one {verb: options} each; `notes` holds sentences for the user, and `approximate` the reasons why the result may
    compute something else than its source. `axes` holds, for each axis that was widened or cut, the source position of
    each position of the result, -1 for a new one. An axis is left out if its layers keep different positions; a later
    step on such an axis counts from that step.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Expr]
    layer_map: tuple[int | None, ...]
    steps: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    approximate: tuple[str, ...] = ()
    axes: Mapping[str, Index] = field(default_factory=dict)
    mlp_map: tuple[int | None, ...] | None = None  # None: the same as layer_map
    metadata: Mapping[str, str] = field(default_factory=dict)  # that each weight file holds in its header

    def then(self, later: "Plan") -> "Plan":
        """Return one plan that does this one, then `later`: each Read of `later` becomes this plan's expression."""
        layers = tuple(None if i is None else self.layer_map[i] for i in later.layer_map)
        mlps = tuple(None if i is None else self.mlp_layers[i] for i in later.mlp_layers)
        tensors = {name: substitute(expr, self._expression) for name, expr in later.tensors.items()}
        axes = dict(self.axes)
        for axis, index in later.axes.items():
            before = self.axes.get(axis)
            axes[axis] = index if before is None else index.of_old(before)
        return Plan(
            config=later.config,
            tensors=tensors,
            layer_map=layers,
            steps=self.steps + later.steps,
            notes=self.notes + later.notes,
            approximate=self.approximate + later.approximate,
            axes=axes,
            mlp_map=None if mlps == layers else mlps,
            metadata=later.metadata,
        )

    @property
    def mlp_layers(self) -> tuple[int | None, ...]:
        """The source layer of each layer's MLP."""
        return self.layer_map if self.mlp_map is None else self.mlp_map

    @property
    def moves_only(self) -> bool:
        """Whether the plan copies bytes and computes nothing."""
        return all(isinstance(expr, Read) for expr in self.tensors.values())

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The notes, after the reasons why the result is approximate."""
        return (*(f"approximate: {reason}" for reason in self.approximate), *self.notes)

    def cast(self, dtype: str) -> "Plan":
        """Return this plan with every floating tensor stored as `dtype` ("float32", "bfloat16" or "float16").

        Raises PlanError for a quantized checkpoint, whose weights are stored as codes.
        """
        if dtype not in STORED_DTYPES:
            raise PlanError(f"unknown dtype {dtype!r}", hint=f"One of: keep, {', '.join(STORED_DTYPES)}.")
        if is_quantized(self.config):
            raise PlanError("a quantized checkpoint cannot be stored in another dtype", hint="Use --dtype keep.")
        tensors = {name: Cast(expr, STORED_DTYPES[dtype]) for name, expr in self.tensors.items()}
        key = "torch_dtype" if "torch_dtype" in self.config and "dtype" not in self.config else "dtype"
        return replace(self, config={**self.config, key: dtype}, tensors=tensors)

    def result(self, source: CheckpointSpec) -> CheckpointSpec:
        """Return the spec that this plan makes of `source`, without reading a tensor."""
        tensors = {}
        for name, expr in self.tensors.items():
            try:
                tensors[name] = infer(expr, source.tensors)
            except PlanError as error:
                raise PlanError(f"cannot make {name!r}: {error}") from error
        return CheckpointSpec(self.config, tensors)

    def simplified(self, source: CheckpointSpec) -> "Plan":
        """Return the same plan without casts that change nothing: to the same dtype, or of integers."""
        return replace(self, tensors={name: _simplify(expr, source) for name, expr in self.tensors.items()})

    def bytes_read(self, source: CheckpointSpec) -> int:
        """Return how many bytes of tensors the plan reads, each tensor counted once."""
        names = {name for expr in self.tensors.values() for name in reads(expr)}
        return sum(source.tensors[name].nbytes for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary for JSON."""
        return {
            "steps": list(self.steps),
            "layer_map": list(self.layer_map),
            **({} if self.mlp_map is None else {"mlp_map": list(self.mlp_map)}),
            "axis_maps": self.axis_runs(),
            "notes": list(self.all_notes),
            "config": dict(self.config),
            "tensors": {name: describe(expr) for name, expr in self.tensors.items()},
        }

    def axis_runs(self) -> dict[str, list[list[int]]]:
        """Return the map of each widened axis as runs: [first source position or -1, number of positions]."""
        return {axis: [list(run) for run in index.runs] for axis, index in self.axes.items()}

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @property
    def headline(self) -> str:
        """The steps, and how many tensors they make."""
        done = ", then ".join(next(iter(step)) for step in self.steps) or "unchanged"
        return f"{done}, {len(self.tensors)} tensors"

    def to_text(self) -> str:
        """Return one line for each tensor of the result: its name and its expression."""
        return "\n".join(f"{name} = {describe(expr)}" for name, expr in self.tensors.items())

    def _expression(self, name: str) -> Expr:
        """Return the expression of a tensor for a later step to read, rounded as if it had been written to disk."""
        if name not in self.tensors:
            raise PlanError(f"the step before makes no tensor {name!r}")
        expr = self.tensors[name]
        return expr if isinstance(expr, Read | Rounded) else Rounded(expr)


def _simplify(expr: Expr, source: CheckpointSpec) -> Expr:
    if isinstance(expr, Rounded):
        inner = _simplify(expr.source, source)
        return inner if isinstance(inner, Read) else Rounded(inner)
    if not isinstance(expr, Cast):
        return expr
    inner = _simplify(expr.source, source)
    spec = infer(inner, source.tensors)
    return inner if spec.dtype == expr.dtype or spec.dtype not in FLOAT_DTYPES else replace(expr, source=inner)


def chooses_kernel(key: str) -> bool:
    """Return whether a config key chooses the kernel that runs a model, which may be code on the Hub."""
    return key.lstrip("_").startswith(("attn_implementation", "experts_impl"))


def identity(source: CheckpointSpec, *, depth: int) -> Plan:
    """Return the plan that changes nothing, except that the config no longer chooses the code that runs the model.

    Keys such as _attn_implementation override the user's choice at loading, and may name code on the Hub.
    """
    dropped = [key for key in source.config if chooses_kernel(key)]
    config = {key: value for key, value in source.config.items() if key not in dropped}
    notes = tuple(f"left out of the config: {key} = {source.config[key]!r}" for key in dropped)
    return Plan(config, {name: Read(name) for name in source.tensors}, tuple(range(depth)), notes=notes)


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the config keys that differ, nested ones with dots, with the value before and after (None: absent)."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes |= changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changes[prefix + key] = (old, new)
    return changes
