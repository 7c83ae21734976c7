"""The config follows the layers: what config.json must say when the layers of a result are those of a pairing.

Tools that change the layer count and leave the rest write checkpoints that fail to load or, worse, load with layers
of the wrong kind. Here a surviving half of a layer keeps its kind (sliding or full, rope or none; dense or sparse);
what the config cannot express is refused with the reason.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NoReturn

from surgeon.anatomy.config import (
    CONFIG_HINT,
    attention_kinds,
    kinds_by,
    model_type,
    nested_stacks,
    text_config,
)
from surgeon.anatomy.half_keys import HALF_OF_KEY, half_of_keys
from surgeon.anatomy.halves import MLP, Half, Pairing
from surgeon.anatomy.layer_rules import (
    COUNT_KEYS,
    DECODER_COUNT_KEYS,
    ENCODER_COUNT_KEYS,
    FULL_ATTENTION,
    INDEX_LISTS,
    LAST_IS_FULL,
    LAYER_LISTS,
    LAYER_REFERENCES,
    LAYER_TEXTS,
    OTHER_LISTS,
    PLACE_BOUND,
    RULES,
    UNCUTTABLE,
    WITHOUT_ATTENTION,
    Rule,
)
from surgeon.errors import CheckpointError, PlanError

# A key of a family without rules that looks as if it picked layers by stride; it holds only for an unmoved prefix.
_SUSPECT = re.compile(
    r"(layer|attn|attention|moe|expert|sparse|global|window|shared).*(interval|period|step|freq|every|pattern)"
)
# A list of numbers of which the name says that they may be layers; it holds only while these layers stay in place.
_PLACES = re.compile(r"layer|block|index|indices|idx|ids|attn|attention")

WITHOUT_CACHE = "no layer that attends is left: transformers scores texts with such a model, and generates none"


@dataclass
class ConfigEdit:
    """The config of a result, and what is worth saying about how it came to be."""

    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def _attending(text: Mapping[str, Any], depth: int) -> list[bool]:
    """Return which layers of a hybrid attend; none where the config tells no layers apart."""
    listed = (text[key] for key in ("layers_block_type", "block_types", "layer_types") if text.get(key))
    kinds: Any = next(listed, None)
    for rule in RULES.get(str(text.get("model_type")), ()):
        if kinds is None and ("layer" in str(rule.explicit) or "attn_layer_period" in rule.keys):
            kinds = kinds_by(rule, text, depth)
    if kinds is None and isinstance(numbers := text.get("attn_layer_indices"), list):
        kinds = [i in numbers for i in range(depth)]
    attends = [str(kind) not in WITHOUT_ATTENTION | {"False"} for kind in kinds] if isinstance(kinds, list) else []
    return [] if all(attends) else [attends[i % len(attends)] for i in range(depth)]


def follow_layers(config: Mapping[str, Any], pairing: Pairing, depth: int, *, tabled: bool) -> ConfigEdit:
    """Return the config of the model that a pairing makes of this one, which has `depth` layers.

    What speaks of a layer's attention follows the attentions, what speaks of its MLP the MLPs. `tabled` says that the
    family has a table: its per-layer lists are known, others that are as long are no such lists.

    Raises PlanError, naming the key, when the model's code cannot give the surviving layers the kinds they have.
    """
    name = model_type(config)
    if parts := nested_stacks(config):
        edits = {part: follow_layers(config[part], pairing, depth, tabled=tabled) for part in parts}
        nested = {part: edit.config for part, edit in edits.items()}
        return ConfigEdit({**config, **nested}, [note for edit in edits.values() for note in edit.notes])
    text = text_config(config)
    text_name = str(text.get("model_type", name))
    keep = pairing.attention
    _refuse_what_cannot_move(config, {name, text_name}, pairing, depth)

    edit = ConfigEdit(dict(text))
    _slice_lists(edit, pairing, depth, tabled=tabled)
    _split_entries(edit, pairing)
    _remap_indices(edit, pairing)
    _follow_stages(edit, pairing.mlp, depth)
    _follow_references(edit, text, keep)
    for key in COUNT_KEYS + ENCODER_COUNT_KEYS + DECODER_COUNT_KEYS:
        if edit.config.get(key) == depth:
            edit.config[key] = len(keep)
    for rule in RULES.get(text_name, ()):
        _apply_rule(edit, rule, text, pairing, depth, text_name)
    if text_name in LAST_IS_FULL and attention_kinds(edit.config, len(keep))[-1] not in FULL_ATTENTION:
        raise PlanError(
            f"{text_name} makes its last layer attend to everything, and layer {keep[-1]} does not",
            hint="Let the last layer of the result be one with full attention.",
        )
    if not tabled and text_name not in RULES:
        _refuse_unknown_strides(text, keep, text_name)
        _refuse_unknown_places(text, keep, depth, text_name)
    _follow_residual_scale(edit, len(keep), depth)
    attends = _attending(text, depth)
    if any(attends) and not any(attends[i] for i in keep):
        edit.notes.append(WITHOUT_CACHE)
    if text is not config:
        edit.config = {**config, "text_config": edit.config}
    return edit


def _taken(values: Sequence[Any] | Mapping[int, Any], pairing: Pairing, half: Half | None, key: str) -> list[Any]:
    """Return what each layer of the result takes of values that speak of this half, None where of both or of either.

    Raises PlanError, naming the key, where the two halves of a layer would take different ones of the latter.
    """
    if half == MLP:
        return [values[i] for i in pairing.mlp]
    taken = [values[i] for i in pairing.attention]
    if half is None and (pair := next((p for p in _pairs(pairing) if values[p[0]] != values[p[1]]), None)):
        raise PlanError(
            f"the attention of layer {pair[0]} and the MLP of layer {pair[1]} differ in {key} of config.json, which "
            "speaks of whole layers",
            hint="Pair halves of which it says the same, or keep whole layers.",
        )
    return taken


def _pairs(pairing: Pairing) -> Iterable[tuple[int, int]]:
    return zip(pairing.attention, pairing.mlp, strict=True)


def _refuse_what_cannot_move(config: Mapping[str, Any], names: set[str], pairing: Pairing, depth: int) -> None:
    if not pairing.attention:
        raise PlanError(
            "a model needs at least one layer", hint="--layers is the depth of the result; ask for 1 or more."
        )
    if pairing == Pairing.of_layers(range(depth)):
        return
    unmoved = pairing == Pairing.of_layers(range(len(pairing.attention)))
    for name in sorted(names):
        if name in UNCUTTABLE:
            raise PlanError(
                f"{name} {UNCUTTABLE[name]}; removing layers would break it",
                hint="surgeon inspect works on it; no surgery on its layers does.",
            )
        if name in PLACE_BOUND and not unmoved:
            raise PlanError(
                f"{name} {PLACE_BOUND[name]}; moving layers would change them",
                hint="Only layers at the end can be removed: surgeon truncate.",
            )


def _slice_lists(edit: ConfigEdit, pairing: Pairing, depth: int, *, tabled: bool) -> None:
    for key, value in list(edit.config.items()):
        if key in LAYER_TEXTS and isinstance(value, str) and len(value) == depth:
            edit.config[key] = "".join(_taken(value, pairing, HALF_OF_KEY.get(key), key))
        if not isinstance(value, list) or key in LAYER_REFERENCES:
            continue
        if key in LAYER_LISTS and value:
            if len(value) == depth:
                edit.config[key] = _taken(value, pairing, HALF_OF_KEY.get(key), key)
            elif key == "block_types":  # cycled over the layers
                cycled = [value[i % len(value)] for i in range(depth)]
                edit.config[key] = _taken(cycled, pairing, HALF_OF_KEY.get(key), key)
            else:
                raise CheckpointError(f"config.json lists {len(value)} {key} for {depth} layers", hint=CONFIG_HINT)
        elif len(value) == depth and not tabled and key not in INDEX_LISTS | OTHER_LISTS:
            edit.config[key] = _taken(value, pairing, HALF_OF_KEY.get(key), key)
            edit.notes.append(f"{key} has one entry for each layer and was cut with them")


def _split_entries(edit: ConfigEdit, pairing: Pairing) -> None:
    """Renumber the entries of per_layer_config. That of a layer made of two has from each what speaks of its half."""
    if not isinstance(per_layer := edit.config.get("per_layer_config"), Mapping):
        return
    entries = {int(number): value for number, value in per_layer.items()}
    made: dict[str, Any] = {}
    for j, (a, m) in enumerate(_pairs(pairing)):
        if a == m:
            made |= {str(j): entries[a]} if a in entries else {}
            continue
        said = {i: entries[i] if isinstance(entries.get(i), Mapping) else {} for i in (a, m)}
        entry: dict[str, Any] = {}
        for key in {**said[a], **said[m]}:
            own = {i: {key: said[i][key]} if key in said[i] else {} for i in (a, m)}
            entry |= _taken(own, Pairing((a,), (m,)), HALF_OF_KEY.get(key), f"per_layer_config.*.{key}")[0]
        made |= {str(j): entry} if entry else {}
    edit.config["per_layer_config"] = made


def _remap_indices(edit: ConfigEdit, pairing: Pairing) -> None:
    last = max(*pairing.attention, *pairing.mlp)
    for key in INDEX_LISTS & edit.config.keys():
        if isinstance(value := edit.config[key], list):
            named = _taken([i in value for i in range(last + 1)], pairing, HALF_OF_KEY.get(key), key)
            edit.config[key] = [j for j, is_named in enumerate(named) if is_named]


def _new_numbers(layers: Sequence[int], keep: Sequence[int]) -> list[int]:
    """Return the numbers that these layers have in the result, one for each time that a layer is in it."""
    return [j for j, i in enumerate(keep) if i in layers]


def _follow_stages(edit: ConfigEdit, keep: Sequence[int], depth: int) -> None:
    """Renumber the stages of a backbone, of which stage i is what layer i - 1 gives and stage 0 what layer 0 takes.

    The stages that it hands on stay the same layers'; one that hands on its last stage alone does so still. Raises
    PlanError where a stage that is asked for would be lost.
    """
    if edit.config.get("stage_names") != _stages(depth):
        return
    edit.config["stage_names"] = stages = _stages(len(keep))
    wanted = edit.config.get("out_indices") or [depth]
    numbers = [stage + depth + 1 if stage < 0 else stage for stage in wanted]
    if numbers == [depth]:
        new = [len(keep)]
    else:
        if lost := [stage for stage in numbers if stage and stage - 1 not in keep]:
            raise PlanError(
                f"the model hands on stage {lost[0]} (out_indices of config.json), and its layer would be removed",
                hint=f"Keep layer {lost[0] - 1}.",
            )
        new = [stage and _last_place(keep, stage - 1, "out_indices") + 1 for stage in numbers]
    if edit.config.get("out_indices"):
        edit.config["out_indices"] = new
    if edit.config.get("out_features"):
        edit.config["out_features"] = [stages[stage] for stage in new]


def _stages(depth: int) -> list[str]:
    return ["stem", *(f"stage{i + 1}" for i in range(depth))]


def _follow_references(edit: ConfigEdit, text: Mapping[str, Any], keep: Sequence[int]) -> None:
    """Renumber what a layer takes from another layer. Raises PlanError where it would lose it, or take another's."""
    for key in LAYER_REFERENCES & text.keys():
        if isinstance(numbers := text[key], list):
            wanted = [numbers[i] for i in keep]
            edit.config[key] = [_last_place(keep[: j + 1], layer, key) for j, layer in enumerate(wanted)]
    kinds = text.get("indexer_types")
    if isinstance(kinds, list) and "shared" in kinds:
        owner = [max((k for k in range(i + 1) if kinds[k] != "shared"), default=-1) for i in range(len(kinds))]
        for j, layer in enumerate(keep):
            owners = [other for other in keep[: j + 1] if kinds[other] != "shared"]
            if kinds[layer] == "shared" and owners[-1:] != [owner[layer]]:
                _lacks(layer, owner[layer], "indexer_types")


