"""Which model types equal a dense one except for experts in place of its MLP, and their names for things. Data only.

Read from the configuration and modeling files of transformers 5.23, as the tables of the families are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """How a dense model is written as one of `model_type`, in which the weights of a token's experts sum to 1.

    In the names of `tensors` "{}" stands for an expert's number. `sizes` says which config keys hold a size, by the
    names of the axes, and "experts_per_token". `config` is always written. `defaults` are the dense model's, where the
    other has different ones; they are written where the config does not say. `dropped` are keys that the other does not
    know, or would take for its own.
    """

    model_type: str
    class_name: str  # of the modeling code's classes, in front of ForCausalLM
    tensors: Mapping[str, str]  # a tensor of the dense MLP: what it is called in an expert
    sizes: Mapping[str, str]
    config: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    window_flag: str | None = None  # says for all layers at once whether they slide, where dense ones may differ


_SIZES = {"kv_heads": "num_key_value_heads", "head_dim": "head_dim", "experts_per_token": "num_experts_per_tok"}
_LOSS = {"output_router_logits": False, "router_aux_loss_coef": 0.001}

_LLAMA = ExpertForm(
    model_type="mixtral",
    class_name="Mixtral",
    tensors={
        "mlp.gate_proj.weight": "block_sparse_moe.experts.{}.w1.weight",
        "mlp.down_proj.weight": "block_sparse_moe.experts.{}.w2.weight",
        "mlp.up_proj.weight": "block_sparse_moe.experts.{}.w3.weight",
    },
    sizes=_SIZES | {"experts": "num_local_experts"},
    config=_LOSS | {"router_jitter_noise": 0.0},
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048},
    dropped=("attention_bias", "mlp_bias", "pretraining_tp", "sliding_window", "layer_types"),
)
_MISTRAL = ExpertForm(
    model_type="mixtral",
    class_name="Mixtral",
    tensors=_LLAMA.tensors,
    sizes=_LLAMA.sizes,
    config=_LLAMA.config,
    defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096},
)
_QWEN3 = ExpertForm(
    model_type="qwen3_moe",
    class_name="Qwen3Moe",
    tensors={
        "mlp.gate_proj.weight": "mlp.experts.{}.gate_proj.weight",
        "mlp.up_proj.weight": "mlp.experts.{}.up_proj.weight",
        "mlp.down_proj.weight": "mlp.experts.{}.down_proj.weight",
    },
    sizes=_SIZES | {"experts": "num_experts", "ffn": "moe_intermediate_size"},
    config=_LOSS | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    dropped=("layer_types", "max_window_layers"),
    window_flag="use_sliding_window",
)

EXPERT_FORMS: Mapping[str, ExpertForm] = {"llama": _LLAMA, "mistral": _MISTRAL, "qwen3": _QWEN3}
