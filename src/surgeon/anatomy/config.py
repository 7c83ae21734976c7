"""What config.json says: the language model's part of it, sizes under any spelling, and the kind of each layer."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from surgeon.anatomy.families import FAMILIES, Family
from surgeon.anatomy.half_keys import half_of_keys
from surgeon.anatomy.halves import Half
from surgeon.anatomy.layer_rules import (
    COUNT_KEYS,
    FULL_ATTENTION,
    INDEX_LISTS,
    LAYER_LISTS,
    LAYER_REFERENCES,
    NO_ROPE,
    RULES,
    RUNTIME_PATTERNS,
    SQUARE_HEADS,
    Rule,
)
from surgeon.anatomy.spellings import SPELLINGS, Quantity
from surgeon.checkpoint.header import QUANTIZATION_KEYS, is_quantized
from surgeon.checkpoint.source import Source
from surgeon.errors import CheckpointError
from surgeon.text import layers as ranges

CONFIG_HINT = "config.json is damaged or edited; fetch it again: its values must be those the weights were made with."


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of the config that describes the language model: itself, or its `text_config`."""
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and not any(key in config for key in COUNT_KEYS):
        return nested
    return config


def with_text(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with changes in the part that describes the language model.

    A key outside of that part which said the same as one that changes says the new value too.
    """
    text = text_config(config)
    if text is config:
        return {**config, **changes}
    outer = {key: value for key, value in changes.items() if key in config and config[key] == text.get(key)}
    return {**config, **outer, "text_config": {**text, **changes}}


_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def with_floats(value: Any) -> Any:
    """Return a value of a config with the floats that JSON lacks, which transformers writes as {"__float__": "NaN"}."""
    if isinstance(value, list):
        return [with_floats(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    tag = value.get("__float__") if len(value) == 1 else None
    return _FLOATS.get(tag, value) if isinstance(tag, str) else {key: with_floats(item) for key, item in value.items()}


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that does not say how weights are quantized."""
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    return {key: unquantized(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def nested_stacks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of the configs of a decoder and of an encoder, where each stack has a config of its own."""
    parts = ("decoder", "encoder")
    return parts if all(isinstance(config.get(part), Mapping) for part in parts) else ()


def model_type(config: Mapping[str, Any]) -> str:
    """Return the config's `model_type`. Raises CheckpointError when there is none."""
    name = config.get("model_type")
    if not isinstance(name, str) or not name:
        raise CheckpointError("config.json has no model_type", hint=CONFIG_HINT)
    return name


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Return the classes of transformers that a config names; none where they are no list of words."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def is_headless(config: Mapping[str, Any]) -> bool:
    """Return whether the classes that a config names put out their last states, and no logits: GPT2Model."""
    names = class_names(config)
    return bool(names) and all(name.endswith("Model") and "Head" not in name for name in names)


UNTRAINED = (  # ends of classes that would run as language models, or fail in the middle of it
    "ForMaskedLM",
    "ForPreTraining",
    "ForNextSentencePrediction",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Return whether a config names a classifier of whole texts."""
    return any(name.endswith("ForSequenceClassification") for name in class_names(config))


def trains(config: Mapping[str, Any], *, teacher: bool) -> bool:
    """Return whether `finetune` has a loss for a model of this config: from a teacher, or without one."""
    if any(name.endswith(UNTRAINED) for name in class_names(config)) or is_quantized(config):
        return False
    encodes = bool(config.get("is_encoder_decoder"))
    return not encodes and not is_classifier(config) if teacher else encodes or not is_headless(config)


def spelled(config: Mapping[str, Any], quantity: Quantity) -> dict[str, Any]:
    """Return the keys under which a config holds a quantity, with their values; {} where it does not say.

    The keys of the family's own table come first, then the spellings in use elsewhere.
    """
    text = text_config(config)
    family = FAMILIES.get(str(text.get("model_type")))
    keys = (*(family.sizes.get(quantity, ()) if family else ()), *SPELLINGS[quantity])
    return {key: text[key] for key in keys if text.get(key) is not None}


def size_of(config: Mapping[str, Any], quantity: Quantity) -> int | None:
    """Return a quantity that is a whole number, such as "heads"; None where the config does not say it."""
    return next((value for value in spelled(config, quantity).values() if type(value) is int), None)


def setting(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, with dots for one inside another; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def sizes_of(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the size of every axis that the config gives. Raises CheckpointError for what is no positive number."""
    sizes: dict[str, int] = {}
    text = text_config(config)
    for axis, keys in family.sizes.items():
        if key := next((key for key in keys if text.get(key) is not None), None):
            if text[key] == 0 and axis in ("shared", "shared_ffn"):  # no expert that every token takes
                continue
            if type(text[key]) is not int or text[key] < 1:
                raise CheckpointError(
                    f"config.json says {key} = {text[key]!r}, not a positive number", hint=CONFIG_HINT
                )
            sizes[axis] = text[key]
    if "heads" in sizes and (implied := implied_kv_heads(family, text, sizes["heads"])) is not None:
        sizes["kv_heads"] = implied
    for axis, (factor, other) in family.default_sizes.items():
        if other in sizes:
            sizes.setdefault(axis, int(factor * sizes[other]))
    if family.is_partial:  # it does not speak of heads, or of all it has
        sizes = {"heads": 1, "kv_heads": 1, "hidden": 1, "ffn": 1} | sizes
        sizes = {"head_dim": max(1, sizes["hidden"] // sizes["heads"])} | sizes
    for axis in ("hidden", "heads", "vocab", "ffn"):
        if axis not in sizes and (axis in family.sizes or not family.is_partial):
            raise CheckpointError(f"config.json does not say {family.sizes[axis][0]}", hint=CONFIG_HINT)
    hidden, heads, kv_heads = sizes["hidden"], sizes["heads"], sizes["kv_heads"]
    if heads % kv_heads and not family.is_partial:
        raise CheckpointError(
            f"config.json says {heads} attention heads, not a multiple of {kv_heads} key-value heads", hint=CONFIG_HINT
        )
    if "head_dim" not in sizes and hidden % heads:
        raise CheckpointError(
            f"config.json says hidden size {hidden}, not a multiple of {heads} attention heads", hint=CONFIG_HINT
        )
    sizes = {"head_dim": hidden // heads} | sizes | {"group": max(1, heads // kv_heads)}
    return sizes | {axis: sizes.get(axis, sizes["head_dim"]) for axis in ("q_dim", "k_dim", "v_dim")}


def implied_kv_heads(family: Family, text: Mapping[str, Any], heads: int) -> int | None:
    """Return the number of key-value heads where no key of the config holds it, None where one does."""
    if family.is_partial or "kv_heads" not in {*family.sizes, *family.default_sizes}:
        return None
    flag = family.kv_heads_flag
    if "kv_heads" in family.sizes and (flag is True or (flag and text.get(flag))):
        return None
    return 1 if family.multi_query_flag and text.get(family.multi_query_flag) is not False else heads


def is_off(config: Mapping[str, Any], flag: str | None) -> bool:
    """Return whether a config turns a flag off outright; False for a family that has no such flag (None)."""
    return flag is not None and config.get(flag) is False


def layer_count(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    """Return the number of layers under the first of `keys` that the config has.

    Raises CheckpointError when it is no positive number.
    """
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is None:  # transformers 5 saves only the kinds of Nemotron-H's layers
        kinds = (config.get(key) for key in ("layers_block_type", "layer_types"))
        return next((len(value) for value in kinds if isinstance(value, list) and value), None)
    count = config[key]
    if type(count) is not int or count < 1:
        raise CheckpointError(f"config.json says {key} = {count!r}; a model has at least one layer", hint=CONFIG_HINT)
    return count


def check_layer_keys(text: Mapping[str, Any], depth: int) -> None:
    """Raises CheckpointError where a key about layers has a value that makes no sense for `depth` of them."""

    def refuse(key: str) -> NoReturn:
        raise CheckpointError(f"config.json says {key} = {text[key]!r}, which makes no sense", hint=CONFIG_HINT)

    for key in ("layer_types", "mlp_layer_types", "attention_layers"):
        value = text.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(kind, str) for kind in value)):
            refuse(key)
    if not isinstance(text.get("tie_word_embeddings"), bool | None):
        refuse("tie_word_embeddings")
    per_layer = text.get("per_layer_config")
    if isinstance(per_layer, Mapping):
        if not all(key.isascii() and key.isdigit() for key in per_layer):
            refuse("per_layer_config")
        _check_skipped(per_layer)
    for rule in RULES.get(str(text.get("model_type")), ()):
        if rule.explicit is None or not text.get(rule.explicit):
            kinds_by(rule, text, depth)


def _check_skipped(per_layer: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a layer is to lack a half, and the installed transformers builds it all the same.

    It would fill the half with random numbers, and say so in a table of missing keys.
    """
    entries = ((layer, entry.get("skip")) for layer, entry in per_layer.items() if isinstance(entry, Mapping))
    skipped = next((pair for pair in entries if pair[1]), None)
    if skipped is not None and not _builds_without_halves():
        raise CheckpointError(
            f"config.json says that layer {skipped[0]} skips {skipped[1]!r} (per_layer_config), and no transformers is "
            "here that builds a layer without it",
            hint=f"Install a transformers that has {_MODELING_SPECS} in transformers.integrations.heterogeneity.",
        )


_MODELING_SPECS = "get_heterogeneous_modeling_spec"


def _builds_without_halves() -> bool:
    """Return whether the installed transformers has specs of layers without a half. It is not imported."""
    found = find_spec("transformers")
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    files = (place / "integrations/heterogeneity" / "__init__.py" for place in places)
    return any(_MODELING_SPECS in file.read_text(encoding="utf-8") for file in files if file.is_file())


def layer_kinds(config: Mapping[str, Any], depth: int) -> list[str] | None:
    """Return each layer's attention kind ("full_attention", "sliding_attention", ...), None where all are alike."""
    text = text_config(config)
    kinds = text.get("layer_types") or text.get("attention_layers")
    if kinds is None:
        rules = RULES.get(str(text.get("model_type")), ())
        rule = next((rule for rule in rules if rule.explicit == "layer_types" or "attention_types" in rule.keys), None)
        kinds = kinds_by(rule, text, depth) if rule else None
    named = [kind for kind in kinds if isinstance(kind, str)] if isinstance(kinds, Sequence) else []
    return named if len(named) == depth and len(kinds or ()) == depth else None


def attention_kinds(config: Mapping[str, Any], depth: int) -> list[str]:
    """Return each layer's attention kind; where all are alike, whether they slide is up to the window."""
    text = text_config(config)
    slides = size_of(text, "window") and text.get("use_sliding_window") is not False
    return layer_kinds(text, depth) or ["sliding_attention" if slides else "full_attention"] * depth


def kinds_by(rule: Rule, text: Mapping[str, Any], depth: int) -> list[object]:
    """Return each layer's kind by a rule. Raises CheckpointError when the keys of the rule make no sense."""
    try:
        kinds = list(rule.kinds(text, depth))
    except (TypeError, ValueError, LookupError, ArithmeticError):
        kinds = []
    if len(kinds) != depth:
        values = ", ".join(f"{key} = {text.get(key)!r}" for key in rule.keys)
        raise CheckpointError(f"config.json says {values}, which does not fit {depth} layers", hint=CONFIG_HINT)
    return kinds


def declared_kinds(text: Mapping[str, Any], depth: int, half: Half | None = None) -> list[tuple[object, ...]]:
    """Return everything that the config says of each layer, comparable: two layers with equal kinds are built alike.

    With `half` what it says of the other half alone is left out.
    """

    def is_of_other(*keys: str) -> bool:
        return half is not None and half_of_keys(keys) not in (half, None)

    own = text.get("per_layer_config")
    own = own if isinstance(own, Mapping) else {}
    by_number = {
        int(number): repr({key: inner for key, inner in value.items() if not is_of_other(key)})
        if isinstance(value, Mapping)
        else repr(value)
        for number, value in own.items()
    }
    by_key: list[Sequence[object]] = [[by_number.get(i) for i in range(depth)]]
    for key, value in text.items():
        if is_of_other(key):
            continue
        if key in LAYER_LISTS and isinstance(value, list) and len(value) == depth:
            by_key.append([repr(item) for item in value])
        elif key in INDEX_LISTS and isinstance(value, list):
            by_key.append([i in value for i in range(depth)])
        elif key in LAYER_REFERENCES and isinstance(value, list) and len(value) == depth:
            by_key.append([value[i] == i for i in range(depth)])
    rules = (rule for rule in RULES.get(str(text.get("model_type")), ()) if not text.get(rule.explicit or ""))
    by_key += [kinds_by(rule, text, depth) for rule in rules if not is_of_other(*rule.speaks_by)]
    return [tuple(kinds[i] for kinds in by_key) for i in range(depth)]


def period_of(config: Mapping[str, Any], depth: int) -> int:
    """Return after how many layers the kinds of layers repeat: 1 where all are alike, `depth` where they never do."""
    kinds = declared_kinds(text_config(config), depth)
    return next(period for period in range(1, depth + 1) if all(kinds[i] == kinds[i % period] for i in range(depth)))


def runtime_notes(config: Mapping[str, Any], depth: int) -> dict[str, str]:
    """Return what other runtimes would compute differently, or not load, by a name for each kind of it.

    They derive it from other sizes or from a layer's number.
    """
    text = text_config(config)
    notes: dict[str, str] = {}
    hidden, heads, head_dim, ffn = (size_of(text, quantity) for quantity in ("hidden", "heads", "head_dim", "ffn"))
    if text.get("model_type") in SQUARE_HEADS and hidden and heads and head_dim and heads * head_dim != hidden:
        notes["llama.cpp heads"] = (
            f"llama.cpp does not load a {text['model_type']} with {heads} heads of {head_dim} on a hidden size of "
            f"{hidden}: it takes a head's size to be hidden / heads"
        )
    if text.get("model_type") == "gpt2" and hidden and ffn and ffn != 4 * hidden:
        notes["llama.cpp mlp"] = f"llama.cpp does not load a gpt2 with an MLP of {ffn}: it takes it to be 4 x {hidden}"
    for pattern in RUNTIME_PATTERNS.get(str(text.get("model_type")), ()):
        if pattern.of == "window":
            is_odd_one = [kind in FULL_ATTENTION for kind in layer_kinds(text, depth) or ()]
        else:
            is_odd_one = [not has_rope for has_rope in text.get("no_rope_layers") or kinds_by(NO_ROPE, text, depth)]
        if wrong := [i for i, odd in enumerate(is_odd_one) if odd != pattern.is_odd_one(i)]:
            what = "attends to everything" if pattern.of == "window" else "has no rotary positions"
            notes[f"{pattern.runtime} {pattern.of}"] = (
                f"{pattern.runtime} counts layers: one in {pattern.period} of a {text['model_type']} {what}, whatever "
                f"config.json says. It would compute layers {ranges(wrong)} wrongly; transformers does not"
            )
    return notes


def positions_of(source: Source) -> int | None:
    """Return how many tokens the model can see, None where its config does not say."""
    return positions_in(source.config)


def positions_in(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model with this config can see; None where it does not say, or they are relative."""
    text = text_config(config)
    if "relative_attention_num_buckets" in text:  # T5's n_positions is how long its texts were, and no limit
        return None
    return size_of(text, "positions")


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def vocabulary_key(config: Mapping[str, Any]) -> str:
    """Return the key under which a config holds the size of its vocabulary, or would."""
    return next(iter(spelled(config, "vocab")), SPELLINGS["vocab"][0])


def with_vocabulary(config: Mapping[str, Any], size: int, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Return a config with another number of tokens, and with these special ones."""
    return with_text(config, {vocabulary_key(config): size, **ids})


def check_vocabulary(config: Mapping[str, Any], stored: Mapping[str, int]) -> None:
    """Raises CheckpointError where all tensors have one number of tokens, by their names, and the config another."""
    text, sizes = text_config(config), set(stored.values())
    key, known = vocabulary_key(text), size_of(text, "vocab")
    if len(sizes) == 1 and known not in sizes:
        raise CheckpointError(
            f"config.json says {key} = {known}, and {next(iter(stored))!r} has {min(sizes)}",
            hint=f'Set "{key}": {min(sizes)} in config.json; the tokenizer may have fewer tokens than that.',
        )
