"""What a checkpoint is: its layer stacks, its family and sizes, and for every tensor its row in the family's table.

Reading an anatomy is also the check that a checkpoint is whole: each tensor is accounted for, by name and by shape.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Literal

from surgeon import text
from surgeon.anatomy.axes import axes_of
from surgeon.anatomy.config import (
    check_layer_keys,
    check_vocabulary,
    class_names,
    implied_kv_heads,
    is_off,
    model_type,
    setting,
    sizes_of,
    text_config,
    with_text,
)
from surgeon.anatomy.families import (
    FAMILIES,
    FIRST,
    LATER,
    MULTIMODAL,
    UNTIED,
    Family,
    Layers,
    Row,
    Rows,
    table_of_mlp,
)
from surgeon.anatomy.stacks import FILES_HINT, PREDICTORS, Stack, find_stacks
from surgeon.checkpoint.header import CheckpointSpec, is_quantized
from surgeon.errors import CheckpointError, PlanError
from surgeon.showing import Shown

FREE = "docs/models.md lists what can change in each model type."
WORDS = {"hidden": "hidden size", "ffn": "MLP", "kv_heads": "key-value heads", "group": "heads"}
WORDS |= {"head_dim": "size of a head"}

Part = Literal["embedding", "attention", "mlp", "norm", "buffer", "other"]

EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")  # of a tensor that only one expert has, in its name
PART_OF_KIND: Mapping[str, Part] = {"buffer": "buffer", "gain": "norm", "shift": "norm", "opaque": "other"}
OPAQUE: tuple[Row, Part] = (Row((), "opaque"), "other")


@dataclass(frozen=True, repr=False)
class Anatomy(Shown):
    """A checkpoint, understood. Without a `family` there is no table: depth can be changed, width and parts cannot.

    The layers of all stacks are numbered together: an encoder's follow the decoder's.
    """

    spec: CheckpointSpec
    model_type: str
    stacks: tuple[Stack, ...]
    family: Family | None
    sizes: Mapping[str, int]  # axis: size; empty without a family
    rows: Mapping[str, tuple[Row, Part]]  # of every tensor; empty without a family
    misfit: str = ""  # why a table of some axes only says nothing of this checkpoint, in brackets

    @property
    def headline(self) -> str:
        """The type, the number of layers, and the sizes of the axes."""
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        return f"{self.model_type}, {self.depth} layers, {sizes or 'no table'}"

    def to_text(self) -> str:
        """Return the type, the layers and the sizes, for people."""
        stacks = ((f"layers of {stack.prefix}*", str(stack.depth)) for stack in self.stacks)
        return text.rows([("type", self.model_type), *stacks, *((axis, str(n)) for axis, n in self.sizes.items())])

    @property
    def depth(self) -> int:
        """The number of layers (of each stack: where they differ, no surgery counts layers)."""
        return self.stacks[0].depth

    @property
    def num_layers(self) -> int:
        """The number of layers of all stacks."""
        return sum(stack.depth for stack in self.stacks)

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the language model: the checkpoint's own, or its `text_config`."""
        return text_config(self.spec.config)

    def with_config(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the checkpoint's config with some keys of the language model's changed."""
        whole = self.spec.config
        return {**whole, **changes} if self.config is whole else with_text(whole, changes)

    @property
    def whole_family(self) -> Family | None:
        """The family, None where there is no table, or one that speaks of some axes only."""
        return None if self.family is None or self.family.is_partial else self.family

    @property
    def shares_heads(self) -> bool:
        """Whether a bias of heads serves all layers of a stack, so that they keep the same ones."""
        return self.family is not None and self.family.shares_heads

    @property
    def may_hold_more(self) -> bool:
        """Whether the files may hold what the language model does not run: a copy of a tied head, further layers."""
        keys = ("tie_word_embeddings", PREDICTORS)
        return any(part.get(key) for part in (self.spec.config, self.config) for key in keys)

    def locate(self, name: str) -> tuple[int, str] | None:
        """Return the layer of a tensor, numbered through all stacks, and its name inside the layer; None outside."""
        first = 0
        for stack in self.stacks:
            if place := stack.locate(name):
                return first + place[0], place[1]
            first += stack.depth
        return None

    @cached_property
    def layers_by_axis(self) -> Mapping[str, frozenset[int]]:
        """The layers that have each axis: where some have experts, only the others have "ffn"."""
        axes = {id(row): frozenset().union(*map(axes_of, row.axes)) for row, _ in self.rows.values()}
        layers: dict[str, set[int]] = {}
        for name, (row, _) in self.rows.items():
            if axes[id(row)] and (place := self.locate(name)):
                for axis in axes[id(row)]:
                    layers.setdefault(axis, set()).add(place[0])
        return {axis: frozenset(having) for axis, having in layers.items()}

    def in_all_stacks(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the numbers of the layers at these places of each stack."""
        return tuple(stack * self.depth + layer for stack in range(len(self.stacks)) for layer in layers)

    def require_family(self, *, partial: bool = False) -> Family:
        """Return the family. Raises PlanError when the model type has no table.

        So it does for a table that speaks of some axes only, unless such a `partial` one will do.
        """
        if self.family is None:
            quantized = is_quantized(self.spec.config)
            what = "a quantized checkpoint" if quantized else f"model type {self.model_type!r}"
            raise PlanError(
                f"{what} has no table of its tensors{self.misfit}, so only whole layers can be moved",
                hint=f"Model types with a table: {', '.join(sorted({*FAMILIES, *MULTIMODAL}))}.",
            )
        if self.family.is_partial and not partial:
            raise PlanError(
                f"the table of model type {self.model_type!r} speaks of some axes only, and this needs all of them",
                hint="Whole layers and the MLP can be cut and grown: docs/models.md.",
            )
        return self.family

    @property
    def frozen(self) -> dict[str, str]:
        """The axes that cannot change in this checkpoint, each with the reason."""
        family = self.require_family(partial=True)
        by_config = (reasons for key, reasons in family.frozen_by.items() if setting(self.config, key))
        return {axis: reason for reasons in (family.frozen, *by_config) for axis, reason in reasons.items()}

    @property
    def is_square(self) -> bool:
        """Whether heads x head_dim must be hidden, so that none of them changes alone."""
        family = self.require_family(partial=True)
        if isinstance(family.square_heads, str):
            return bool(self.config.get(family.square_heads))
        return family.square_heads or ("heads" in family.sizes and "head_dim" not in family.sizes)

    @property
    def sums_normed(self) -> bool:
        """Whether what the layers add to has gone through a norm, so that none of them can leave it as it is."""
        family = self.require_family(partial=True)
        normed = is_off(self.config, family.pre_norm_flag) or bool(self.config.get(family.post_norm_flag or ""))
        return normed or family.norms_after_sum

    @property
    def expert_groups(self) -> int:
        """The number of groups in which experts compete, each with as many of them one after the other."""
        family = self.require_family(partial=True)
        count = self.config.get(family.expert_groups or "")
        return count if type(count) is int and count > 1 else 1

    def implied_kv_heads(self, heads: int) -> int | None:
        """Return how many key-value heads `heads` heads must have, None where that is free."""
        return implied_kv_heads(self.require_family(), self.config, heads)

    def check_free(self, axes: Iterable[str]) -> None:
        """Raises PlanError, with the reason, for an axis that cannot change in this family."""
        frozen = self.frozen
        if axis := next((axis for axis in axes if axis in frozen), None):
            raise PlanError(
                f"the {WORDS.get(axis, axis)} of {self.model_type} cannot change: {frozen[axis]}", hint=FREE
            )

    def row(self, name: str) -> tuple[Row, Part]:
        """Return the table's row of one of this checkpoint's tensors, and the part that it belongs to."""
        return self.rows[name]

    def shape_of(self, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of a tensor where axes have other sizes; what has no named size keeps its own."""
        stored, row = self.spec.tensors[name].shape, self.rows[name][0]
        if row.kind in ("buffer", "opaque"):
            return stored
        known = (
            dim.size(sizes) if axes_of(dim) <= sizes.keys() else size
            for dim, size in zip(row.axes, stored, strict=True)
        )
        return tuple(known)


def read_anatomy(spec: CheckpointSpec) -> Anatomy:
    """Return the anatomy of a checkpoint, after checking every tensor against its family's table where there is one.

    Raises CheckpointError naming the first tensor that is unknown, missing or of another shape than the config says.
    """
    name = model_type(spec.config)
    stacks = find_stacks(spec.config, spec.tensors)
    for stack in stacks:
        check_layer_keys(text_config(spec.config), stack.depth)
    # Tables are of unquantized files.
    family = None if is_quantized(spec.config) else family_of(spec.config, stacks[0].prefix)
    if family is None or _differing(family, spec.config) or _is_wrapped(family, stacks[0].prefix):
        return Anatomy(spec, name, stacks, None, {}, {})
    if family.is_partial:
        family = family.placed([stack.prefix for stack in stacks])
    family = family.of_class(class_names(spec.config), stacks[0].prefix)
    if stacks[0].prefix not in (family.layers, family.layers.removeprefix(family.base)):
        raise CheckpointError(
            f"the layers are called {stacks[0].prefix}*, those of a {name} model {family.layers}*", hint=FILES_HINT
        )
    try:
        sizes = sizes_of(family, spec.config)
        rows = _check_present(family, stacks, spec, sizes)
        _check_missing(family, stacks, spec, sizes)
    except CheckpointError as error:
        if not family.is_partial:
            raise
        return Anatomy(spec, name, stacks, None, {}, {}, misfit=f" that fits it ({error})")
    return Anatomy(spec, name, stacks, family, sizes, rows)


def family_of(config: Mapping[str, Any], layers: str) -> Family | None:
    """Return the table of a model whose layers lie under `layers`, None where there is none.

    That of a model with a vision tower is its language model's, under other names.
    """
    own, text = model_type(config), text_config(config)
    for wrapper in MULTIMODAL.get(own, ()):
        inner = FAMILIES.get(str(text.get("model_type"))) if text is not config else None
        inner = inner or FAMILIES.get(wrapper.text or "")
        if inner is not None and layers in (
            (whole := wrapper.around(inner)).layers,
            whole.layers.removeprefix(whole.base),
        ):
            return whole
    return family_of_type(own)


def family_of_type(name: str) -> Family | None:
    """Return the table of a language model's type, None where there is none."""
    return FAMILIES.get(name) or table_of_mlp(name)


def _is_wrapped(family: Family, prefix: str) -> bool:
    """Return whether a class holds the encoder-decoder whole, so that names begin with more than the table says."""
    return family.encoder is not None and prefix.endswith("." + family.layers)


def _differing(family: Family, config: Mapping[str, Any]) -> bool:
    """Return whether an encoder and a decoder have different sizes of an axis: the table has one name for both."""
    if family.encoder is None:
        return False
    counts = ([config[key] for key in keys if config.get(key) is not None] for keys in family.sizes.values())
    return any(len(set(map(repr, values))) > 1 for values in counts)


_Table = Mapping[str, tuple[Row, Part]]


def _row_finder(family: Family, stacks: Sequence[Stack]) -> Callable[[str], tuple[Row, Part] | None]:
    """Return the function from a tensor's name to its row and part, None for a tensor that the table does not know."""
    outside = _table([("embedding", family.embedding), ("norm", family.encoder_norm | family.final_norm)])
    inside: list[tuple[Stack, _Table]] = []
    for stack, layers in zip(stacks, family.stacks, strict=True):
        parts: list[tuple[Part, Rows]] = [("norm", layers.norm), *(("attention", rows) for rows in layers.attention)]
        inside.append((stack, _table([*parts, *(("mlp", rows) for rows in layers.mlp)])))

    def find(name: str) -> tuple[Row, Part] | None:
        if any(stack.is_beyond(name) for stack in stacks):
            return OPAQUE
        name = family.current(name)
        table, rest = outside, name
        if name not in outside and not name.startswith(family.base):
            rest = family.base + name
        for stack, of_layers in inside:
            if place := stack.locate(name):
                table, rest = of_layers, place[1]
        known = table.get(rest) or table.get(EXPERT_NUMBER.sub("{}", rest))
        is_opaque = known is None and (name.startswith(family.opaque) or (family.base + name).startswith(family.opaque))
        return OPAQUE if is_opaque else known

    return find


def _table(parts: Sequence[tuple[Part, Rows]]) -> _Table:
    """Return the rows of several parts as one table; the first part with a name has it."""
    tables = ({name: (row, PART_OF_KIND.get(row.kind, part)) for name, row in rows.items()} for part, rows in parts)
    return reduce(lambda earlier, later: {**later, **earlier}, tables)


def _check_present(
    family: Family, stacks: Sequence[Stack], spec: CheckpointSpec, sizes: Mapping[str, int]
) -> dict[str, tuple[Row, Part]]:
    """Return the row of each tensor. Refuses one that the table does not know, or of another shape than it implies."""
    rows: dict[str, tuple[Row, Part]] = {}
    find = _row_finder(family, stacks)
    right: set[tuple[int, tuple[int, ...]]] = set()  # rows, and shapes that fit them: thousands of experts share a few
    for name, tensor in spec.tensors.items():
        place = find(name)
        if place is None or (place[0].when is not None and not _may_exist(place[0], spec.config, sizes, stacks, name)):
            raise CheckpointError(
                f"{name!r} is not a tensor of a {model_type(spec.config)} model with this config.json", hint=FILES_HINT
            )
        row, part = rows[name] = place
        if part not in ("buffer", "other") and (id(row), tensor.shape) not in right:
            try:
                _check_shape(name, tensor.shape, row, sizes)
            except CheckpointError:
                known = ((other, find(other), value.shape) for other, value in spec.tensors.items())
                axes = [
                    (other, *pair) for other, at, shape in known if at for pair in zip(at[0].axes, shape, strict=False)
                ]
                check_vocabulary(spec.config, {other: size for other, dim, size in axes if axes_of(dim) == {"vocab"}})
                raise
            right.add((id(row), tensor.shape))
    return rows


def _check_shape(name: str, stored: tuple[int, ...], row: Row, sizes: Mapping[str, int]) -> None:
    """Raises CheckpointError for a tensor of another shape than its axes have; "?" has any size."""
    expected: list[int | str] = []
    for dim in row.axes:
        unknown = axes_of(dim) - sizes.keys()
        if unknown - {"?"}:
            raise CheckpointError(
                f"{name!r} has an axis {min(unknown)!r} whose size config.json does not give", hint=FILES_HINT
            )
        expected.append("?" if unknown else dim.size(sizes))
    if len(stored) != len(expected) or any(
        want not in ("?", size) for want, size in zip(expected, stored, strict=True)
    ):
        implied = f"[{', '.join(map(str, expected))}]"
        raise CheckpointError(f"{name!r} is {list(stored)}, but config.json implies {implied}", hint=FILES_HINT)


def _check_missing(family: Family, stacks: Sequence[Stack], spec: CheckpointSpec, sizes: Mapping[str, int]) -> None:
    """Refuse a checkpoint that lacks a tensor: a loader would fill it with random numbers."""
    present = {family.current(name) for name in spec.tensors}
    for name in _expected(family, stacks, present, spec.config, sizes):
        if name not in present:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}", hint=FILES_HINT)


def _expected(
    family: Family,
    stacks: Sequence[Stack],
    present: Collection[str],
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> Iterator[str]:
    """Yield every name that a checkpoint of this family, with this config, must have."""
    text = text_config(config)
    saved_with_base = stacks[0].prefix == family.layers
    outside = {
        name if saved_with_base else name.removeprefix(family.base): row
        for name, row in family.outside.items()
        if saved_with_base or name.startswith(family.base)  # the rest are the head's, and there is no head
    }
    parts = {row.optional for name, row in outside.items() if name in present}
    for stored, row in outside.items():
        if row.optional and row.optional not in parts:
            is_needed = False
        elif row.kind == "head" or row.when == UNTIED:  # none when tied; the default of tying is the family's
            is_needed = config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is False
        else:
            is_needed = _must_exist(row, text, sizes, sample=stored in present)
        if is_needed:
            yield stored
    for stack, layers in zip(stacks, family.stacks, strict=True):
        yield from _expected_in_layers(stack, layers, present, text, sizes)


def _expected_in_layers(
    stack: Stack, layers: Layers, present: Collection[str], text: Mapping[str, Any], sizes: Mapping[str, int]
) -> Iterator[str]:
    places = (stack.locate(name) for name in present)
    anywhere = {place[1] for place in places if place}
    for layer in range(stack.depth):

        def fitting(alternatives: Sequence[Rows], layer: int = layer) -> Rows:
            """Return the alternative of which most is there."""
            return max(
                alternatives, key=lambda rows: sum(stack.name(layer, rest.format(0)) in present for rest in rows)
            )

        for rest, row in {**fitting(layers.attention), **layers.norm, **fitting(layers.mlp)}.items():
            if row.optional or (row.when == FIRST and layer) or (row.when == LATER and not layer):
                continue
            if _must_exist(row, text, sizes, sample=rest in anywhere):
                for expert in range(sizes["experts"] if "{}" in rest else 1):
                    yield stack.name(layer, rest.format(expert))


def _must_exist(row: Row, config: Mapping[str, Any], sizes: Mapping[str, int], *, sample: bool) -> bool:
    """Return whether a tensor must exist: as the config says, else as in other layers, where it does if `sample`."""
    if row.kind == "buffer":
        return False
    by_config = _exists_by_config(row, config, sizes)
    return sample if by_config is None else by_config


def _may_exist(
    row: Row, config: Mapping[str, Any], sizes: Mapping[str, int], stacks: Sequence[Stack], name: str
) -> bool:
    if row.when in (FIRST, LATER):
        is_first = any(place[0] == 0 for stack in stacks if (place := stack.locate(name)))
        return is_first == (row.when == FIRST)
    return _exists_by_config(row, text_config(config), sizes) is not False


def _exists_by_config(row: Row, config: Mapping[str, Any], sizes: Mapping[str, int]) -> bool | None:
    """Return whether the config says that a tensor exists, None where it does not say."""
    if row.when in (None, FIRST, LATER):
        return True
    assert row.when is not None
    if row.when == UNTIED:  # where it is tied, old files have it all the same
        return None
    left, differs, right = row.when.partition(" != ")
    if differs:
        return sizes[left] != sizes[right]
    value = config.get(row.when)
    return None if value is None else bool(value)