def _last_place(keep: Sequence[int], layer: int, key: str) -> int:
    """Return the last place of a layer among those kept."""
    if layer not in keep:
        _lacks(keep[-1], layer, key)
    return len(keep) - 1 - list(reversed(keep)).index(layer)


def _lacks(layer: int, other: int, key: str) -> NoReturn:
    raise PlanError(
        f"layer {layer} takes from layer {other} ({key} of config.json), which would not come before it",
        hint=f"Keep layer {other} with layer {layer}.",
    )


def _apply_rule(edit: ConfigEdit, rule: Rule, text: Mapping[str, Any], pairing: Pairing, depth: int, name: str) -> None:
    """Make the code derive for each layer of the result what it derived for the layer that its half was of."""
    if rule.explicit is not None and text.get(rule.explicit):
        return  # the list itself was cut
    half, keys = half_of_keys(rule.speaks_by), " and ".join(rule.speaks_by) or "a layer's place"
    kinds = _taken(kinds_by(rule, text, depth), pairing, half, keys)
    if (after := with_kinds(edit.config, rule, kinds)) is not None:
        edit.config = after
        return
    source = " and ".join(rule.keys) or f"a layer's place, where config.json has no {rule.explicit}"
    raise PlanError(
        f"{name} derives its layer kinds from {source}; removing layers would change them",
        hint="Ask for another number of layers, such as whole periods of that rule.",
    )


