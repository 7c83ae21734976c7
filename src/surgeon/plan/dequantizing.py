"""A quantized checkpoint as a source of the weights that its codes stand for, so that it can be run layer by layer."""

from surgeon.anatomy.config import unquantized
from surgeon.checkpoint.source import Source
from surgeon.plan.expressions import Dequantized, Expr, Read
from surgeon.plan.plan import Plan
from surgeon.plan.planned import PlannedSource
from surgeon.plan.schemes import scheme_of


def dequantized(source: Source) -> PlannedSource:
    """Return a checkpoint that `surgeon quantize` wrote as one of weights, which are made when they are read.

    They are those with which it is run: of torchao in float32, of compressed-tensors in the dtype of the scales.
    Raises PlanError for codes of another form.
    """
    scheme = scheme_of(source.config, source.label)
    parts = scheme.parts
    names = {part: name for name, part in parts.items()}
    tensors: dict[str, Expr] = {}
    for name in source.tensors:
        module, _, last = name.rpartition(".")
        if last not in parts:
            tensors[name] = Read(name)
        elif parts[last] == "codes":
            scale = Read(f"{module}.{names['scale']}")
            tensors[f"{module}.weight"] = Dequantized(Read(name), scale, scheme)
    return PlannedSource(source, Plan(unquantized(source.config), tensors, layer_map=()))
