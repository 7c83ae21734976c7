"""Whether the layers of a model allow gist tokens, by its config.json alone.

Gists need models in which a later token sees earlier ones through attention alone. A layer with a recurrent state, a
convolution or a summary carries the prompt past the mask; chunked attention moves its chunks when the prompt is gone.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from surgeon.anatomy.config import class_names, layer_kinds, spelled, text_config
from surgeon.anatomy.layer_rules import FULL_ATTENTION, SLIDING_ATTENTION

ENCODER_DECODERS = frozenset({"t5", "mt5"})  # relative positions, and an encoder that takes a mask of its own
# How classes that write end: only these have a head for the next token. "WithLMHead" is Reformer's and XLM's.
WRITERS = ("CausalLM", "LMHeadModel", "LMHead", "GenerationDecoder")
AROUND = "Generation"  # ends those of encoder-decoders, and of language models with towers around them
# Language models with towers that transformers loads as language models, and so runs on text alone.
LOADED_AS_WRITERS = frozenset(
    [
        "dots3_note",
        "emu3",
        "fuyu",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_unified",
        "gemma4_unified_assistant",
        "got_ocr2",
        "llama4",
        "mllama",
        "moss_transcribe_diarize",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen4_exp",
    ]
)
WHY = {
    "chunked_attention": "its chunks would lie elsewhere once the prompt is gone",
    "linear_attention": "the prompt would leak through their state",
    "conv": "the prompt would leak through their convolution",
    "hybrid": "the prompt would leak through their state",
    "hybrid_sliding": "the prompt would leak through their state",
    "mamba": "the prompt would leak through their state",
    "recurrent": "the prompt would leak through their state",
}
OTHERWISE = "they are neither full nor sliding attention, and what else they carry past a mask is not known"
# ALiBi that is counted from the first token and rounded there is another bias once the prompt is gone: only exact ALiBi
# is relative, as MPT's is in float32.
NO_MASK = {
    "bloom": "it builds ALiBi from a mask of the padding, and takes no other; in 16 bits it changes without the prompt",
    "falcon": "with ALiBi it takes a mask of the padding, and no other; in bfloat16 that changes without the prompt",
}


def refusal(config: Mapping[str, Any], depth: int) -> str | None:
    """Return why a model cannot have gist tokens, None where nothing in its config forbids them."""
    text = text_config(config)
    name = str(text.get("model_type") or config.get("model_type"))
    if config.get("is_encoder_decoder") and name not in ENCODER_DECODERS:
        return f"{name} is an encoder-decoder, of which only {' and '.join(sorted(ENCODER_DECODERS))} are supported"
    if any("MaskedLM" in name for name in class_names(config)):
        return f"{name} reads in both directions; gist tokens need a model that generates"
    if (reason := _of_class(config, str(config.get("model_type")))) is not None:
        return reason
    if name in NO_MASK and (name == "bloom" or text.get("alibi")):
        return f"{name} cannot be gisted: {NO_MASK[name]}"
    if (kinds := layer_kinds(text, depth)) is not None:
        return _of_kinds(kinds, name)
    if any(spelled(text, "attention_chunk").values()):
        return f"{name} has chunked attention: {WHY['chunked_attention']}"
    if states := spelled(text, "state"):
        key, value = next(iter(states.items()))
        return f"layers of {name} have a state ({key} = {value!r}), and the prompt would leak through it"
    return None


def _of_class(config: Mapping[str, Any], name: str) -> str | None:
    """Return why the class of a model does not do, None where it writes, or where the config names none."""
    names = class_names(config)
    if config.get("is_encoder_decoder") or name in LOADED_AS_WRITERS:
        return None
    if text_config(config) is not config or any(each.endswith(AROUND) for each in names):
        return (
            f"{name} has more than a language model, and transformers does not run that alone; gist tokens need it to"
        )
    if names and not any(each.endswith(WRITERS) for each in names):
        return f"{names[0]} has no language model head; gist tokens need a model that generates"
    return None


def _of_kinds(kinds: Sequence[str], name: str) -> str | None:
    wrong = [(i, kind) for i, kind in enumerate(kinds) if kind not in FULL_ATTENTION | SLIDING_ATTENTION]
    if not wrong:
        return None
    kind = wrong[0][1]
    layers = _ranges([i for i, other in wrong if other == kind])
    return f"layers {layers} of {name} are {kind}: {WHY.get(kind, OTHERWISE)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Return "0-2, 4-6" for numbers in ascending order."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
