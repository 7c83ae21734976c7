"""Which config keys speak of single layers, and the rules by which a model's code derives a layer's kind. Data only.

Read from the configuration and modeling files of transformers 5.23. A rule counts only where its explicit per-layer
list is absent: transformers 5 writes such lists when it saves, older checkpoints on the Hub do not have them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Config = Mapping[str, Any]
Kinds = Sequence[Any]

# The keys that may hold the number of layers. A checkpoint may have several; all of them must follow.
COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
ENCODER_COUNT_KEYS = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
DECODER_COUNT_KEYS = ("decoder_layers", "num_decoder_layers")

# What configs call a layer that attends to every token before it, and one that attends to a window.
FULL_ATTENTION = frozenset({"full_attention", "attention", "global"})
SLIDING_ATTENTION = frozenset({"sliding_attention", "local"})

# Lists with one entry for each layer.
LAYER_LISTS = frozenset(
    [
        "layer_types",
        "mlp_layer_types",
        "layers_block_type",
        "no_rope_layers",
        "indexer_types",
        "attention_layers",
        "attn_layers",
        "layer_rope_theta",
        "num_attention_heads_per_layer",
        "block_types",
        "compress_ratios",
        "sparse_attention_freq",
    ]
)
# Lists of layer numbers.
INDEX_LISTS = frozenset(
    [
        "mlp_only_layers",
        "moe_layers",
        "cross_attention_layers",
        "attn_layer_indices",
        "full_attn_idxs",
        "local_layer_ids",
    ]
)
# Lists that may by chance be as long as the model is deep, and never speak of layers.
OTHER_LISTS = frozenset(
    [
        "architectures",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "keys_to_ignore_at_inference",
        "mtp_layer_types",
        "mtp_mlp_layer_types",
        "mtp_layers_block_type",
    ]
)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a model's code derives something of each layer from `keys` when the list `explicit` is absent.

    `kinds(config, n)` returns that something for layers 0 to n - 1; `express` turns the kinds that must hold into
    config keys that say the same outright, where the code listens to any.
    """

    kinds: Callable[[Config, int], Kinds]
    keys: tuple[str, ...] = ()
    explicit: str | None = None
    express: Callable[[Kinds], Config] | None = None


def _attention(kinds: Callable[[Config, int], str], *keys: str) -> Rule:
    """Return the rule of a family that derives `layer_types` layer by layer."""
    return Rule(
        lambda config, n: [kinds(config, i) for i in range(n)],
        keys,
        explicit="layer_types",
        express=lambda per_layer: {"layer_types": list(per_layer)},
    )


def _sliding(when: bool) -> str:
    return "sliding_attention" if when else "full_attention"


def _linear_or(when: bool) -> str:
    return "full_attention" if when else "linear_attention"


def _every(key: str, default: int) -> Rule:
    """Return the rule by which each `key`-th layer attends to everything and the others to a window."""
    return _attention(lambda config, i: _sliding((i + 1) % (config.get(key) or default) != 0), key)


def _windowed(config: Config, i: int) -> bool:
    return bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None


def _no_rope(config: Config, n: int) -> list[int]:
    return [int((i + 1) % (config.get("no_rope_layer_interval") or 4) != 0) for i in range(n)]


def _gpt_neo_kinds(config: Config, n: int) -> list[str]:
    groups = config.get("attention_types") or [[["global", "local"], 12]]
    return [kind for kinds, times in groups for _ in range(times) for kind in kinds]


def _sparse_step(config: Config, n: int) -> list[str]:
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    return ["dense" if i in dense or (i + 1) % step else "sparse" for i in range(n)]


SPARSE_STEP = Rule(
    _sparse_step,
    ("decoder_sparse_step", "mlp_only_layers"),
    express=lambda kinds: {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == "dense"],
    },
)
NO_ROPE = Rule(
    _no_rope, ("no_rope_layer_interval",), explicit="no_rope_layers", express=lambda kinds: {"no_rope_layers": kinds}
)
QWEN_WINDOW = _attention(
    lambda config, i: _sliding(_windowed(config, i) and i >= config.get("max_window_layers", 28)), "max_window_layers"
)


def _first_dense(key: str) -> Rule:
    """Return the rule by which the first `key` layers are dense and the rest have experts."""
    return Rule(lambda config, n: ["dense" if i < config.get(key, 0) else "sparse" for i in range(n)], (key,))


def _period(name: str) -> Rule:
    """Return Jamba's rule: every `name`_period-th layer from `name`_offset on is special."""
    period, offset = f"{name}_period", f"{name}_offset"
    return Rule(
        lambda config, n: [i % config.get(period, 1) == config.get(offset, 0) for i in range(n)], (period, offset)
    )


MOE_INTERVAL = Rule(
    lambda config, n: [(i + 1) % (config.get("interleave_moe_layer_step") or 1) == 0 for i in range(n)],
    ("interleave_moe_layer_step",),
    explicit="moe_layers",
    express=lambda kinds: {"moe_layers": [i for i, sparse in enumerate(kinds) if sparse]},
)

