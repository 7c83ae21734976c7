"""What a checkpoint is: its layer stacks, its family and sizes, and for every tensor its row in the family's table.

Reading an anatomy is also the check that a checkpoint is whole: each tensor is accounted for, by name and by shape.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from surgeon.anatomy.axes import shape
from surgeon.anatomy.config import CONFIG_HINT, check_layer_keys, layer_count, model_type, text_config
from surgeon.anatomy.families import FAMILIES, Family, Row, Rows
from surgeon.anatomy.layer_rules import COUNT_KEYS, DECODER_COUNT_KEYS, ENCODER_COUNT_KEYS
from surgeon.checkpoint.header import CheckpointSpec, is_quantized
from surgeon.errors import CheckpointError, PlanError

_NUMBERED = re.compile(r"((?:.*?\.)??)(0|[1-9][0-9]{0,5})\.")  # the prefix up to the first number, and that number
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
_TOWERS = re.compile(r"vision|visual|image|audio|speech|mtp")  # stacks beside the language model's own

FILES_HINT = "The weights are incomplete or of another model than config.json; fetch the whole checkpoint again."


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of layers: tensors called prefix + number + "." + rest, numbered from 0 to depth - 1."""

    prefix: str
    depth: int

    def locate(self, name: str) -> tuple[int, str] | None:
        """Return the layer of a tensor and its name inside the layer, None for a tensor outside the stack."""
        if not name.startswith(self.prefix):
            return None
        match = _NUMBERED.fullmatch(name[: name.find(".", len(self.prefix)) + 1])
        if match is None or match[1] != self.prefix:
            return None
        return int(match[2]), name[match.end() :]

    def name(self, layer: int, rest: str) -> str:
        """Return the full name of tensor `rest` of `layer`."""
        return f"{self.prefix}{layer}.{rest}"


