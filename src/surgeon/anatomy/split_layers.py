"""Which half of its layer each tensor belongs to: the attention with its norms, or the MLP with its norms.

A family's table says it. Its rows of attention (and of what some layers have in its place) are one half, those of the
MLP the other. A norm inside a module of one of them belongs to it. Of the norms in a layer itself, one that ends a
branch closes the half whose branch it ends, in the order of the table's `branch_norms`; the others begin one each, the
attention's first, as the table lists them.
"""

from collections.abc import Mapping

from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy
from surgeon.anatomy.families import Family, Layers
from surgeon.anatomy.halves import ATTENTION, MLP, Half
from surgeon.errors import PlanError

HINT = "Keep whole layers: --drop, or both lists of the pairing equal."


def split_layers(anatomy: Anatomy) -> dict[str, Half]:
    """Return the half that each tensor of a layer belongs to, by its name.

    Raises PlanError, with the reason, where a layer has no two halves, or no table says which tensors are whose.
    """
    family = anatomy.require_family()
    if len(anatomy.stacks) > 1:
        raise PlanError(
            f"the layers of {anatomy.model_type} have attentions to two texts, so they are no two halves", hint=HINT
        )
    if anatomy.sums_normed:
        raise PlanError(
            f"the norms of {anatomy.model_type} follow the sum, so no half of a layer can go without its norm staying",
            hint=HINT,
        )
    if flag := _parallel_by(family, anatomy.config):
        raise PlanError(
            f"attention and MLP of this {anatomy.model_type} run side by side on one state ({flag}), so neither can go "
            "with another's other half",
            hint=HINT,
        )
    stack, layers = anatomy.stacks[0], family.stacks[0]
    places = {name: place for name in anatomy.spec.tensors if (place := stack.locate(name))}
    names = {name: EXPERT_NUMBER.sub("{}", family.current(rest)) for name, (_, rest) in places.items()}
    halves = _halves_of_rows(anatomy.model_type, family, layers, set(names.values()))
    if odd := next((name for name, rest in names.items() if rest not in halves), None):
        raise PlanError(f"the table does not say to which half of a layer {odd!r} belongs", hint=HINT)
    return {name: halves[rest] for name, rest in names.items()}


def _parallel_by(family: Family, config: Mapping[str, object]) -> str | None:
    """Return the config key that makes attention and MLP read one state; None where they run one after the other."""
    return next((key for key, default in family.parallel_flags.items() if config.get(key, default)), None)


def _halves_of_rows(model_type: str, family: Family, layers: Layers, present: set[str]) -> dict[str, Half]:
    """Return the half of each row of a layer, by its name in the table. Of the layer's own norms only those present."""
    attention = {name for rows in layers.attention for name in rows}
    mlp = {name for rows in layers.mlp for name in rows}
    halves: dict[str, Half] = {**dict.fromkeys(attention, ATTENTION), **dict.fromkeys(mlp, MLP)}
    modules = {name.partition(".")[0]: half for name, half in halves.items() if name.count(".") > 1}
    own: dict[str, list[str]] = {}  # the layer's own norms, by their modules, in the table's order
    for name in layers.norm:
        if (half := modules.get(name.partition(".")[0])) is not None:
            halves[name] = half
        elif name in present:
            own.setdefault(name.rpartition(".")[0], []).append(name)
    ends = [module for module in (name.rpartition(".")[0] for name in family.branch_norms) if module in own]
    begins = [module for module in own if module not in ends]
    if len(begins) == 1 and not ends:
        raise PlanError(
            f"attention and MLP of {model_type} read one norm ({begins[0]}), so neither can go with another's other "
            "half",
            hint=HINT,
        )
    if own and (len(begins), len(ends)) not in ((2, 0), (2, 2), (0, 2)):
        raise PlanError(
            f"the table of {model_type} does not say which of {', '.join(own)} are the attention's", hint=HINT
        )
    for norms in (begins, ends):
        for module, half in zip(norms, (ATTENTION, MLP), strict=False):
            halves |= dict.fromkeys(own[module], half)
    return halves
