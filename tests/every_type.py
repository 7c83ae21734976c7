"""A tiny checkpoint of every model type that the installed transformers has, made from its own defaults.

`toys.py` has the families whose tables are tested axis by axis, with sizes chosen by hand. Here a type needs no entry:
its config class gives the defaults, the known sizes in them become small, nested configs included, and what a type
needs beyond that stands in `NEEDS`. Layers differ in kind where the type's defaults have kinds, sizes are distinct
where the type allows it, and every stored number is random.

The tables need no torch: the functions import it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toys

from surgeon.anatomy.layer_rules import LAYER_LISTS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Config = dict[str, Any]

DEPTH = 6
MOST_PARAMETERS = 20_000_000
TOWER_DEPTH = 3  # of a vision or audio tower beside the language model

# The auto classes in the order in which a type is looked up; the first that has it builds the toy.
KINDS: Mapping[str, str] = {
    "image-text": "AutoModelForImageTextToText",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked": "AutoModelForMaskedLM",
    "causal": "AutoModelForCausalLM",
    "multimodal": "AutoModelForMultimodalLM",
    "headless": "AutoModel",
}

# What a key of a config becomes. Several spellings of one size get the same number.
SIZES: Mapping[int, tuple[str, ...]] = {
    131: ("vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size", "unpadded_vocab_size",
          "vocab_size_per_layer_input", "padded_vocab_size", "output_vocab_size"),
    128: ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "d_embed", "decoder_hidden_size",
          "hidden_dim", "out_hidden_size", "text_hidden_size", "encoder_hidden_size", "embedding_size",
          "cross_attention_hidden_size", "output_hidden_size", "word_embed_proj_dim"),
    56: ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "d_inner", "ffn_size", "mlp_dim"),
    72: ("encoder_ffn_dim", "intermediate_size_mlp", "shared_intermediate_size", "dense_intermediate_size"),
    88: ("decoder_ffn_dim",),
    24: ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_ffn_size"),
    40: ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size",
         "share_expert_dim"),
    8: ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads",
        "num_encoder_attention_heads", "swa_num_attention_heads", "num_sliding_attention_heads", "linear_num_heads"),
    4: ("decoder_attention_heads", "num_decoder_attention_heads", "linear_num_value_heads", "n_group", "n_groups"),
    2: ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "swa_num_key_value_heads",
        "linear_num_key_heads", "topk_group", "num_query_groups"),
    16: ("head_dim", "d_kv", "swa_head_dim", "v_head_dim", "dim_head", "qk_nope_head_dim", "attention_head_size",
         "kv_channels", "swa_v_head_dim", "d_head", "linear_head_dim"),
    6: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
        "num_encoder_layers", "num_decoder_layers"),
    96: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions",
         "max_target_positions", "original_max_position_embeddings", "model_max_length", "context_length"),
    5: ("sliding_window", "window_size", "sliding_window_size", "local_attention", "attention_window_size"),
    12: ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "ffn_num_experts"),
    3: ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k"),
    20: ("q_lora_rank", "query_pre_attn_scalar"),
    28: ("kv_lora_rank",),
    10: ("qk_rope_head_dim",),
}  # fmt: skip
SMALL: Mapping[str, int] = {key: size for size, keys in SIZES.items() for key in keys}

# Lists and counts that the small depth makes wrong; without them the class derives what it does by default.
DERIVED = LAYER_LISTS | {
    "moe_layers", "full_attn_idxs", "cross_attention_layers", "attention_types", "hybrid_layer_ids",
    "activation_sparsity_pattern", "hybrid_override_pattern", "num_attention_heads_per_layer", "layers_block_type",
    "rope_scaling_layers", "qk_head_dim", "kv_source_layers", "layer_rope_theta", "per_layer_config",
    "stage_names", "out_features", "out_indices",
}  # fmt: skip

_MAMBA: Config = {"mamba_n_heads": 16, "mamba_d_head": 16, "mamba_d_state": 18, "mamba_chunk_size": 8}
_OWN_HEAD_DIM: Config = {"head_dim": 16}
_NOTE: Config = {
    "per_layer_config": {str(i): {"num_attention_heads": 4, "num_key_value_heads": 4} for i in (2, 3, 4)},
    "index_topk": 7,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 26,
    "mlp_layer_types": ["dense"] + ["sparse"] * 5,
}
_GEMMA4: Config = {
    "hidden_size_per_layer_input": 14,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
_GEMMA3N: Config = {
    "intermediate_size": 56,
    "hidden_size_per_layer_input": 14,
    "laurel_rank": 18,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
}
_QWEN4: Config = {
    "linear_key_head_dim": 18,
    "linear_value_head_dim": 20,
    "ple_embed_dim": 32,
    "hc_lowrank": 22,
    "ngram_vocab_size_base": 200,
    "split_ngram_parts": 4,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_MROPE: Config = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_HALF_MROPE: Config = {"rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}
_COMPASS: Config = {"rope_parameters": {"full_attention": _MROPE["rope_parameters"]}}
_DELTA: Config = {"linear_key_head_dim": 18, "linear_value_head_dim": 20}

# What a type needs beside the small sizes: deep changes of its config ("text_config": {...} reaches inside).
NEEDS: Mapping[str, Config] = {
    "bailing_hybrid": {"num_expert_group": 1, "topk_group": 1, "layer_group_size": 3},
    "bamba": _MAMBA | {"attn_layer_indices": [2, 5]},
    "cohere_compass": {"text_config": _COMPASS},
    "cohere_compass_text": _COMPASS,
    "cosmos3_edge": {"text_config": _MROPE},
    "encoder-decoder": {"": {}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "esm": {"vocab_size": 131, "pad_token_id": 0, "mask_token_id": 100},
    "esmc": {"num_key_value_heads": 8},
    "glm4v_text": _HALF_MROPE,
    "glm4v_moe_text": _HALF_MROPE,
    "glm_ocr_text": _HALF_MROPE,
    "glm_image_text": _HALF_MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "paddleocr_vl_text": _MROPE,
    "hunyuan_vl_text": _OWN_HEAD_DIM,
    "glm46v": {"text_config": _HALF_MROPE},
    "glm4v": {"text_config": _HALF_MROPE},
    "glm4v_moe": {"text_config": {"rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}},
    "glm_ocr": {"text_config": _HALF_MROPE},
    "glmga": {"text_config": _HALF_MROPE},
    "hunyuan_vl": {"text_config": _OWN_HEAD_DIM},
    "paddleocr_vl": {"text_config": _MROPE},
    "qwen2_vl": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_5_omni_thinker": {"text_config": _MROPE},
    "mistral4": {"text_config": {"qk_rope_head_dim": 16, "head_dim": 16}},
    "longcat_flash": {"head_dim": 10, "zero_expert_num": 2},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 101, "<image>": 102},
             "vq_config": {"base_channels": 32, "codebook_size": 40, "hidden_size": 32}},
    "chameleon": {"vocabulary_map": {"<image>": 102}, "vq_config": {"base_channels": 32}},
    "muse_spark": {"vision_config": {"num_hidden_layers": 4}},
    "granite4_vision": {"downsample_rate": "1/2"},
    "codegen": {"rotary_dim": 4},
    "cpmant": {"position_bias_num_buckets": 32, "prompt_length": 4},
    "ctrl": {"dff": 56},
    "dbrx": {"attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 128}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 3, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 2},
    "dots3_note": {"text_config": _NOTE, "vision_config": {"num_hidden_layers": 42}},
    "dots3_note_text": _NOTE,
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 256},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "attention_layers": ["global", "local"] * 3,
                "intermediate_size": 56},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": _OWN_HEAD_DIM,
    "hunyuan_v1_moe": _OWN_HEAD_DIM,
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 16, "state_size": 18, "n_groups": 2, "chunk_size": 8, "time_step_rank": 8},
    "mamba": {"intermediate_size": 256},
    "ministral": _OWN_HEAD_DIM,
    "musicgen": {"": {}},
    "musicgen_melody": {"": {}},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"],
                   "mamba_num_heads": 16, "mamba_head_dim": 16, "ssm_state_size": 18, "chunk_size": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "paligemma": {"vision_config": {"projection_dim": 128}, "projection_dim": 128},
    "qwen3_5": {"text_config": _DELTA},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe": {"text_config": _DELTA},
    "qwen3_5_moe_text": _DELTA,
    "qwen3_next": _DELTA,
    "olmo_hybrid": _DELTA,
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "image_size": 56, "crop_size": 56, "patch_size": 14},
        "audio_config": {
            "hidden_size": 32, "num_blocks": 2, "ext_pw_out_channel": 32, "nemo_conv_channels": 16,
            "depthwise_separable_out_channel": 32, "num_attention_heads": 4, "input_size": 16, "nemo_final_size": 2,
        },
    },
    "recurrent_gemma": {"lru_width": 128},
    "reformer": {"is_decoder": False, "hash_seed": 0, "axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 3,
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "feed_forward_size": 56, "num_buckets": 2},
    "roc_bert": {"pronunciation_vocab_size": 40, "shape_vocab_size": 44, "pronunciation_embed_dim": 24,
                 "shape_embed_dim": 26},
    "rwkv": {"attention_hidden_size": 128},
    "xlstm": {"num_blocks": 6, "embedding_dim": 128, "chunk_size": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 256, "attention_head_dim": 32, "num_key_value_heads": 8, "mamba_dt_rank": 8,
              "attn_layer_period": 3, "attn_layer_offset": 2,
              "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2, "num_key_value_heads": 8,
               "attention_hidden_size": 256, "attention_head_dim": 32, "mamba_headdim": 32, "kv_channels": 16,
               "num_query_groups": 8, "n_mamba_heads": 8, "adapter_rank": 10, "chunk_size": 8,
               "hybrid_layer_ids": [2, 5]},
    "blt": {
        **{f"{part}_config": {"hidden_size": 64, "hidden_size_global": 128, "intermediate_size": 48,
                              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
                              "head_dim": 16}
           for part in ("encoder", "decoder", "patcher")},
        "global_config": {"hidden_size": 128, "intermediate_size": 56, "num_attention_heads": 8, "num_hidden_layers": 6,
                          "num_key_value_heads": 8},
        "encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4],
    },
}  # fmt: skip


def kind_of(model_type: str) -> str | None:
    """Return under which of KINDS a type is built; None for one that no auto class of models has."""
    import transformers.models.auto.modeling_auto as auto

    names = ("IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM", "MULTIMODAL_LM")
    tables = [getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in names] + [auto.MODEL_MAPPING_NAMES]
    return next((kind for kind, table in zip(KINDS, tables, strict=True) if model_type in table), None)


def every_type(*kinds: str) -> list[str]:
    """Return every model type of the installed transformers that is built under one of these kinds; none: under any."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return [name for name in CONFIG_MAPPING_NAMES if kind_of(name) in (kinds or KINDS)]