def find_stacks(config: Mapping[str, Any], names: Iterable[str]) -> tuple[Stack, ...]:
    """Return the model's stack of layers; of an encoder-decoder the decoder's, then the encoder's.

    Raises CheckpointError when the names do not show the number of layers that the config gives.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        if odd := next((word for word in name.split(".") if word.isdigit() and not _NUMBER.fullmatch(word)), None):
            raise CheckpointError(f"{name[:200]!r} holds {odd[:20]!r}, which is no layer's number", hint=FILES_HINT)
        if match := _NUMBERED.match(name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    text = text_config(config)
    if not text.get("is_encoder_decoder"):
        return (_pick_stack(numbers, layer_count(text, COUNT_KEYS)),)
    depth = layer_count(text, ENCODER_COUNT_KEYS)
    decoder_depth = layer_count(text, DECODER_COUNT_KEYS) or depth  # T5: absent means as many
    return (
        _pick_stack({prefix: layers for prefix, layers in numbers.items() if "decoder" in prefix}, decoder_depth),
        _pick_stack({prefix: layers for prefix, layers in numbers.items() if "encoder" in prefix}, depth),
    )


def _pick_stack(numbers: Mapping[str, set[int]], depth: int | None) -> Stack:
    """Return the one stack with `depth` layers. Raises CheckpointError when there is none, or more than one."""
    if depth is None:
        raise CheckpointError("config.json does not say how many layers the model has", hint=CONFIG_HINT)
    fitting = [prefix for prefix, layers in numbers.items() if len(layers) == depth == max(layers) + 1]
    if len(fitting) > 1:
        fitting = [prefix for prefix in fitting if not _TOWERS.search(prefix)]
    if len(fitting) == 1:
        return Stack(fitting[0], depth)
    if fitting:
        raise CheckpointError(
            f"cannot tell which are the model's layers: {' or '.join(sorted(fitting))}", hint=CONFIG_HINT
        )
    if not numbers:
        raise CheckpointError("the checkpoint has no layers: no tensor's name holds a number", hint=FILES_HINT)
    prefix, layers = max(numbers.items(), key=lambda item: (not _TOWERS.search(item[0]), len(item[1])))
    if (missing := next((i for i in range(max(layers)) if i not in layers), None)) is not None:
        raise CheckpointError(f"layer {missing} is missing: no tensor is called {prefix}{missing}.*", hint=FILES_HINT)
    raise CheckpointError(
        f"config.json says {depth} layers, but the files hold {len(layers)} ({prefix}0 to {prefix}{max(layers)})",
        hint="Config and weights do not belong together, or extra layers (MTP) follow the model's own.",
    )


Part = Literal["embedding", "attention", "mlp", "norm", "buffer"]

EXPERT_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")  # of a tensor that only one expert has, in its name


@dataclass(frozen=True)
class Anatomy:
    """A checkpoint, understood. Without a `family` there is no table: depth can be changed, width and parts cannot."""

    spec: CheckpointSpec
    model_type: str
    stacks: tuple[Stack, ...]
    family: Family | None
    sizes: Mapping[str, int]  # axis: size; empty without a family

    @property
    def depth(self) -> int:
        """The number of layers (of each stack: where they differ, no surgery counts layers)."""
        return self.stacks[0].depth

    def require_family(self) -> Family:
        """Return the family. Raises PlanError when the model type has no table."""
        if self.family is None:
            quantized = is_quantized(self.spec.config)
            what = "a quantized checkpoint" if quantized else f"model type {self.model_type!r}"
            raise PlanError(
                f"{what} has no table of its tensors, so only whole layers can be moved",
                hint=f"Model types with a table: {', '.join(FAMILIES)}.",
            )
        return self.family

    def row(self, name: str) -> tuple[Row, Part]:
        """Return the table's row of one of this checkpoint's tensors, and the part that it belongs to."""
        place = _find_row(self.require_family(), self.stacks[0], name)
        assert place is not None, f"read_anatomy lets no unknown tensor pass: {name}"
        return place


def read_anatomy(spec: CheckpointSpec) -> Anatomy:
    """Return the anatomy of a checkpoint, after checking every tensor against its family's table where there is one.

    Raises CheckpointError naming the first tensor that is unknown, missing or of another shape than the config says.
    """
    name = model_type(spec.config)
    stacks = find_stacks(spec.config, spec.tensors)
    for stack in stacks:
        check_layer_keys(text_config(spec.config), stack.depth)
    family = FAMILIES.get(name)
    if family is None or is_quantized(spec.config):  # the tables describe unquantized files
        return Anatomy(spec, name, stacks, None, {})
    if stacks[0].prefix not in (family.layers, family.layers.removeprefix(family.base)):
        raise CheckpointError(
            f"the layers are called {stacks[0].prefix}*, those of a {name} model {family.layers}*", hint=FILES_HINT
        )
    sizes = _sizes(family, spec.config)
    _check_present(family, stacks[0], spec, sizes)
    _check_missing(family, stacks[0], spec, sizes)
    return Anatomy(spec, name, stacks, family, sizes)


def written_and_read(row: Row) -> tuple[int | None, int | None]:
    """Return which dimension of a tensor writes an axis, and which reads one; None where none does."""
    last = len(row.axes) - 1
    match row.kind:
        case "linear":
            return last - 1, last
        case "conv1d":
            return last, last - 1
        case "head":
            return None, last
        case _:
            return last, None


def _find_row(family: Family, stack: Stack, name: str) -> tuple[Row, Part] | None:
    if place := stack.locate(name):
        inside = EXPERT_NUMBER.sub("{}", place[1])
        tables: list[tuple[Part, Rows]] = [("attention", family.attention), ("norm", family.norm)]
        tables += [("mlp", rows) for rows in family.mlp]
    else:
        inside = name if name in family.embedding or name.startswith(family.base) else family.base + name
        tables = [("embedding", family.embedding), ("norm", family.final_norm)]
    for part, rows in tables:
        if row := rows.get(inside):
            return row, "buffer" if row.kind == "buffer" else part
    return None


def _sizes(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of every axis that the config gives. Raises CheckpointError for what is no positive number."""
    sizes: dict[str, int] = {}
    for axis, keys in family.sizes.items():
        if key := next((key for key in keys if config.get(key) is not None), None):
            if type(config[key]) is not int or config[key] < 1:
                raise CheckpointError(
                    f"config.json says {key} = {config[key]!r}, not a positive number", hint=CONFIG_HINT
                )
            sizes[axis] = config[key]
    for axis, (factor, other) in family.default_sizes.items():
        if other in sizes:
            sizes.setdefault(axis, factor * sizes[other])
    for axis in ("hidden", "heads", "vocab", "ffn"):
        if axis not in sizes:
            raise CheckpointError(f"config.json does not say {family.sizes[axis][0]}", hint=CONFIG_HINT)
    hidden, heads, kv_heads = sizes["hidden"], sizes["heads"], sizes["kv_heads"]
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json says {heads} attention heads, not a multiple of {kv_heads} key-value heads", hint=CONFIG_HINT
        )
    if "head_dim" not in sizes and hidden % heads:
        raise CheckpointError(
            f"config.json says hidden size {hidden}, not a multiple of {heads} attention heads", hint=CONFIG_HINT
        )
    sizes = {"head_dim": hidden // heads} | sizes | {"group": heads // kv_heads}
    return sizes | dict.fromkeys(("q_dim", "k_dim", "v_dim"), sizes["head_dim"])


def _check_present(family: Family, stack: Stack, spec: CheckpointSpec, sizes: Mapping[str, int]) -> None:
    """Refuse a tensor that the table does not know, or that has another shape than the config implies."""
    for name, tensor in spec.tensors.items():
        place = _find_row(family, stack, name)
        if place is None or not _may_exist(place[0], spec.config, sizes):
            raise CheckpointError(
                f"{name!r} is not a tensor of a {model_type(spec.config)} model with this config.json", hint=FILES_HINT
            )
        row, part = place
        if part == "buffer":
            continue
        try:
            expected = shape(row.axes, sizes)
        except KeyError as error:
            raise CheckpointError(
                f"{name!r} has an axis {error} whose size config.json does not give", hint=FILES_HINT
            ) from error
        if tensor.shape != expected:
            raise CheckpointError(
                f"{name!r} is {list(tensor.shape)}, but config.json implies {list(expected)}", hint=FILES_HINT
            )


def _check_missing(family: Family, stack: Stack, spec: CheckpointSpec, sizes: Mapping[str, int]) -> None:
    """Refuse a checkpoint that lacks a tensor: a loader would fill it with random numbers."""
    for name in _expected(family, stack, spec, sizes):
        if name not in spec.tensors:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}", hint=FILES_HINT)


