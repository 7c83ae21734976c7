"""Make a dense model of one with experts: the neurons of the experts of a layer become those of one wide MLP.

Each expert counts with the mean of its gate over a text, 0 where the router did not choose it: the columns of its
output map are multiplied by that. So all of it is exact where gates are the same for every token, and else what a mean
can be; the output map is then solved anew for what the experts put out (`surgeon.measure.refit`). An expert that every
token takes joins with a gate of 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.config import kinds_by, setting, size_of, with_text
from surgeon.anatomy.families import Row, Rows, written_and_read
from surgeon.anatomy.following import with_kinds
from surgeon.anatomy.layer_rules import RULES
from surgeon.errors import PlanError
from surgeon.plan.expressions import Add, Expr, Gather, Read
from surgeon.plan.plan import Plan
from surgeon.text import layers
from surgeon.transforms.widths import resized

DENSE = "dense"
HINT = "Keep some experts: --experts N."
MEAN_GATES = (
    "every neuron of a dense layer counts for every token, by the mean of its expert's gate: what a router chose token "
    "by token is lost"
)


@dataclass(frozen=True)
class Mixture:
    """The neurons that a layer keeps, as (expert, neuron), and the mean gate of each expert.

    The number of experts, E, stands for those that every token takes; its gate is 1.
    """

    neurons: tuple[tuple[int, int], ...]
    gates: tuple[float, ...]


def to_dense(anatomy: Anatomy, mixtures: Mapping[int, Mixture]) -> Plan:
    """Return the plan of a model whose layers with experts have these neurons in one MLP; all have as many.

    Raises PlanError where the family's code has no dense layer in that place.
    """
    forms = dense_forms(anatomy)
    width = len(next(iter(mixtures.values())).neurons)
    config = _dense_config(anatomy, width)
    stack = anatomy.stacks[0]
    tensors: dict[str, Expr] = {}
    for name in anatomy.spec.tensors:
        place = stack.locate(name)
        if place is None or place[0] not in mixtures or anatomy.row(name)[1] != "mlp":
            tensors[name] = Read(name)
    for layer, mixture in mixtures.items():
        assert len(mixture.neurons) == width, "all layers have as many"
        for rest, form in forms.items():
            tensors[stack.name(layer, rest)] = _joined(stack.name(layer, ""), form, mixture)
    depth = tuple(range(anatomy.depth))
    return Plan(config, tensors, depth, ({"to_dense": {"intermediate_size": width}},), approximate=(MEAN_GATES,))


@dataclass(frozen=True, slots=True)
class DenseForm:
    """What a tensor of a dense layer is made of: that of each expert, and that of what every token takes, "" for none.

    `dim` is the dimension of the neurons, which an output map reads.
    """

    expert: str
    shared: str
    dim: int
    is_output: bool


def dense_forms(anatomy: Anatomy) -> dict[str, DenseForm]:
    """Return how each tensor of a dense layer is made, by its name in the layer.

    Raises PlanError, with the reason, where this model can have no dense layers in place of those with experts.
    """
    family = anatomy.require_family()
    if "experts" not in anatomy.sizes:
        raise PlanError(f"this {anatomy.model_type} has no experts", hint="Leave out --dense.")
    sparse: Rows = next((rows for rows in family.mlp if any("{}" in name for name in rows)), {})
    dense: Rows = next((rows for rows in family.mlp if rows and all(map(_is_dense, rows.values()))), {})
    if not sparse or not dense:
        raise PlanError(f"the code of {anatomy.model_type} has no dense layer in the place of experts", hint=HINT)
    there = {place[1] for name in anatomy.spec.tensors if (place := anatomy.stacks[0].locate(name))}
    by_end: dict[str, dict[str, str]] = {}
    for name, row in sparse.items():
        if "{}" in name:
            by_end.setdefault(_end(name), {})["expert"] = name
        elif name in there and "shared" in axes_of(row.axes[0]) | axes_of(row.axes[-1]):
            by_end.setdefault(_end(name), {})["shared"] = name
        elif name in there and "experts" not in axes_of(row.axes[-1]) | axes_of(row.axes[0]):
            raise PlanError(
                f"a dense layer of {anatomy.model_type} has no place for {name!r}, which stands beside the experts",
                hint=HINT,
            )
    forms = {}
    for name, row in dense.items():
        parts = by_end.get(_end(name), {})
        if row.kind == "bias":
            if row.when is None or setting(anatomy.config, row.when):
                raise PlanError(
                    f"a dense layer of this {anatomy.model_type} has biases, and its experts none", hint=HINT
                )
            continue
        write, read = written_and_read(row)
        is_output = axes_of(row.axes[read or 0]) == {"ffn"}
        dim = read if is_output else write
        assert dim is not None
        forms[name] = DenseForm(parts["expert"], parts.get("shared", ""), dim, is_output)
    return forms


def _is_dense(row: Row) -> bool:
    return any(axes_of(dim) == {"ffn"} for dim in row.axes) or row.kind == "bias"


def _end(name: str) -> str:
    """Return the last two words of a tensor's name: "down_proj.weight"."""
    return ".".join(name.split(".")[-2:])


