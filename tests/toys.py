"""Tiny checkpoints of every model family, saved by transformers itself.

The sizes of a toy are pairwise distinct wherever its family allows it, so that a confusion of two axes is a shape
mismatch and never a coincidence. Its layers differ in kind wherever its family has kinds, and every stored number is
random, biases and gains included, so that no tensor can be lost without a trace in the logits.

A name is transformers' `model_type`, or `model_type-variant`.
The tables need no torch: the functions import it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

Config = dict[str, Any]

# One size per axis: layers 6, heads 8 = kv_heads 2 x group 4, head_dim 10, hidden 48, ffn 52, vocab 131, positions 64,
# experts 7 of which 3 are active, expert_ffn 28, shared_expert_ffn 36, window 5. Hidden is 80 = heads x head_dim where
# a family derives its head size; only there can hidden and the width of the queries be confused.
TOKENS: Config = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DERIVED_HEAD_DIM: Config = TOKENS | {
    "num_hidden_layers": 6,
    "hidden_size": 80,
    "intermediate_size": 52,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OWN_HEAD_DIM: Config = DERIVED_HEAD_DIM | {"hidden_size": 48, "head_dim": 10}
ONE_KV_PER_HEAD: Config = {key: value for key, value in DERIVED_HEAD_DIM.items() if key != "num_key_value_heads"}
GPT2_NAMES: Config = TOKENS | {"n_layer": 6, "n_embd": 80, "n_inner": 52, "n_head": 8, "n_positions": 64}

EXPERTS: Config = {"num_local_experts": 7, "num_experts_per_tok": 3}
LATENT: Config = {
    "hidden_size": 48,
    "num_key_value_heads": 8,
    "q_lora_rank": 26,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
QWEN_EXPERTS: Config = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 28,
    "norm_topk_prob": True,
}
PARTIAL_ROTARY: Config = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}
}
SLIDING_PATTERN: Config = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
SLIDING_FROM_LAYER_3: Config = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
GRANITE_SCALES: Config = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.5,
}
GEMMA: Config = OWN_HEAD_DIM | {"tie_word_embeddings": True}
GEMMA_SLIDING: Config = GEMMA | {"sliding_window": 5, "query_pre_attn_scalar": 13}
COHERE: Config = DERIVED_HEAD_DIM | {"logit_scale": 0.5, "tie_word_embeddings": True}
BERT: Config = ONE_KV_PER_HEAD | {"type_vocab_size": 3}
OPT: Config = TOKENS | {
    "num_hidden_layers": 6,
    "hidden_size": 80,
    "word_embed_proj_dim": 80,
    "ffn_dim": 52,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
GPT_NEOX: Config = ONE_KV_PER_HEAD | PARTIAL_ROTARY
FALCON: Config = TOKENS | {
    "num_hidden_layers": 6,
    "hidden_size": 80,
    "ffn_hidden_size": 52,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
T5: Config = TOKENS | {
    "num_layers": 6,
    "num_decoder_layers": 6,
    "d_model": 48,
    "d_ff": 52,
    "d_kv": 10,
    "num_heads": 8,
    "relative_attention_num_buckets": 14,
    "relative_attention_max_distance": 24,
    "decoder_start_token_id": 0,
}

TOYS: dict[str, Config] = {
    "gpt2": GPT2_NAMES,
    "gpt2-inverse-layer-idx": GPT2_NAMES | {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": GPT_NEOX,
    "gpt_neox-serial": GPT_NEOX | {"use_parallel_residual": False},
    "opt": OPT,
    "opt-post-norm": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 44},
    "llama": OWN_HEAD_DIM,
    "llama-tied": OWN_HEAD_DIM | {"tie_word_embeddings": True},
    "llama-biases": OWN_HEAD_DIM | {"attention_bias": True, "mlp_bias": True},
    "mistral": OWN_HEAD_DIM | {"sliding_window": 5},
    "qwen2": DERIVED_HEAD_DIM | SLIDING_FROM_LAYER_3,
    "qwen3": OWN_HEAD_DIM | SLIDING_FROM_LAYER_3,
    "gemma": GEMMA,
    "gemma2": GEMMA_SLIDING,
    "gemma3_text": GEMMA_SLIDING | SLIDING_PATTERN,
    "phi3": DERIVED_HEAD_DIM | {"sliding_window": 5},
    "phi3-partial-rotary": DERIVED_HEAD_DIM | PARTIAL_ROTARY,
    "olmo2": DERIVED_HEAD_DIM,
    "smollm3": DERIVED_HEAD_DIM | {"no_rope_layer_interval": 3},
    "granite": DERIVED_HEAD_DIM | GRANITE_SCALES,
    "cohere2": COHERE | SLIDING_PATTERN | {"hidden_size": 48, "head_dim": 10},
    "mixtral": OWN_HEAD_DIM | EXPERTS,
    "qwen3_moe": OWN_HEAD_DIM | QWEN_EXPERTS,
    "qwen3_moe-sparse-step": OWN_HEAD_DIM | QWEN_EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "gpt_oss": OWN_HEAD_DIM | EXPERTS | {"sliding_window": 5},
    "bloom": TOKENS | {"n_layer": 6, "hidden_size": 80, "n_head": 8},
    "falcon": FALCON,
    "falcon-new-decoder": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-alibi": FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    "starcoder2": DERIVED_HEAD_DIM | {"sliding_window": 5},
    "stablelm": DERIVED_HEAD_DIM | PARTIAL_ROTARY | {"use_qkv_bias": True},
    "stablelm-parallel": DERIVED_HEAD_DIM | PARTIAL_ROTARY | {"use_parallel_residual": True, "qk_layernorm": True},
    "phi": DERIVED_HEAD_DIM | PARTIAL_ROTARY,
    "exaone4": OWN_HEAD_DIM | SLIDING_PATTERN | {"sliding_window_pattern": 3},
    "gpt_neo": TOKENS
    | {
        "num_layers": 6,
        "hidden_size": 80,
        "intermediate_size": 52,
        "num_heads": 8,
        "max_position_embeddings": 64,
        "window_size": 5,
        "attention_types": [[["global", "local"], 3]],
    },
    "gptj": GPT2_NAMES | {"rotary_dim": 4},
    "codegen": GPT2_NAMES | {"rotary_dim": 4},
    "mpt": TOKENS | {"n_layers": 6, "d_model": 80, "n_heads": 8, "max_seq_len": 64},
    "cohere": COHERE,
    "cohere-qk-norm": COHERE | {"use_qk_norm": True},
    "olmo": DERIVED_HEAD_DIM,
    "olmo3": DERIVED_HEAD_DIM | SLIDING_PATTERN,
    "glm": OWN_HEAD_DIM | PARTIAL_ROTARY,
    "glm4": OWN_HEAD_DIM | PARTIAL_ROTARY,
    "qwen2_moe": DERIVED_HEAD_DIM | QWEN_EXPERTS | SLIDING_FROM_LAYER_3 | {"shared_expert_intermediate_size": 36},
    "deepseek_v3": ONE_KV_PER_HEAD
    | LATENT
    | {
        "n_routed_experts": 9,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 5,
        "moe_intermediate_size": 28,
        "n_shared_experts": 3,
        "first_k_dense_replace": 2,
    },
    "nemotron": OWN_HEAD_DIM | PARTIAL_ROTARY,
    "persimmon": ONE_KV_PER_HEAD | PARTIAL_ROTARY,
    "ministral": OWN_HEAD_DIM | SLIDING_PATTERN,
    "phimoe": OWN_HEAD_DIM | EXPERTS | {"attention_bias": True, "lm_head_bias": True},
    "granitemoe": DERIVED_HEAD_DIM | EXPERTS | GRANITE_SCALES,
    "helium": DERIVED_HEAD_DIM | {"head_dim": 10},
    "hunyuan_v1_dense": OWN_HEAD_DIM,
    "ernie4_5": OWN_HEAD_DIM,
    "seed_oss": OWN_HEAD_DIM,
    "arcee": OWN_HEAD_DIM,
    "lfm2": DERIVED_HEAD_DIM
    | {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "conv", "full_attention"] * 2},
    "t5": T5,
    # As T5 v1.1: transformers takes the False for "do not scale the decoder's output", and ties the head all the same.
    "t5-gated": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": TOKENS
    | {
        "encoder_layers": 6,
        "decoder_layers": 6,
        "d_model": 80,
        "encoder_ffn_dim": 52,
        "decoder_ffn_dim": 44,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "bert": BERT,
    "roberta": BERT | {"bos_token_id": 0, "pad_token_id": 1},
}

AUTO_CLASSES = {
    "t5": "AutoModelForSeq2SeqLM",
    "mt5": "AutoModelForSeq2SeqLM",
    "umt5": "AutoModelForSeq2SeqLM",
    **dict.fromkeys(("mbart", "blenderbot", "blenderbot-small", "pegasus", "marian"), "AutoModelForSeq2SeqLM"),
    **dict.fromkeys(("electra", "distilbert", "modernbert"), "AutoModelForMaskedLM"),
    "bart": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForMaskedLM",
    "roberta": "AutoModelForMaskedLM",
    "camembert": "AutoModelForMaskedLM",
    "xlm-roberta": "AutoModelForMaskedLM",
}
DECODERS = tuple(name for name in TOYS if name.partition("-")[0] not in AUTO_CLASSES)
# With a table that is tested on every operation. The other tables have the lighter tests of test_tables.py.
_THOROUGH = (
    *("cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "mistral"),
    *("mixtral", "olmo2", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"),
)
TABLED = tuple(name for name in TOYS if name.partition("-")[0] in _THOROUGH)


def build(name: str, directory: Path, *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Return `directory`, now holding the toy `name`, its config changed by `overrides`.

    The weights are a function of `seed` and of the config: those in bfloat16 are those in float32, rounded.
    """
    return save(name.partition("-")[0], TOYS[name] | overrides, directory, seed=seed, dtype=dtype)