RULES: Mapping[str, tuple[Rule, ...]] = {
    "gemma2": (_attention(lambda config, i: _sliding((i + 1) % 2 != 0)),),
    "vaultgemma": (_attention(lambda config, i: _sliding((i + 1) % 2 != 0)),),
    "gpt_oss": (_attention(lambda config, i: _sliding((i + 1) % 2 != 0)),),
    "gemma3_text": (_every("sliding_window_pattern", 6),),
    "cohere2": (_every("sliding_window_pattern", 4),),
    "afmoe": (_every("global_attn_every_n_layers", 4), _first_dense("num_dense_layers")),
    "exaone4": (
        _attention(
            lambda config, i: _sliding(
                config.get("sliding_window") is not None and (i + 1) % config.get("sliding_window_pattern", 4) != 0
            ),
            "sliding_window_pattern",
        ),
    ),
    "olmo3": (_attention(lambda config, i: _sliding((i + 1) % 4 != 0)),),
    "cwm": (_attention(lambda config, i: _sliding(i % 4 != 0)),),
    "qwen2": (QWEN_WINDOW,),
    "qwen2_vl": (QWEN_WINDOW,),
    "qwen2_5_vl": (QWEN_WINDOW,),
    "qwen3": (QWEN_WINDOW,),
    "qwen2_moe": (
        _attention(
            lambda config, i: _sliding(
                _windowed(config, i) and (i + 1) % 2 != 0 and i < config.get("max_window_layers", 28)
            ),
            "max_window_layers",
        ),
        SPARSE_STEP,
    ),
    "qwen3_moe": (SPARSE_STEP,),
    "qwen3_vl_moe_text": (SPARSE_STEP,),
    "qwen3_next": (
        _attention(
            lambda config, i: _linear_or((i + 1) % config.get("full_attention_interval", 4) == 0),
            "full_attention_interval",
        ),
        SPARSE_STEP,
    ),
    "minimax": (_attention(lambda config, i: _linear_or((i + 1) % 2 != 0)),),
    "smollm3": (
        NO_ROPE,
        _attention(
            lambda config, i: _sliding(
                _windowed(config, i) and not (config.get("no_rope_layers") or _no_rope(config, i + 1))[i]
            )
        ),
    ),
    "llama4_text": (
        NO_ROPE,
        MOE_INTERVAL,
        _attention(
            lambda config, i: (
                "chunked_attention"
                if (config.get("no_rope_layers") or _no_rope(config, i + 1))[i]
                else "full_attention"
            )
        ),
    ),
    "gpt_neo": (
        Rule(
            _gpt_neo_kinds,
            ("attention_types",),
            express=lambda kinds: {"attention_types": [[list(kinds), 1]]},
        ),
    ),
    "deepseek_v2": (_first_dense("first_k_dense_replace"),),
    "deepseek_v3": (_first_dense("first_k_dense_replace"),),
    "dots1": (_first_dense("first_k_dense_replace"),),
    "glm4_moe": (_first_dense("first_k_dense_replace"),),
    "lfm2_moe": (_first_dense("num_dense_layers"),),
    "jamba": (_period("attn_layer"), _period("expert_layer")),
}

# Each layer's place is in the code itself, so a layer may be dropped from the end but never move.
PLACE_BOUND = {
    "diffllama": "derives lambda_init from a layer's place",
    "minimax": "derives its decay from a layer's place",
    "glm_moe_dsa": "lets layers share the indexer of a layer before them",
    "hy_v4": "lets layers share the indexer of a layer before them",
    "idefics": "puts a layer that attends to images in front of its layers by number",
    "qwen3_vl": "feeds visual features into its first text layers by number",
    "qwen3_vl_moe": "feeds visual features into its first text layers by number",
}
# No list of layers can be kept and the rest dropped.
UNCUTTABLE = {
    "gemma3n": "packs an embedding for every layer into one tensor (embed_tokens_per_layer)",
    "gemma3n_text": "packs an embedding for every layer into one tensor (embed_tokens_per_layer)",
    "gemma4": "forces its last layer to full attention and packs per-layer embeddings into one tensor",
    "gemma4_text": "forces its last layer to full attention and packs per-layer embeddings into one tensor",
    "zamba": "shares the weights of its hybrid layers",
    "zamba2": "shares the weights of its hybrid layers",
    "hrm_text": "derives its depth from cycles over two stacks",
    "longcat_flash": "counts two attention layers in every stored layer",
    "kimi_linear": "numbers its attention layers from 1 in a nested config",
    "switch_transformers": "derives which layers have experts from the depth",
    "inkling2": "derives residual blocks from a layer's place",
    "ernie4_5_moe": "derives which layers have experts from moe_layer_start_index, end_index and interval together",
}


@dataclass(frozen=True, slots=True)
class RuntimePattern:
    """What a runtime derives from a layer's number, whatever the config says of that layer.

    Every `period`-th layer is another kind than the rest: it attends to everything where they have a `window`, or has
    no rotary positions where they have some ("rope").
    """

    runtime: str
    of: Literal["window", "rope"]
    period: int

    def is_odd_one(self, layer: int) -> bool:
        """Return whether this layer is the one in `period` that differs from the rest."""
        return (layer + 1) % self.period == 0


# Families of which llama.cpp computes a head's size from hidden / heads: it does not load others (run: docs/models.md).
SQUARE_HEADS = frozenset({"cohere2", "granite", "olmo2", "phi3", "qwen2"})

# Read from llama.cpp of October 2026 (src/models/*.cpp; its converter writes no list of layers for these) and, where it
# says so, from vLLM. The runs are in docs/models.md.
RUNTIME_PATTERNS: Mapping[str, tuple[RuntimePattern, ...]] = {
    "gemma2": (RuntimePattern("llama.cpp", "window", 2),),
    "gemma3_text": (RuntimePattern("llama.cpp", "window", 6),),
    "gpt_oss": (RuntimePattern("llama.cpp", "window", 2), RuntimePattern("vLLM", "window", 2)),
    "cohere2": (RuntimePattern("llama.cpp", "window", 4),),
    "afmoe": (RuntimePattern("llama.cpp", "window", 4),),
    "llama4_text": (RuntimePattern("llama.cpp", "window", 4), RuntimePattern("llama.cpp", "rope", 4)),
    "smollm3": (RuntimePattern("llama.cpp", "rope", 4),),
}