def with_kinds(config: Mapping[str, Any], rule: Rule, kinds: Sequence[object]) -> dict[str, Any] | None:
    """Return a config by which a rule gives the layers these kinds, None where none does."""
    if _fits(rule, config, kinds):
        return dict(config)
    if rule.express is not None:
        return {**config, **rule.express(kinds)}
    for values in product(range(len(kinds) + 2), repeat=len(rule.keys)):
        attempt = {**config, **dict(zip(rule.keys, values, strict=True))}
        if _fits(rule, attempt, kinds):
            return attempt
    return None


def _fits(rule: Rule, config: Mapping[str, Any], kinds: Sequence[object]) -> bool:
    try:
        return list(rule.kinds(config, len(kinds))) == kinds
    except (ZeroDivisionError, IndexError):  # a stride of 0, a list of another depth: they mean nothing
        return False


def _refuse_unknown_strides(text: Mapping[str, Any], keep: Sequence[int], name: str) -> None:
    if list(keep) == list(range(len(keep))):
        return
    for key, value in text.items():
        if _SUSPECT.search(key) and type(value) is int and value > 1:
            raise PlanError(
                f"{name} has {key} = {value}; if it picks layers by number, moving them would change it",
                hint="Only layers at the end can be removed: surgeon truncate.",
            )