def _joined(layer: str, form: DenseForm, mixture: Mixture) -> Expr:
    """Return a tensor of a dense layer: the neurons of its experts one after the other."""
    by_expert: dict[int, list[int]] = {}
    for place, (expert, _) in enumerate(mixture.neurons):
        by_expert.setdefault(expert, []).append(place)
    parts: list[Expr] = []
    for expert, places in sorted(by_expert.items()):
        is_shared = expert == len(mixture.gates)
        index, scale = [-1] * len(mixture.neurons), [1.0] * len(mixture.neurons)
        for place in places:
            index[place] = mixture.neurons[place][1]
            scale[place] = mixture.gates[expert] if form.is_output and not is_shared else 1.0
        name = layer + (form.shared if is_shared else form.expert.format(expert))
        parts.append(Gather(Read(name), form.dim, index, scale))
    return parts[0] if len(parts) == 1 else Add(tuple(parts))


def _dense_config(anatomy: Anatomy, width: int) -> dict[str, object]:
    """Return the config of the model with dense layers only. Raises PlanError where none says so."""
    already = anatomy.layers_by_axis.get("ffn", frozenset())
    if already and anatomy.sizes["ffn"] != width:
        raise PlanError(
            f"layers {layers(sorted(already))} are dense with {anatomy.sizes['ffn']} neurons, and dense layers have as "
            "many everywhere",
            hint=f"Ask for as many: --intermediate-size {anatomy.sizes['ffn']}.",
        )
    text, dense = anatomy.config, [DENSE] * anatomy.depth
    for rule in RULES.get(str(text.get("model_type")), ()):
        listed = rule.explicit if rule.explicit and text.get(rule.explicit) else None
        kinds = text[listed] if listed else kinds_by(rule, text, anatomy.depth)
        if set(kinds) <= {DENSE, "sparse"}:
            after = {**text, listed: dense} if listed else with_kinds(text, rule, dense)
            if after is not None:
                wider = resized(anatomy, {**anatomy.sizes, "ffn": width})
                changes = {key: value for key, value in after.items() if text.get(key) != value}
                return with_text(wider, changes)
    raise PlanError(f"no key of the config says that all layers of a {anatomy.model_type} are dense", hint=HINT)


def neurons_there(anatomy: Anatomy, width: int | None) -> tuple[tuple[int, int], ...]:
    """Return the first `width` neurons of a layer's experts; by default as many as a token takes.

    Raises PlanError where there are not so many.
    """
    count, size = anatomy.sizes["experts"], anatomy.sizes.get("expert_ffn") or anatomy.sizes["ffn"]
    has_shared = any(form.shared for form in dense_forms(anatomy).values())
    shared = anatomy.sizes.get("shared", 0) * size if has_shared else 0
    every = [(expert, neuron) for expert in range(count) for neuron in range(size)]
    every += [(count, neuron) for neuron in range(shared)]
    if width is None:
        width = (size_of(anatomy.config, "experts_per_token") or 1) * size + shared
    if not 0 < width <= len(every):
        raise PlanError(
            f"cannot keep {width} of the {len(every)} neurons of a layer's experts",
            hint=f"Ask for 1 to {len(every)}: --intermediate-size N.",
        )
    return tuple(every[:width])


def to_widths(anatomy: Anatomy, mixtures: Mapping[int, Mixture]) -> dict[str, list[list[float]]]:
    """Return mixtures as scores.json holds them: neurons numbered through all experts, and gates, for each layer.

    A layer without experts has zeros.
    """
    size = anatomy.sizes.get("expert_ffn") or anatomy.sizes["ffn"]
    some = next(iter(mixtures.values()))
    none = Mixture(((0, 0),) * len(some.neurons), (0.0,) * len(some.gates))
    every = [mixtures.get(layer, none) for layer in range(anatomy.depth)]
    neurons: list[list[float]] = [[expert * size + number for expert, number in mixture.neurons] for mixture in every]
    return {"neurons": neurons, "gates": [list(mixture.gates) for mixture in every]}


def mixtures_of(anatomy: Anatomy, widths: Mapping[str, Sequence[Sequence[float]]]) -> dict[int, Mixture]:
    """Return the mixtures that `to_widths` wrote down."""
    count, size = anatomy.sizes["experts"], anatomy.sizes.get("expert_ffn") or anatomy.sizes["ffn"]

    def place(number: float) -> tuple[int, int]:
        expert = min(int(number) // size, count)  # all that every token takes has one number
        return expert, int(number) - expert * size

    return {
        layer: Mixture(tuple(map(place, widths["neurons"][layer])), tuple(widths["gates"][layer]))
        for layer in sorted(anatomy.layers_by_axis["experts"])
    }
