"""Give a dense model experts: each one a copy of the MLP, after a router drawn at random. The function is kept.

Sources: sparse upcycling (arXiv:2212.05055), which starts experts as equal copies. Here the weights of a token's
experts sum to 1, so that equal experts compute what one of them computes. (arXiv:2510.08008 adds noise to the copies,
which changes the function; there is none here.)
"""

from collections.abc import Mapping
from typing import Any

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.anatomy.axes import shape
from surgeon.anatomy.config import layer_kinds
from surgeon.anatomy.expert_forms import EXPERT_FORMS, ExpertForm
from surgeon.anatomy.families import FAMILIES
from surgeon.checkpoint.header import CheckpointSpec, TensorSpec
from surgeon.errors import PlanError
from surgeon.plan.expressions import Expr, Read
from surgeon.plan.plan import Plan
from surgeon.transforms.layers import fresh

MOST_EXPERTS = 1024  # twice what any model in use has
EQUAL = (
    "the experts start equal and set themselves apart in training by what is routed to them; the router learns from "
    "the loss once they differ, and from the balancing loss where output_router_logits is set to true"
)
ONE_EACH = "with one expert a token its weight is always 1: only the balancing loss ever reaches the router"
UNEVEN = (
    "transformers' default kernel for experts wants sizes that are multiples of 8, and {} is none: where it fails, "
    'load with experts_implementation="eager"'
)


def to_experts(anatomy: Anatomy, num_experts: int, *, per_token: int = 2, seed: int = 0) -> Plan:
    """Return the plan of a model with `num_experts` experts in every layer, `per_token` of them for each token.

    It computes what the dense model computes, up to the rounding of the experts' weights, which transformers computes
    in float32: they sum to 1 within 1e-7.

    Raises PlanError when the model type has no form with experts, or that form cannot express this model.
    """
    form = _form(anatomy)
    _check_counts(num_experts, per_token)
    spec, stack = anatomy.spec, anatomy.stacks[0]
    sizes = {**anatomy.sizes, "experts": num_experts, "experts_per_token": per_token}
    tensors: dict[str, Expr] = {}
    specs: dict[str, TensorSpec] = {}
    routers: list[str] = []
    for name, tensor in spec.tensors.items():
        place = stack.locate(name)
        expert = form.tensors.get(place[1]) if place else None
        if place is None or expert is None:
            tensors[name], specs[name] = Read(name), tensor
            continue
        for number in range(num_experts):
            new_name = stack.name(place[0], expert.format(number))
            tensors[new_name], specs[new_name] = Read(name), tensor
        for rest, router_shape in _routers(form, sizes).items():
            router = stack.name(place[0], rest)
            if router not in specs:
                specs[router] = TensorSpec(tensor.dtype, router_shape)
                routers.append(router)
    result = read_anatomy(CheckpointSpec(_config(anatomy, form, sizes), specs))
    tensors |= {router: fresh(result, router, seed=seed, layers=anatomy.depth) for router in routers}
    step = {"to_experts": {"experts": num_experts, "experts_per_token": per_token, "seed": seed}}
    notes = _notes(anatomy, per_token)
    return Plan(result.spec.config, tensors, tuple(range(anatomy.depth)), (step,), notes)


def _form(anatomy: Anatomy) -> ExpertForm:
    """Return how this model is written with experts. Raises PlanError where that is not possible."""
    form = EXPERT_FORMS.get(anatomy.model_type)
    if form is None:
        has_some = "experts" in anatomy.sizes
        raise PlanError(
            f"the layers of this {anatomy.model_type} have experts already"
            if has_some
            else f"no model type is known that is {anatomy.model_type} with experts",
            hint=f"Model types that can get experts: {', '.join(EXPERT_FORMS)}.",
        )
    anatomy.require_family()
    if "auto_map" in anatomy.spec.config:
        raise PlanError(
            "config.json names code of its own (auto_map), which knows no experts",
            hint=f"Remove auto_map from config.json if transformers' own {anatomy.model_type} computes the same.",
        )
    target = FAMILIES[form.model_type]
    known = {**target.attention, **target.norm, **form.tensors}
    for name in anatomy.spec.tensors:
        place = anatomy.stacks[0].locate(name)
        if place and place[1] not in known:
            raise PlanError(
                f"{form.model_type} has no place for {name!r}, so this {anatomy.model_type} cannot get experts",
                hint="A model with such tensors has no form with experts; train one without them.",
            )
    return form


def _check_counts(num_experts: int, per_token: int) -> None:
    if type(num_experts) is not int or not 2 <= num_experts <= MOST_EXPERTS:
        raise PlanError(
            f"{num_experts!r} is no number of experts", hint=f"Ask for 2 to {MOST_EXPERTS}, such as --experts 8."
        )
    if type(per_token) is not int or not 1 <= per_token <= num_experts:
        raise PlanError(
            f"a token cannot take {per_token!r} of {num_experts} experts",
            hint=f"--experts-per-token is 1 to {num_experts}; 2 is usual.",
        )


def _notes(anatomy: Anatomy, per_token: int) -> tuple[str, ...]:
    notes = (EQUAL, ONE_EACH) if per_token == 1 else (EQUAL,)
    # grouped_mm takes rows of a multiple of 16 bytes: 8 numbers in the dtypes that models are trained in
    uneven = next((anatomy.sizes[axis] for axis in ("hidden", "ffn") if anatomy.sizes[axis] % 8), None)
    return notes if uneven is None else (*notes, UNEVEN.format(uneven))


def _routers(form: ExpertForm, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a layer that no tensor of the dense MLP becomes, and their shapes."""
    experts = set(form.tensors.values())
    rows = next(rows for rows in FAMILIES[form.model_type].mlp if experts <= rows.keys())
    return {rest: shape(row.axes, sizes) for rest, row in rows.items() if rest not in experts}


def _config(anatomy: Anatomy, form: ExpertForm, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the config of the model with experts: no other default may change what a layer computes."""
    family, target = anatomy.require_family(), FAMILIES[form.model_type]
    dropped = {*form.dropped, *target.sizes["experts"]}  # experts may be counted under a second name
    config = {key: value for key, value in anatomy.spec.config.items() if key not in dropped}
    present = {key for group in (config, *config.values()) if isinstance(group, Mapping) for key in group}
    config |= {key: value for key, value in form.defaults.items() if key not in present}
    config |= form.config
    config |= {key: sizes[axis] for axis, key in form.sizes.items()}
    if form.window_flag:
        config[form.window_flag] = _slides(anatomy, form)
    head = "ForCausalLM" if anatomy.stacks[0].prefix == family.layers else "Model"
    return config | {"model_type": form.model_type, "architectures": [form.class_name + head]}


def _slides(anatomy: Anatomy, form: ExpertForm) -> bool:
    """Return whether all layers attend to a window. Raises PlanError where only some do."""
    kinds = layer_kinds(anatomy.spec.config, anatomy.depth) or ["full_attention"]
    if set(kinds) == {"full_attention"} or set(kinds) == {"sliding_attention"}:
        return kinds[0] == "sliding_attention"
    raise PlanError(
        f"{form.model_type} has one kind of attention for all layers, and this model has "
        f"{' and '.join(sorted(set(kinds)))}",
        hint="Only a model whose layers all attend alike can get experts.",
    )