def _refuse_unknown_places(text: Mapping[str, Any], keep: Sequence[int], depth: int, name: str) -> None:
    known = INDEX_LISTS | OTHER_LISTS | LAYER_LISTS | LAYER_REFERENCES
    if text.get("stage_names") == _stages(depth):
        known |= {"out_indices"}
    for key, value in text.items():
        if key in known or not _PLACES.search(key) or not isinstance(value, list) or not value:
            continue
        if any(type(number) is not int or number < 0 for number in value) or sorted(set(value)) != value:
            continue
        if _new_numbers(value, keep) != [number for number in value if number < depth]:
            raise PlanError(
                f"{name} has {key} = {value}; if these are layers, this would change or remove one of them",
                hint="Keep these layers at their places: surgeon truncate to more layers.",
            )


def _follow_residual_scale(edit: ConfigEdit, new: int, old: int) -> None:
    """Keep MiniCPM's residual scale, scale_depth / sqrt(layers), what it was."""
    scale = edit.config.get("scale_depth")
    if isinstance(scale, (int, float)) and new != old:
        edit.config["scale_depth"] = scale * math.sqrt(new / old)
        edit.notes.append(
            f"scale_depth {scale:g} became {edit.config['scale_depth']:g}: the model divides it by sqrt(layers)"
        )
