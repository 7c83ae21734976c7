"""What transformers would save of a new model: its config, and the names and shapes of its tensors. No numbers."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from surgeon.anatomy.config import class_names, model_type
from surgeon.checkpoint.header import TensorSpec
from surgeon.errors import PlanError
from surgeon.models.loading import from_config, libraries_fail, parsed_config, quiet_transformers
from surgeon.plan.plan import STORED_DTYPES

FITTING = "Set values that fit one another, such as --set n_embd=96 --set n_head=4."
_HEADS = {  # the ends of classes that can be named in a config, and the Auto class of each
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "Model": "AutoModel",
}


def known_keys(raw: Mapping[str, Any], label: str) -> tuple[set[str], dict[str, str]]:
    """Return the keys that a config of this type may have, and the type's own name of each key that has another."""
    parsed = parsed_config(raw, f"the config of {label}", hint=FITTING)
    aliases = dict(type(parsed).attribute_map)
    return {*raw, *parsed.to_dict(), *aliases}, aliases


def completed(raw: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return a config with its type's defaults, as transformers saves it. Raises MeasureError for a wrong value."""
    written: dict[str, Any] = json.loads(
        parsed_config(raw, f"the config of {label}", hint=FITTING).to_json_string(use_diff=True)
    )
    return written


def described(raw: Mapping[str, Any], label: str) -> tuple[str, dict[str, TensorSpec]]:
    """Return the class of transformers that a config describes, and the tensors that it would save, in its dtype.

    Raises MeasureError for a config that transformers refuses, PlanError for a dtype that no surgery writes.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in STORED_DTYPES:
        raise PlanError(f"the config says dtype {dtype!r}", hint=f"One of: {', '.join(STORED_DTYPES)}.")
    config = parsed_config(raw, f"the config of {label}", hint=FITTING)
    with libraries_fail(f"transformers cannot build {label}", hint=FITTING), quiet_transformers(), torch.device("meta"):
        model = from_config(_auto_class(raw), config, dtype=torch.float32)
        state = model.state_dict()
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        state = remove_tied_weights_from_state_dict(state, model)
        state = revert_weight_conversion(model, state)
    code = STORED_DTYPES[dtype]
    return type(model).__name__, {
        name: TensorSpec(code if tensor.is_floating_point() else "I64", tuple(tensor.shape))  # counters, and the like
        for name, tensor in state.items()
    }


def _auto_class(raw: Mapping[str, Any]) -> Any:
    """Return the Auto class of a config: that of the class it names, else of a model that predicts tokens."""
    import transformers
    from transformers.models.auto import modeling_auto as known

    for name in class_names(raw):
        if (auto := next((auto for end, auto in _HEADS.items() if name.endswith(end)), None)) is not None:
            return getattr(transformers, auto)
    kind = model_type(raw)
    writes = (known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "AutoModelForSeq2SeqLM")
    masked = (known.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "AutoModelForMaskedLM")
    causal = (known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM")
    names = next((auto for mapping, auto in (writes, masked, causal) if kind in mapping), "AutoModel")
    return getattr(transformers, names)
