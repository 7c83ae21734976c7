"""What each layer of a checkpoint is: how it mixes tokens, its window, its MLP or experts, and its parameters."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from surgeon import text
from surgeon.anatomy.anatomy import Anatomy, family_of_type
from surgeon.anatomy.config import attention_kinds, kinds_by, layer_kinds, size_of, text_config
from surgeon.anatomy.layer_rules import RULES, SLIDING_ATTENTION
from surgeon.anatomy.stacks import Stack

CHUNKED = "chunked_attention"
# What mixes the tokens of a layer, by the names of its tensors, where neither a table nor the config says it.
_STATE, _ATTENTION = re.compile(r"A_log|\bmamba"), re.compile(r"attn|attention|\bq_proj|\bqkv|query")
_EXPERTS = re.compile(r"experts?\b|\brouter\b")
_MLP = re.compile(r"mlp|block_sparse_moe|ffn|feed_forward|fc1|c_fc|intermediate|DenseReluDense")
_NUMBER = re.compile(r"experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer, numbered in its stack. What config and tensors do not say is None.

    `attention` is the config's own word without "_attention": full, sliding, linear, mamba ...; "none" for a layer that
    has only an MLP. `window` is how many tokens it sees where it does not see all. `rotary` is False in a layer without
    positions among layers that have them. `ffn` is the width of the MLP, or of an expert. `parts` are the stored
    parameters by part: attention, mlp, norm and so on; without a table one part, "layers".
    """

    layer: int
    stack: str = field(compare=False)
    attention: str | None
    window: int | None
    rotary: bool | None
    mlp: str | None  # "dense", "experts" or "none"
    ffn: int | None
    experts: int | None
    experts_per_token: int | None
    parts: Mapping[str, int]

    @property
    def parameters(self) -> int:
        """The stored parameters of the layer."""
        return sum(self.parts.values())

    @property
    def kind(self) -> tuple[object, ...]:
        """Everything but the layer's place: layers of one kind have equal ones."""
        parts = tuple(sorted(self.parts.items()))
        return (
            self.stack, self.attention, self.window, self.rotary, self.mlp, self.ffn, self.experts,
            self.experts_per_token, parts,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the layer as `--json` prints it."""
        return {
            "layer": self.layer,
            "stack": self.stack,
            "attention": self.attention,
            "window": self.window,
            "rotary": self.rotary,
            "mlp": self.mlp,
            "ffn": self.ffn,
            "experts": self.experts,
            "experts_per_token": self.experts_per_token,
            "parameters": self.parameters,
            "parameters_by_part": dict(self.parts),
        }


def layer_rows(anatomy: Anatomy) -> tuple[LayerRow, ...]:
    """Return a row for each layer of each stack, in the order of `anatomy.stacks`. Reads headers and the config."""
    names: dict[tuple[str, int], list[str]] = {
        (stack.prefix, layer): [] for stack in anatomy.stacks for layer in range(stack.depth)
    }
    parts: dict[tuple[str, int], Counter[str]] = {place: Counter() for place in names}
    for name, tensor in anatomy.spec.tensors.items():
        for stack in anatomy.stacks:
            if place := stack.locate(name):
                names[stack.prefix, place[0]].append(place[1])
                part = anatomy.row(name)[1] if anatomy.whole_family is not None else "layers"
                parts[stack.prefix, place[0]][part] += tensor.num_parameters
                break
    rows: list[LayerRow] = []
    for stack in anatomy.stacks:
        attention = _attention(anatomy, stack, names)
        rotary = _rotary(anatomy.config, stack.depth) if len(anatomy.stacks) == 1 else [None] * stack.depth
        for layer, kind in enumerate(attention):
            inside = names[stack.prefix, layer]
            mlp, experts = _mlp(anatomy, inside, kind)
            rows.append(
                LayerRow(
                    layer=layer,
                    stack=stack.prefix,
                    attention=None if kind is None else kind.removesuffix("_attention"),
                    window=_window(anatomy.config, kind),
                    rotary=rotary[layer],
                    mlp=mlp,
                    ffn=_ffn(anatomy, stack, layer, inside, mlp),
                    experts=experts,
                    experts_per_token=size_of(anatomy.config, "experts_per_token") if experts else None,
                    parts=dict(parts[stack.prefix, layer]),
                )
            )
    return tuple(rows)


def kinds_of(rows: Sequence[LayerRow]) -> list[list[LayerRow]]:
    """Return the layers by kind, the kinds in the order in which they first come."""
    kinds: dict[tuple[object, ...], list[LayerRow]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    return list(kinds.values())


def _attention(anatomy: Anatomy, stack: Stack, names: Mapping[tuple[str, int], Sequence[str]]) -> Sequence[str | None]:
    """Return what mixes the tokens of each layer of a stack: by the config, the family, else the tensors' names."""
    config, depth = anatomy.config, stack.depth
    cross = config.get("cross_attention_layers")
    crossing = set(cross) if isinstance(cross, list) else set()
    kinds: Sequence[str | None] | None = None
    if len(anatomy.stacks) == 1:
        kinds = layer_kinds(config, depth) or _listed(config, depth)
    if kinds is None:
        known = family_of_type(str(config.get("model_type")))
        usual = attention_kinds(config, depth)
        if known is not None and not known.is_partial:
            kinds = usual
        else:
            kinds = [_by_names(names[stack.prefix, layer], usual[layer]) for layer in range(depth)]
    return ["cross_attention" if layer in crossing else _plain(kind) for layer, kind in enumerate(kinds)]


def _plain(kind: str | None) -> str | None:
    """Return a kind in the words that people read: "none" for a layer that has only an MLP or experts."""
    return {"attention": "full_attention", "moe": "none", "mlp": "none", "M": "mamba", "E": "none", "-": "none"}.get(
        str(kind), kind
    )


def _listed(config: Mapping[str, Any], depth: int) -> list[str] | None:
    """Return the kinds that the config lists under other keys than layer_types, None where it has no such list."""
    for key in ("layers_block_type", "block_types", "hybrid_override_pattern"):
        value = config.get(key)
        kinds = list(value) if isinstance(value, str | list) else []
        if len(kinds) == depth and all(isinstance(kind, str) for kind in kinds):
            return ["full_attention" if kind == "*" else kind for kind in kinds]
    return None


def _by_names(names: Collection[str], usual: str) -> str | None:
    if any(_STATE.search(name) for name in names):
        return "mamba"
    return usual if any(_ATTENTION.search(name) for name in names) else None


def _window(config: Mapping[str, Any], kind: str | None) -> int | None:
    """Return how many tokens a layer of a kind sees, None for one that sees all, or where the config does not say."""
    if kind == CHUNKED:
        return size_of(config, "attention_chunk")
    is_windowed = kind is not None and (kind in SLIDING_ATTENTION or "sliding" in kind)
    return size_of(config, "window") if is_windowed else None


def _rotary(config: Mapping[str, Any], depth: int) -> Sequence[bool | None]:
    """Return whether each layer has rotary positions where the config, or the model's code, leaves some out."""
    listed: object = config.get("no_rope_layers")
    if not listed:
        rules = RULES.get(str(text_config(config).get("model_type")), ())
        rule = next((rule for rule in rules if rule.explicit == "no_rope_layers"), None)
        listed = kinds_by(rule, text_config(config), depth) if rule else None
    if not isinstance(listed, Sequence) or len(listed) != depth or all(listed):
        return [None] * depth
    return [bool(has) for has in listed]


def _mlp(anatomy: Anatomy, names: Sequence[str], attention: str | None) -> tuple[str | None, int | None]:
    """Return what a layer has beside its mixer, "dense", "experts" or "none", and how many experts."""
    if any(_EXPERTS.search(name) for name in names):
        numbers = {int(match[1]) for name in names if (match := _NUMBER.search(name))}
        return "experts", len(numbers) or anatomy.sizes.get("experts") or size_of(anatomy.config, "experts")
    if attention == "none" or any(_MLP.search(name) for name in names):
        return "dense", None
    return ("none" if any(_STATE.search(name) or _ATTENTION.search(name) for name in names) else None), None


def _ffn(anatomy: Anatomy, stack: Stack, layer: int, names: Sequence[str], mlp: str | None) -> int | None:
    """Return the width of a dense MLP, or of one expert; None where no table has checked it and no shape shows it."""
    sizes, config = anatomy.sizes, anatomy.config
    if mlp not in ("dense", "experts"):
        return None
    own = f"{'decoder' if 'decoder' in stack.prefix else 'encoder'}_ffn_dim" if len(anatomy.stacks) > 1 else ""
    dense = sizes.get("ffn") or config.get(own) or size_of(config, "ffn")
    width = dense if mlp == "dense" else sizes.get("expert_ffn") or size_of(config, "expert_ffn") or dense
    if anatomy.whole_family is not None:
        return width
    shapes = (anatomy.spec.tensors[stack.name(layer, name)].shape for name in names)
    is_there = any(width in shape or 2 * (width or 0) in shape for shape in shapes if len(shape) > 1)
    return width if is_there else None


# --- for people ---------------------------------------------------------------------------------------------------

HEADER = ("", "layers", "attention", "MLP", "parameters each")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def layer_lines(rows: Sequence[LayerRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Return the header and a line for each kind of layer, and the pattern in which kinds come: "AAAAAB x5, AA".

    Kinds have letters where the pattern is needed: where one comes back after another. Else it is "".
    """
    kinds = kinds_of(rows)
    several = len({row.stack for row in rows}) > 1
    lines: list[tuple[str, ...]] = [
        (f"{same[0].stack if several else ''}{places([row.layer for row in same])}", *_cells(same[0])) for same in kinds
    ]
    if several or len(kinds) > len(_LETTERS) or _num_runs(rows) == len(kinds):
        return HEADER[1:], lines, ""
    letters = {id(row): letter for letter, same in zip(_LETTERS, kinds, strict=False) for row in same}
    lettered: list[tuple[str, ...]] = [(letter, *line) for letter, line in zip(_LETTERS, lines, strict=False)]
    return HEADER, lettered, pattern_of("".join(letters[id(row)] for row in rows))


def _cells(row: LayerRow) -> tuple[str, str, str]:
    """Return what a layer mixes tokens by, its MLP and its parameters, in words."""
    attention = row.attention or "not known"
    attention += f", window {row.window:,}" if row.window else ""
    attention += ", no rotary positions" if row.rotary is False else ""
    width = f"{row.ffn:,}" if row.ffn else ""
    if row.mlp == "experts":
        mlp = f"{row.experts or 'several'} experts" + (f" of {width}" if width else "")
        mlp += f", {row.experts_per_token} a token" if row.experts_per_token else ""
    else:
        mlp = f"{row.mlp or 'not known'} {width}".strip()
    return attention, mlp, f"{row.parameters:,}"


def places(numbers: Sequence[int]) -> str:
    """Return numbers in ascending order as ranges, of many the first two and the last: "0-4, 6-10, ..., 54-58"."""
    runs = text.layers(numbers).split(", ")
    return ", ".join(runs if len(runs) <= 4 else [*runs[:2], "...", runs[-1]])


def pattern_of(letters: str) -> str:
    """Return a row of letters by its period: "AAAAAB x5, AA"; without one in groups of ten."""
    depth = len(letters)
    period = next(p for p in range(1, depth + 1) if all(letters[i] == letters[i % p] for i in range(depth)))
    times, rest = divmod(depth, period)
    if times == 1:
        return " ".join(letters[start : start + 10] for start in range(0, depth, 10))
    return f"{letters[:period]} x{times}" + (f", {letters[-rest:]}" if rest else "")


def _num_runs(rows: Sequence[LayerRow]) -> int:
    return sum(row.kind != before.kind for before, row in pairwise(rows)) + 1