def save(model_type: str, sizes: Config, directory: Path, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Return `directory`, now holding a model of this type and these sizes with random weights."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32)
        _randomise(model)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def unheard_of(name: str, directory: Path) -> Path:
    """Return `directory`, now holding the toy `name` as a model type that no table and no code knows."""
    import json

    config = json.loads((build(name, directory) / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    return directory


def load(directory: Path, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model in `directory`, ready for inference, and what transformers says about loading it.

    The report's `missing_keys`, `unexpected_keys` and `mismatched_keys` are empty for a faithful checkpoint. `kwargs`
    go to `from_pretrained`, as dtype=torch.float64 does.
    """
    from transformers import AutoConfig

    loader = auto_class(AutoConfig.from_pretrained(directory))
    options = {"experts_implementation": "eager"} | kwargs  # transformers' grouped_mm refuses float64
    model, report = loader.from_pretrained(directory, output_loading_info=True, **options)
    return model.eval(), report


def inputs(model: PreTrainedModel, *, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Return the arguments of a forward pass: token ids, shape (batch, length), the same for every model.

    They avoid the special tokens and stay below 100, so that a model with a cut vocabulary still knows them.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    names = ["input_ids", "decoder_input_ids"] if model.config.is_encoder_decoder else ["input_ids"]
    return {name: torch.randint(3, 100, (batch, length), generator=random) for name in names}


def logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of `model` on `inputs(model)`, shape (batch, length, vocab), computed without a cache."""
    import torch

    with torch.no_grad():
        return model(**inputs(model), use_cache=False).logits


@contextmanager
def bypass(model: PreTrainedModel, dropped: Sequence[int]) -> Iterator[None]:
    """Return a context in which the layers `dropped`, of every stack, leave the hidden state as it was.

    They still run, and only their hidden state is ignored: cache entries and the position bias that T5's first layer
    hands to the others stay in place. An index outside a stack raises IndexError.
    """

    def restore(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layers = [stack[index] for stack in stacks(model) for index in dropped]
    hooks = [layer.register_forward_hook(restore, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Return the lists of layers: one, or encoder and decoder. They are the ModuleLists that lie in no other one."""
    from torch import nn

    found = []
    for child in model.children():
        found += [child] if isinstance(child, nn.ModuleList) else stacks(child)
    return found


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that loads a model with this config."""
    import transformers

    return getattr(transformers, AUTO_CLASSES.get(config.model_type, "AutoModelForCausalLM"))


def _randomise(model: PreTrainedModel) -> None:
    """Move every stored tensor in place, which keeps tied ones tied.

    Vectors keep what they start from, for a gain is neutral at 1, at Gemma's 0 or at anything that a family chose.
    Matrices map unit variance to unit variance: logits are of order 1 and each layer adds as much as it receives.
    """
    import torch

    with torch.no_grad():
        for tensor in model.state_dict().values():
            noise = torch.randn(tensor.shape)
            if not tensor.is_floating_point() or tensor.ndim == 0:  # a number that counts; a constant of an activation
                continue
            if tensor.ndim == 1:
                tensor.add_(0.2 * noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