def _expected(family: Family, stack: Stack, spec: CheckpointSpec, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield every name that a checkpoint of this family, with this config, must have."""
    config, present = spec.config, spec.tensors
    saved_with_base = stack.prefix == family.layers
    for name, row in {**family.embedding, **family.final_norm}.items():
        stored = name if saved_with_base else name.removeprefix(family.base)
        if row.kind == "head":  # absent when tied, and from a headless model; the default of tying is the family's
            is_needed = saved_with_base and config.get("tie_word_embeddings") is False
        else:
            is_needed = _must_exist(row, config, sizes, sample=stored in present)
        if is_needed:
            yield stored
    places = (stack.locate(name) for name in present)
    first = {place[1] for place in places if place and place[0] == 0}
    for layer in range(stack.depth):
        mlp = max(family.mlp, key=lambda rows: sum(stack.name(layer, rest.format(0)) in present for rest in rows))
        for rest, row in {**family.attention, **family.norm, **mlp}.items():
            if _must_exist(row, config, sizes, sample=rest in first):
                for expert in range(sizes["experts"] if "{}" in rest else 1):
                    yield stack.name(layer, rest.format(expert))


def _must_exist(row: Row, config: Mapping[str, Any], sizes: Mapping[str, int], *, sample: bool) -> bool:
    """Return whether a tensor must exist: as the config says, and else as in layer 0, where it does if `sample`."""
    if row.kind == "buffer":
        return False
    by_config = _exists_by_config(row, config, sizes)
    return sample if by_config is None else by_config


def _may_exist(row: Row, config: Mapping[str, Any], sizes: Mapping[str, int]) -> bool:
    return _exists_by_config(row, config, sizes) is not False


def _exists_by_config(row: Row, config: Mapping[str, Any], sizes: Mapping[str, int]) -> bool | None:
    """Return whether the config says that a tensor exists, None where it does not say."""
    if row.when is None:
        return True
    left, differs, right = row.when.partition(" != ")
    if differs:
        return sizes[left] != sizes[right]
    value = config.get(row.when)
    return None if value is None else bool(value)