def shrunk(config: Mapping[str, Any], *, depth: int = DEPTH) -> Config:
    """Return a config's values with the known sizes made small; `depth` is the number of layers."""
    small: Config = {}
    special = 100  # tokens of images, sounds and borders: below the vocabulary, above what a test reads
    for key, value in config.items():
        if key in DERIVED or key in ("transformers_version", "architectures", "dtype"):
            continue
        if isinstance(value, Mapping):
            nested = key.endswith("_config") or "model_type" in value  # T5Gemma calls its configs encoder and decoder
            tower = (
                nested
                and key not in ("encoder", "decoder")
                and not any(word in key for word in ("text", "llm", "language", "thinker"))
            )
            small[key] = shrunk(value, depth=TOWER_DEPTH if tower else depth) if nested else value
        elif key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            small[key] = None if value is None else ("pad", "bos", "eos", "decoder").index(key.partition("_")[0]) % 3
        elif key.endswith(("_token_id", "_token_index", "_id", "_index")) and type(value) is int and value > 30:
            small[key] = special
            special += 1
        elif key in SMALL and type(value) is int and value > 1:
            small[key] = depth if SMALL[key] == DEPTH else SMALL[key]
        else:
            small[key] = value
    if small.get("kv_lora_rank") and "num_key_value_heads" in small:  # latent attention has one key for each query
        small["num_key_value_heads"] = small["num_attention_heads"]
        small.pop("head_dim", None)
    return small


