"""The stacks of a model: which tensors lie in numbered layers, and how many layers there are."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from surgeon.anatomy.config import layer_count, nested_stacks, text_config
from surgeon.anatomy.layer_rules import COUNT_KEYS, DECODER_COUNT_KEYS, ENCODER_COUNT_KEYS
from surgeon.errors import CheckpointError

_NUMBERED = re.compile(r"((?:.*?\.)??)(0|[1-9][0-9]{0,5})\.")  # the prefix up to the first number, and that number
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
_ODD = re.compile(r"(?:\A|\.)(?:0[0-9]|[0-9]{7})")  # begins what may be a number, and none of a layer
# Stacks beside the language model's own, and the language model's where others have its depth.
TOWERS = re.compile(
    r"vision|visual|image|video|audio|speech|mtp|qformer|connector|projector|deepstack|resampler|vit\.|vqmodel|cross_attn"
)
_LANGUAGE = re.compile(r"language_model|text_model")

PREDICTORS = "num_nextn_predict_layers"  # of DeepSeek-V3 and GLM-4.5: layers that predict further tokens (MTP)
UNKNOWN_HINT = (
    "The checkpoint may well be sound, in a form that surgeon does not know: docs/models.md has those it knows."
)
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
        number, dot, rest = name[len(self.prefix) :].partition(".")
        layer = _layer_number(number) if dot else None
        return None if layer is None or layer >= self.depth else (layer, rest)

    def is_beyond(self, name: str) -> bool:
        """Return whether a tensor is one of a layer that follows the stack's own under the next numbers."""
        if not name.startswith(self.prefix):
            return False
        layer = _layer_number(name[len(self.prefix) :].partition(".")[0])
        return layer is not None and layer >= self.depth

    def name(self, layer: int, rest: str) -> str:
        """Return the full name of tensor `rest` of `layer`."""
        return f"{self.prefix}{layer}.{rest}"


@lru_cache(maxsize=4096)  # many thousand tensors may have one of these
def _layer_number(text: str) -> int | None:
    return int(text) if _NUMBER.fullmatch(text) else None


def _odd_number(name: str) -> str | None:
    return next((word for word in name.split(".") if word.isdigit() and not _NUMBER.fullmatch(word)), None)


def find_stacks(config: Mapping[str, Any], names: Iterable[str]) -> tuple[Stack, ...]:
    """Return the model's stack of layers; of an encoder-decoder the decoder's, then the encoder's.

    Raises CheckpointError when the names do not show the number of layers that the config gives.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        if (_ODD.search(name) or not name.isascii()) and (odd := _odd_number(name)):
            raise CheckpointError(f"{name[:200]!r} holds {odd[:20]!r}, which is no layer's number", hint=FILES_HINT)
        if match := _NUMBERED.match(name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    text = text_config(config)
    parts = nested_stacks(config)
    if not parts and not text.get("is_encoder_decoder"):
        is_alone = all("decoder." in prefix for prefix, layers in numbers.items() if len(layers) > 1)
        depth = layer_count(text, DECODER_COUNT_KEYS) if is_alone else None  # an encoder-decoder's, saved by itself
        following = text.get(PREDICTORS)
        extra = following if type(following) is int else 0
        return (_pick_stack(numbers, depth or layer_count(text, COUNT_KEYS), extra, nested=text is not config),)
    if parts:
        decoder_depth, depth = (layer_count(text_config(config[part]), COUNT_KEYS) for part in parts)
    else:
        depth = layer_count(text, ENCODER_COUNT_KEYS)
        decoder_depth = layer_count(text, DECODER_COUNT_KEYS) or depth  # T5: absent means as many
    decoders = {prefix: layers for prefix, layers in numbers.items() if "decoder" in prefix}
    encoders = {prefix: layers for prefix, layers in numbers.items() if "encoder" in prefix and prefix not in decoders}
    return _pick_stack(decoders, decoder_depth), _pick_stack(encoders, depth)


def _pick_stack(numbers: Mapping[str, set[int]], depth: int | None, extra: int = 0, *, nested: bool = False) -> Stack:
    """Return the one stack with `depth` layers, which `extra` others may follow; `nested`: of a model around it.

    Raises CheckpointError when there is none, or more than one.
    """
    if depth is None:
        raise CheckpointError("config.json does not say how many layers the model has", hint=UNKNOWN_HINT)
    depths = (depth, depth + extra)
    fitting = [prefix for prefix, layers in numbers.items() if len(layers) == max(layers) + 1 in depths]
    if len(fitting) > 1:
        fitting = [prefix for prefix in fitting if not TOWERS.search(prefix)] or fitting
    if len(fitting) > 1 and nested:
        fitting = [prefix for prefix in fitting if _LANGUAGE.search(prefix)] or fitting
    if len(fitting) == 1:
        return Stack(fitting[0], depth)
    if fitting:
        raise CheckpointError(
            f"cannot tell which are the model's layers: {' or '.join(sorted(fitting))}", hint=UNKNOWN_HINT
        )
    if not numbers:
        raise CheckpointError("the checkpoint has no layers: no tensor's name holds a number", hint=UNKNOWN_HINT)
    prefix, layers = max(numbers.items(), key=lambda item: (not TOWERS.search(item[0]), len(item[1])))
    if (missing := next((i for i in range(max(layers)) if i not in layers), None)) is not None:
        raise CheckpointError(f"layer {missing} is missing: no tensor is called {prefix}{missing}.*", hint=FILES_HINT)
    raise CheckpointError(
        f"config.json says {depth} layers, but the files hold {len(layers)} ({prefix}0 to {prefix}{max(layers)})",
        hint="Config and weights do not belong together, or the model stores its layers in a form that is not known.",
    )
