"""Store the weights of linear maps as codes of few bits: which ones, and the plan that makes them.

Quantized are the maps inside the layers. The embedding, the head, norms and biases keep their bytes, and a tied head
stays tied. Libraries pass over what they cannot take without a word, so that a "quantized" model may be as large as
before: what they would pass over is refused here, from the headers alone.
"""

import re
from collections.abc import Mapping

from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy
from surgeon.checkpoint.header import TensorSpec, is_quantized
from surgeon.errors import PlanError
from surgeon.plan.expressions import Constant, Expr, Quantized, Read
from surgeon.plan.plan import Plan
from surgeon.plan.schemes import COMPRESSED, GROUPS, WORDS, Scheme

WEIGHT = ".weight"


def quantize(anatomy: Anatomy, scheme: Scheme) -> Plan:
    """Return the plan of the model whose linear maps are stored by `scheme`.

    Raises PlanError for a model of which the library would pass something over, and for a group that does not divide.
    """
    weights = linear_maps(anatomy, scheme.method)
    _check_groups(weights, scheme)
    tensors: dict[str, Expr] = {}
    for name in anatomy.spec.tensors:
        if name not in weights:
            tensors[name] = Read(name)
            continue
        for part_name, part in scheme.parts.items():
            made = Quantized(Read(name), scheme, part)
            zero = Constant(scheme.spec(part, weights[name]), 0) if part == "zero" else None
            tensors[f"{name.removesuffix('weight')}{part_name}"] = zero or made
    others = [name for name in anatomy.spec.tensors if name not in weights]
    step = {"bits": scheme.bits, "method": scheme.method, "group_size": scheme.group_size}
    return Plan(
        config={**anatomy.spec.config, "quantization_config": scheme.config(_ignored(anatomy, weights))},
        tensors=tensors,
        layer_map=tuple(range(anatomy.depth)),
        steps=({"quantize": step},),
        metadata=scheme.metadata(weights, others),
    )


def linear_maps(anatomy: Anatomy, method: str) -> dict[str, TensorSpec]:
    """Return the weights inside the layers that a library quantizes. Raises PlanError as `quantize` does."""
    if is_quantized(anatomy.spec.config):
        raise PlanError("the model is quantized already", hint="Quantize the checkpoint that it was made from.")
    anatomy.require_family()
    found: dict[str, TensorSpec] = {}
    for name, spec in anatomy.spec.tensors.items():
        kind = anatomy.row(name)[0].kind
        if anatomy.locate(name) is None or kind not in ("linear", "conv1d") or len(spec.shape) < 2:
            continue
        _check_kind(anatomy, name, spec, method)
        found[name] = spec
    if not found:
        raise PlanError("no tensor in the layers of this model is a linear map", hint="surgeon inspect --tensors")
    return found


def _check_kind(anatomy: Anatomy, name: str, spec: TensorSpec, method: str) -> None:
    """Raise PlanError for a map in the layers that a library passes over."""
    if len(spec.shape) > 2 or EXPERT_NUMBER.search(name):
        raise PlanError(
            f"{name!r} is of experts, which transformers keeps in one tensor: {method} would pass over it silently",
            hint="Make the model dense first: surgeon prune --dense.",
        )
    if anatomy.row(name)[0].kind == "conv1d":
        raise PlanError(
            f"{anatomy.model_type} keeps {name!r} as a Conv1D (inputs x outputs), which {method} passes over silently: "
            "the result would be no smaller",
            hint="bitsandbytes takes Conv1D when a model is loaded: BitsAndBytesConfig(load_in_8bit=True).",
        )
    if not name.endswith(WEIGHT):
        raise PlanError(f"{name!r} is a linear map that is no weight of a module, and {method} would pass over it",
                        hint="surgeon inspect --tensors shows how it is stored.")  # fmt: skip
    if spec.dtype not in WORDS:
        hint = f"Store it in another dtype first: surgeon truncate MODEL --layers 100% --dtype {WORDS['BF16']}."
        raise PlanError(f"{name!r} is stored as {spec.dtype}, which {method} does not quantize", hint=hint)


def fitting_groups(weights: Mapping[str, TensorSpec]) -> list[int]:
    """Return the sizes of a group that divide the inputs of every weight, the largest first."""
    inputs = {spec.shape[1] for spec in weights.values()}
    return [size for size in GROUPS if all(count % size == 0 for count in inputs)]


def _check_groups(weights: Mapping[str, TensorSpec], scheme: Scheme) -> None:
    """Raise PlanError for a weight whose inputs are no whole number of groups."""
    if scheme.method != COMPRESSED or scheme.group_size is None:
        return
    size, fitting = scheme.group_size, fitting_groups(weights)
    for name, spec in weights.items():
        if spec.shape[1] % size:
            raise PlanError(
                f"{name!r} has {spec.shape[1]} inputs, no whole number of groups of {size}",
                hint=f"--group-size {fitting[0]} divides all of them." if fitting else NO_GROUP,
            )


NO_GROUP = "No group of 32 divides them: --bits 8 has a scale for each row. Cut to multiples of 64 to have 4 bits."


def _ignored(anatomy: Anatomy, weights: Mapping[str, TensorSpec]) -> list[str]:
    """Return the linear modules that are not quantized: the head, those outside of the layers, and other towers."""
    family = anatomy.require_family()
    heads = [name for name, row in family.embedding.items() if row.kind == "head"]
    other = [
        name
        for name, spec in anatomy.spec.tensors.items()
        if name not in weights and anatomy.row(name)[0].kind in ("linear", "head") and len(spec.shape) == 2
    ]
    named = (name.removesuffix(WEIGHT) for name in (*heads, *other) if name.endswith(WEIGHT))
    modules = dict.fromkeys(("lm_head", *named))  # what transformers calls a head that files call something else
    return [*modules, *(f"re:{re.escape(prefix)}.*" for prefix in family.opaque)]