def merged(config: Mapping[str, Any], needs: Mapping[str, Any]) -> Config:
    """Return a config with deep changes made to it."""
    result = dict(config)
    for key, value in needs.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return result


def small_config(model_type: str, **overrides: Any) -> Any:
    """Return the config of a type's toy."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    values = shrunk(kind().to_dict()) if "" not in NEEDS.get(model_type, {}) else {}
    values = merged(values, NEEDS.get(model_type, {})) | overrides
    values.pop("model_type", None)
    values.pop("", None)
    return kind(**values)


def build(model_type: str, directory: Path, *, seed: int = 0, published: bool = False, **overrides: Any) -> Path:
    """Return `directory`, now holding the toy of a type in float32, its config changed by `overrides`.

    `published` leaves out of config.json the lists of layers that the type's code derives from its other values, as
    checkpoints do that were published before transformers 5.
    """
    import torch
    import transformers

    kind = kind_of(model_type)
    assert kind is not None, model_type
    config = small_config(model_type, **overrides)
    auto_class = getattr(transformers, KINDS[kind])
    with torch.device("meta"):
        size = auto_class.from_config(config).num_parameters()
    if size > MOST_PARAMETERS:
        raise ValueError(f"the toy would have {size:,} parameters: a size in its config is not known to be one")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32)
        toys._randomise(model)
    model.save_pretrained(directory)
    if published:
        _leave_out_what_is_derived(directory / "config.json")
    return directory


def _leave_out_what_is_derived(path: Path) -> None:
    """Remove from a config.json each list of layers that the type's class makes again when it is absent."""

    def without(values: Config, key: str) -> Config:
        return {
            name: without(value, key) if isinstance(value, dict) and name.endswith("_config") else value
            for name, value in values.items()
            if name != key
        }

    saved = json.loads(path.read_text())
    full = _rebuilt(saved)
    for key in sorted(DERIVED):
        shorter = without(saved, key)
        if shorter != saved and _rebuilt(shorter) == full:
            saved = shorter
    path.write_text(json.dumps(saved, indent=2))


