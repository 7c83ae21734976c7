"""Prune a model: leave out layers, or halves of them, then narrow what is left. One plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from surgeon.anatomy.anatomy import Anatomy
from surgeon.anatomy.config import period_of
from surgeon.anatomy.halves import Pairing
from surgeon.errors import PlanError
from surgeon.plan.plan import Plan, identity
from surgeon.transforms.choose import (
    Choice,
    check_criterion,
    choose_in_order,
    choose_layers,
    choose_widths,
    free_layers,
)
from surgeon.transforms.layers import keep_halves, planned, resolve_depth
from surgeon.transforms.narrow import narrow
from surgeon.transforms.scores import CONTRIBUTION, METHODS, WIDTHS, Method
from surgeon.transforms.widths import check_experts_size, derived_ffn

AXES = ("hidden", "ffn", "heads", "kv_heads", "head_dim")


def prune(
    anatomy: Anatomy,
    *,
    dropped: Sequence[int] = (),
    pairing: Pairing | None = None,
    sizes: Mapping[str, int] | None = None,
    criterion: str = CONTRIBUTION,
    values: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Plan:
    """Return the plan of the model without the layers `dropped`, narrowed to `sizes` (None: as wide as it is).

    A `pairing` says in their place which halves of layers stay. Raises PlanError when the model's code cannot express
    the result.
    """
    whole = Pairing.of_layers(range(anatomy.depth))
    stays = pairing or Pairing.of_layers(layer for layer in range(anatomy.depth) if layer not in set(dropped))
    plan = identity(anatomy.spec, depth=anatomy.depth) if stays == whole else keep_halves(anatomy, stays)
    if sizes is None:
        return plan
    shorter = planned(anatomy, plan)
    layers, mlps = (anatomy.in_all_stacks(kept) for kept in (stays.attention, stays.mlp))
    positions = choose_widths(shorter, sizes, criterion, values=values, layers=layers, mlps=mlps, seed=seed)
    return plan.then(narrow(shorter, positions))


def pruned_sizes(anatomy: Anatomy, sizes: Mapping[str, int | None]) -> dict[str, int] | None:
    """Return the size of every axis of the result, None where `sizes` gives none.

    Key-value heads follow heads where each head has its own; heads follow key-value heads, whole groups at a time.
    Raises PlanError for an axis that the model does not have.
    """
    if all(size is None for size in sizes.values()):
        return None
    anatomy.require_family(partial=True)
    old = anatomy.sizes
    anatomy.check_free(axis for axis, size in sizes.items() if size not in (None, old.get(axis)))
    if sizes.get("experts") is not None and "experts" not in old:
        raise PlanError(f"this {anatomy.model_type} has no experts", hint="Leave out --experts.")
    if sizes.get("expert_ffn") is not None:
        check_experts_size(anatomy)
    axes = [axis for axis in (*AXES, "expert_ffn", "experts") if axis in old]
    new = {axis: old[axis] if (size := sizes.get(axis)) is None else size for axis in axes}
    for axis, size in new.items():
        if not 0 < size <= old[axis]:
            raise PlanError(
                f"cannot prune {axis} from {old[axis]} to {size}",
                hint=f"Ask for 1 to {old[axis]}; to grow: surgeon grow.",
            )
    if (follows := derived_ffn(anatomy, new)) is not None and sizes.get("ffn") is None:
        new["ffn"] = follows
    if sizes.get("kv_heads") is None and old["group"] == 1:
        new["kv_heads"] = new["heads"]
    elif sizes.get("heads") is None and new["kv_heads"] != old["kv_heads"]:
        new["heads"] = new["kv_heads"] * old["group"]
    heads, kv_heads = new["heads"], new["kv_heads"]
    if heads % kv_heads:
        raise PlanError(
            f"{heads} attention heads cannot share {kv_heads} key-value heads",
            hint=f"Attention heads must be a multiple of key-value heads: {-(-heads // kv_heads) * kv_heads}.",
        )
    return new


def removed_count(anatomy: Anatomy, layers: int | str) -> int:
    """Return how many layers go for a result of `layers`: 24, or "75%". Raises PlanError for more than there are."""
    count = anatomy.depth - resolve_depth(layers, anatomy.depth)
    if count < 0:
        raise PlanError(
            f"cannot prune {anatomy.depth} layers to {anatomy.depth - count}",
            hint="--layers is the depth of the result; to grow: surgeon grow.",
        )
    return count


def named_layers(
    anatomy: Anatomy, *, drop: Sequence[int] | None = None, keep: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """Return the layers that go where they are named: those to drop, or all but those to keep; None where neither is.

    Raises PlanError for a layer that does not exist, and where none or all would go.
    """
    named = drop if keep is None else keep
    if named is None:
        return None
    depth = anatomy.depth
    if missing := sorted({layer for layer in named if not 0 <= layer < depth}):
        raise PlanError(f"layers {missing} do not exist", hint=f"This model has layers 0 to {depth - 1}.")
    dropped = set(named) if keep is None else set(range(depth)) - set(named)
    if not 0 < len(dropped) < depth:
        how_many = "no layer" if not dropped else "every layer"
        raise PlanError(f"{how_many} would go", hint="Such as --drop 3,7,11-13, or --keep 0-5.")
    return tuple(sorted(dropped))


UNEQUAL = (
    "A layer without its attention or its MLP loads elsewhere: as layers of Nemotron-H, in a transformers with specs "
    "for per_layer_config, as GGUF of the architecture deci. surgeon writes none of these."
)


def halves_without(
    anatomy: Anatomy, *, drop: Sequence[int] = (), attention: Sequence[int] = (), mlp: Sequence[int] = ()
) -> Pairing:
    """Return the halves that stay without the layers `drop`, these attentions and these MLPs.

    Raises PlanError for a layer that does not exist.
    """
    layers = range(anatomy.depth)
    if missing := sorted({layer for layer in (*drop, *attention, *mlp) if layer not in layers}):
        raise PlanError(f"layers {missing} do not exist", hint=f"This model has layers 0 to {anatomy.depth - 1}.")
    gone = ({*drop, *attention}, {*drop, *mlp})
    return Pairing(*(tuple(layer for layer in layers if layer not in going) for going in gone))


def without_halves(anatomy: Anatomy, pairing: Pairing) -> tuple[int, ...]:
    """Return the layers of which neither half stays in a pairing that is smaller than the model.

    Raises PlanError where none or all would go, and where what stays is no row of layers with one attention and one MLP
    each, with what would load.
    """
    attentions, mlps = len(pairing.attention), len(pairing.mlp)
    if attentions != mlps:
        raise PlanError(
            f"{attentions} attentions and {mlps} MLPs would stay, and a layer of {anatomy.model_type} has one of each",
            hint=f"Remove as many of the one as of the other. {UNEQUAL}",
        )
    if not 0 < attentions < anatomy.depth:
        how_many = "no layer" if attentions else "every layer"
        raise PlanError(f"{how_many} would go", hint="Such as --drop-mlp 3 --drop-attention 4.")
    try:
        pairing.check(anatomy.depth)
    except PlanError as error:
        raise PlanError(str(error), hint=f"{error.hint} {UNEQUAL}") from error
    return tuple(sorted(set(range(anatomy.depth)) - set(pairing.attention) - set(pairing.mlp)))


def resolve_count(
    anatomy: Anatomy, removable: Sequence[Sequence[int]], *, parameters: int | None, nbytes: int | None
) -> int:
    """Return how many layers have to go for the rest to fit a budget of parameters, or of bytes of weights.

    `removable` are choices of layers that can go, from none to the most. Raises PlanError when none is small enough.
    """
    for dropped in removable:
        spec = anatomy.spec if not dropped else prune(anatomy, dropped=dropped).result(anatomy.spec)
        if (parameters is None or spec.num_parameters <= parameters) and (nbytes is None or spec.nbytes <= nbytes):
            return len(dropped)
    smallest = prune(anatomy, dropped=removable[-1]).result(anatomy.spec) if removable[-1] else anatomy.spec
    raise PlanError(
        f"without {len(removable[-1])} layers {smallest.num_parameters:,} parameters ({smallest.nbytes:,} bytes) are "
        "left, more than the budget",
        hint="Prune in width too, or ask for more.",
    )


def repeating_period(anatomy: Anatomy) -> int:
    """Return after how many layers the kinds of layers repeat. Raises PlanError where they never do."""
    period = period_of(anatomy.spec.config, anatomy.depth)
    if period == anatomy.depth > 1:
        raise PlanError("the kinds of this model's layers do not repeat", hint="Leave out --keep-pattern.")
    return period


def sizes_like(anatomy: Anatomy, small: Anatomy, name: str) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """Return the sizes of another model, called `name`, and notes on what the result does not take from it.

    Raises PlanError when it has another vocabulary.
    """
    anatomy.require_family()
    small.require_family()
    if small.sizes["vocab"] != anatomy.sizes["vocab"]:
        raise PlanError(
            f"{name} has a vocabulary of {small.sizes['vocab']}, the model of {anatomy.sizes['vocab']}",
            hint="Weight selection needs models with one vocabulary.",
        )
    sizes: dict[str, int | None] = {
        axis: small.sizes[axis]
        for axis in (*AXES, "expert_ffn", "experts")
        if axis in anatomy.sizes and axis in small.sizes
    }
    key = "tie_word_embeddings"
    ties = [bool(spec.config.get(key)) for spec in (anatomy.spec, small.spec)]
    notes = (f"{key} stays {str(ties[0]).lower()}, though {name} has {str(ties[1]).lower()}",)
    return sizes, notes if ties[0] != ties[1] else ()


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How much goes, and by which score: `count` layers (None: a budget decides), and widths down to `sizes`.

    `width_score` ranks positions in width, None for the ranking that goes with the score.

    `protect` is how many first and last layers stay; layers that are `named` go, whatever the score, and halves of
    others where a `pairing` says which stay. `sizes` is None where no width changes. Of a model whose kinds of layers
    repeat after `period` layers, whole periods go; with 1, any layers.
    """

    anatomy: Anatomy
    score: str
    count: int | None
    sizes: Mapping[str, int] | None
    contiguous: bool | None
    protect: tuple[int, int]
    seed: int
    period: int = 1
    width_score: str | None = None
    named: tuple[int, ...] | None = None
    pairing: Pairing | None = None

    def check(self) -> None:
        """Raises PlanError for a result that no scores could make possible."""
        if self.count:
            free_layers(self.count, self.anatomy.depth, self.protect)
        if self.sizes is not None:  # every choice has these sizes
            check_criterion(self.anatomy, self.sizes, self.criterion)
            prune(self.anatomy, sizes=self.sizes, criterion="uniform")

    @property
    def method(self) -> Method:
        """The row of the score."""
        return METHODS[self.score]

    @property
    def criterion(self) -> str:
        """The ranking of positions in width, by its name in WIDTHS."""
        return self.width_score or self.method.width

    @cached_property
    def ranks_layers(self) -> bool:
        """Whether scores of layers are needed."""
        return self.count != 0 and self.named is None and self.method.chosen == "lowest"

    @cached_property
    def ranks_widths(self) -> bool:
        """Whether scores of neurons, heads, channels or experts are needed."""
        old = self.anatomy.sizes
        narrows = self.sizes is not None and any(size != old[axis] for axis, size in self.sizes.items())
        return narrows and WIDTHS[self.criterion].input != "nothing"

    @property
    def needs_scores(self) -> bool:
        """Whether any scores are needed."""
        return self.ranks_layers or self.ranks_widths

    @property
    def reads_text(self) -> bool:
        """Whether the scores that are needed are taken on a text."""
        of_text = self.ranks_layers and not self.method.weights
        return of_text or (self.ranks_widths and WIDTHS[self.criterion].input == "text")

    @property
    def most_removable(self) -> int:
        """How many layers can go."""
        if self.named is not None:
            return self.count or 0
        return max(0, min(self.anatomy.depth - sum(self.protect), self.anatomy.depth - 1))

    def choose(self, count: int, *, values: Sequence[Any] | None, order: Sequence[int] | None) -> Choice:
        """Return which `count` layers go by the values of the score, or by the order of a greedy removal."""
        depth = self.anatomy.depth
        if self.named is not None:
            return Choice(self.named, pairing=self.pairing)
        if order is not None:
            return choose_in_order(order, count, depth, protect=self.protect)
        return choose_layers(
            self.score,
            count,
            depth,
            values=values,
            contiguous=self.contiguous,
            protect=self.protect,
            seed=self.seed,
            period=self.period,
        )

    def placeholder(self, count: int) -> Choice:
        """Return some `count` layers: they give the sizes of the result while there are no scores."""
        if self.named is not None:
            return Choice(self.named, pairing=self.pairing)
        return Choice(tuple(range(self.anatomy.depth - count, self.anatomy.depth)))

    def plan(self, choice: Choice, criterion: str, *, values: Mapping[str, Any] | None) -> Plan:
        """Return the plan that drops the chosen layers and keeps the positions that `criterion` ranks highest."""
        return prune(
            self.anatomy,
            dropped=choice.dropped,
            pairing=choice.pairing,
            sizes=self.sizes,
            criterion=criterion,
            values=values,
            seed=self.seed,
        )