def _rebuilt(values: Config) -> Config | None:
    from transformers import AutoConfig

    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(values))
            return AutoConfig.from_pretrained(folder).to_dict() | {"_name_or_path": None}
    except (AttributeError, KeyError, TypeError, ValueError):  # the class needs what was left out
        return None


def load(directory: Path, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model in `directory`, ready for inference, and what transformers says about loading it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    kind = kind_of(json.loads((directory / "config.json").read_text())["model_type"])
    assert kind is not None
    auto_class = getattr(transformers, KINDS[kind])
    options = {"config": config, "experts_implementation": "eager"} | kwargs
    model, report = auto_class.from_pretrained(directory, output_loading_info=True, **options)
    return model.eval(), report


def inputs(model: PreTrainedModel, *, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Return the arguments of a forward pass, the same for every model that reads the same kind of input.

    Token ids avoid the special tokens and stay below 100; images and sounds are noise.
    """
    import torch

    config, random = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.randn(1, getattr(vision, "num_channels", 3), height, width, generator=random)}
    names = ["input_ids", "decoder_input_ids"] if config.is_encoder_decoder else ["input_ids"]
    return {name: torch.randint(3, 100, (batch, length), generator=random) for name in names}


def logits(model: PreTrainedModel, **kwargs: Any) -> Tensor:
    """Return the logits of `model` on `inputs(model)`, or the last hidden states of one without a head."""
    import torch

    if "use_cache" in signature(model.forward).parameters:
        kwargs.setdefault("use_cache", False)
    model.config.get_text_config().use_cache = False  # or a hybrid cut below its attention asks its cache for a length
    given = {
        name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs(model).items()
    }
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # ViT-MAE hides patches at random
        output = model(**given, **kwargs)
    found = next(output[key] for key in ("logits", "prediction_logits", "last_hidden_state") if key in output)
    return torch.cat([part.flatten(1) for part in found], 1) if isinstance(found, tuple) else found  # three heads


def add_tokenizer(directory: Path) -> None:
    """Give a toy a tokenizer for which the word "w5" is token 8."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(97))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
