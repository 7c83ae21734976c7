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
COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
ENCODER_COUNT_KEYS = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
DECODER_COUNT_KEYS = ("decoder_layers", "num_decoder_layers")

# What configs call a layer that attends to every token before it, and one that attends to a window.
FULL_ATTENTION = frozenset({"full_attention", "attention", "global"})
SLIDING_ATTENTION = frozenset({"sliding_attention", "local"})

# What they call one that does not attend, but keeps a state or has an MLP alone.
WITHOUT_ATTENTION = frozenset({"linear_attention", "conv", "mamba", "recurrent", "moe", "mlp", *"ME-"})

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
# The same as a text, with a letter for each layer.
LAYER_TEXTS = frozenset({"hybrid_override_pattern"})
# Lists with the number of another layer for each layer, on which it depends.
LAYER_REFERENCES = frozenset({"kv_source_layers"})
# Lists of layer numbers.
INDEX_LISTS = frozenset([
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs",
    "local_layer_ids", "rope_scaling_layers", "ple_layer_ids", "global_attn_indexes", "fullatt_block_indexes",
    "window_block_indices", "residual_block_indices",
])  # fmt: skip
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

    @property
    def speaks_by(self) -> tuple[str, ...]:
        """The keys that name what is derived: the list, else those that it is derived from."""
        return self.keys if self.explicit is None else (self.explicit,)


def _listed(explicit: str, kinds: Callable[[Config, int], object], *keys: str) -> Rule:
    """Return the rule of a family that derives the list `explicit` layer by layer, where a config has none."""
    return Rule(
        lambda config, n: [kinds(config, i) for i in range(n)],
        keys,
        explicit=explicit,
        express=lambda per_layer: {explicit: list(per_layer)},
    )


def _attention(kinds: Callable[[Config, int], str], *keys: str) -> Rule:
    """Return the rule of a family that derives `layer_types` layer by layer."""
    return _listed("layer_types", kinds, *keys)


def _needs(explicit: str, *keys: str) -> Rule:
    """Return the rule that without the list `explicit`, where a key of `keys` is there, no layer may move.

    The code derives the list from something that this table does not follow.
    """

    def kinds(config: Config, n: int) -> Kinds:
        is_unknown = not keys or any(config.get(key) is not None for key in keys)
        return list(range(n)) if is_unknown else [None] * n

    return Rule(kinds, keys, explicit=explicit)


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


def _sparse_step(dense_by_default: Sequence[int] = ()) -> Rule:
    """Return Qwen's rule: each `decoder_sparse_step`-th layer has experts, but for those of `mlp_only_layers`."""

    def kinds(config: Config, n: int) -> list[str]:
        dense, step = config.get("mlp_only_layers"), config.get("decoder_sparse_step") or 1
        dense = dense_by_default if dense is None else dense
        return ["dense" if i in dense or (i + 1) % step else "sparse" for i in range(n)]

    def express(kinds: Kinds) -> Config:
        return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == "dense"]}

    return Rule(kinds, ("decoder_sparse_step", "mlp_only_layers"), express=express)


SPARSE_STEP = _sparse_step()
NO_ROPE = Rule(
    _no_rope, ("no_rope_layer_interval",), explicit="no_rope_layers", express=lambda kinds: {"no_rope_layers": kinds}
)
QWEN_WINDOW = _attention(
    lambda config, i: _sliding(_windowed(config, i) and i >= config.get("max_window_layers", 28)), "max_window_layers"
)


def _first_dense(key: str) -> Rule:
    """Return the rule by which the first `key` layers are dense and the rest have experts."""
    return Rule(lambda config, n: ["dense" if i < config.get(key, 0) else "sparse" for i in range(n)], (key,))


def _dense_listed(key: str | None, default: int = 1) -> Rule:
    """Return the rule of a family that lists its MLPs: the first `key` layers, or `default`, are dense."""

    def kind(config: Config, i: int) -> str:
        first = config.get(key) if key else None
        return "dense" if i < (default if first is None else first) else "sparse"

    return _listed("mlp_layer_types", kind, *([key] if key else []))


def _full_at(period: int, place: int) -> Rule:
    """Return the rule by which layer `place` of each `period` attends to everything, the others to a window."""
    return _attention(lambda config, i: _sliding(i % period != place))


def _depends_on_depth(slides: Callable[[int, int], bool]) -> Rule:
    """Return the rule of a family whose pattern of attention depends on how many layers there are."""
    return Rule(
        lambda config, n: [_sliding(slides(i, n)) for i in range(n)],
        explicit="layer_types",
        express=lambda kinds: {"layer_types": list(kinds)},
    )


def _thetas_from_end(config: Config, n: int) -> Kinds:
    theta = (config.get("rope_parameters") or {}).get("rope_theta", 500000.0)
    return [theta if (n - 1 - i) % 4 else 0 for i in range(n)]


# The last layer, and each fourth before it, attends to everything and has no rotary positions.
FULL_FROM_END = (
    _depends_on_depth(lambda i, n: (n - 1 - i) % 4 != 0),
    Rule(_thetas_from_end, explicit="layer_rope_theta", express=lambda kinds: {"layer_rope_theta": list(kinds)}),
)


def _gated_delta(other: str = "full_attention") -> Rule:
    """Return the rule by which each `full_attention_interval`-th layer attends, and the others keep a state."""
    return _attention(
        lambda config, i: other if (i + 1) % config.get("full_attention_interval", 4) == 0 else "linear_attention",
        "full_attention_interval",
    )


def _cohere_moe(config: Config, n: int) -> Kinds:
    first = config.get("first_k_dense_replace") or 0
    window, prefix = config.get("sliding_window_pattern", 4), config.get("prefix_dense_sliding_window_pattern", 1)
    return [_sliding((i + 1) % prefix != 0 if i < first else (i - first + 1) % window != 0) for i in range(n)]


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

SIXTH_AND_LAST = _depends_on_depth(lambda i, n: (i + 1) % 6 != 0 and i != n - 1)
INKLING = _attention(lambda config, i: "hybrid" if (i + 1) % 6 == 0 else "hybrid_sliding")
GLOBAL_FIRST = _attention(
    lambda config, i: _sliding(i % config.get("global_attn_every_n_layers", 3) != 0), "global_attn_every_n_layers"
)
SHARED_INDEXERS = _needs("indexer_types", "index_topk_pattern", "index_topk_freq")


def _dense_step() -> Rule:
    """Return the rule by which each `moe_layer_freq`-th layer from `first_k_dense_replace` on has experts."""

    def kind(config: Config, i: int) -> str:
        first, step = config.get("first_k_dense_replace", 1), config.get("moe_layer_freq", 1)
        return "sparse" if i >= first and i % step == 0 else "dense"

    return _listed("mlp_layer_types", kind, "first_k_dense_replace", "moe_layer_freq")


_WINDOWED = ("qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen3")
RULES: Mapping[str, tuple[Rule, ...]] = {
    **dict.fromkeys(_WINDOWED, (QWEN_WINDOW,)),
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
    "olmo3": (_full_at(4, 3),),
    "cwm": (_full_at(4, 0),),
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
    "qwen3_omni_moe_text": (SPARSE_STEP,),
    "qwen3_omni_moe_talker_text": (SPARSE_STEP,),
    "qwen3_next": (_gated_delta(), SPARSE_STEP),
    "qwen3_5_text": (_gated_delta(),),
    "qwen3_5_moe_text": (_gated_delta(),),
    "qwen4_exp_text": (_gated_delta("indexed_attention"),),
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
    "dots1": (_first_dense("first_k_dense_replace"), _needs("layer_types", "sliding_window")),
    "glm4_moe": (_first_dense("first_k_dense_replace"),),
    "glm4v_moe_text": (_first_dense("first_k_dense_replace"),),
    "mistral4": (_first_dense("first_k_dense_replace"),),
    "lfm2_moe": (_first_dense("num_dense_layers"),),
    "jamba": (_period("attn_layer"), _period("expert_layer")),
    "beam": (SIXTH_AND_LAST, _dense_listed(None, 3)),
    "axk1": (_dense_step(),),
    "axk2": (_dense_step(),),
    "bailing_hybrid": (
        _attention(lambda c, i: _linear_or((i + 1) % c.get("layer_group_size", 6) == 0), "layer_group_size"),
        _dense_listed("first_k_dense_replace", 2),
    ),
    "cohere2_moe": (
        Rule(_cohere_moe, explicit="layer_types", express=lambda kinds: {"layer_types": list(kinds)}),
        _dense_listed("first_k_dense_replace", 0),
    ),
    "cohere_compass_text": (_attention(lambda config, i: "full_attention"),),
    "deepseek_v32": (_dense_listed("first_k_dense_replace", 3),),
    "deepseek_v4": (_needs("layer_types"), _needs("mlp_layer_types")),
    "diffusion_gemma_text": (SIXTH_AND_LAST,),
    "dots3_note_text": (_needs("layer_types"), _needs("mlp_layer_types"), _needs("per_layer_config")),
    "embedding_gemma2_text": (SIXTH_AND_LAST,),
    "ernie4_5_vl_moe_text": (_dense_listed(None),),
    "exaone_moe": (_needs("layer_types"), _dense_listed("first_k_dense_replace")),
    "flint": (_depends_on_depth(lambda i, n: i > 1 and i % 4 != 1 and i != n - 1), _sparse_step([0, 1])),
    "gemma4_text": (SIXTH_AND_LAST,),
    "gemma4_unified_text": (SIXTH_AND_LAST, _needs("per_layer_config")),
    "glm4_moe_lite": (_dense_listed(None),),
    "glm5_next_text": (
        _attention(lambda config, i: "indexed_attention" if i % 4 == 3 else "linear_attention"),
        _dense_listed(None, 3),
        SHARED_INDEXERS,
    ),
    "glm_moe_dsa": (_dense_listed("first_k_dense_replace", 3), SHARED_INDEXERS),
    "granite_swa": (_full_at(4, 0),),
    "granitemoe_swa": (_full_at(4, 0),),
    "hy_v3": (_dense_listed(None),),
    "hy_v4": (_dense_listed(None), _needs("indexer_types")),
    "inkling_text": (_needs("layer_types", "local_layer_ids"), INKLING, _dense_listed("dense_mlp_idx", 0)),
    "inkling2_text": (INKLING,),
    "kolibri1": (_full_at(5, 4),),
    "laguna": (_dense_listed(None),),
    "lfm3": (
        _attention(lambda c, i: "full_attention" if i % 4 == 2 else "conv" if i % 4 or not i else "sliding_attention"),
    ),
    "mimo_v2_flash": (_attention(lambda c, i: _sliding(i > 0 and (i + 1) % 6 != 0)), _dense_listed(None)),
    "minimax_m3_vl_text": (
        _needs("layer_types", "sparse_attention_config"),
        _needs("mlp_layer_types", "moe_layer_freq"),
    ),
    "mistral_large4_text": (_dense_listed("first_k_dense_replace", 3), NO_ROPE, SHARED_INDEXERS),
    "modernbert": (GLOBAL_FIRST,),
    "modernbert-decoder": (GLOBAL_FIRST,),
    "muse_glimmer_text": FULL_FROM_END,
    "muse_spark_text": FULL_FROM_END,
    "nemotron_h": (
        Rule(lambda config, n: config.get("hybrid_override_pattern") or "ME*-", explicit="layers_block_type"),
    ),
    "neomme": (SIXTH_AND_LAST, _needs("per_layer_config")),
    "olmo_hybrid": (_attention(lambda config, i: _linear_or(i % 4 == 3)),),
    "step3p5": (_needs("layer_types", "layer_types_pattern"), _needs("mlp_layer_types")),
    "t5gemma2_text": (_full_at(6, 5),),
    "ultrabert": (_full_at(3, 2),),
}

# Each layer's place is in the code itself, so a layer may be dropped from the end but never move.
PLACE_BOUND = {
    "beam": "scales what each layer adds by the layer's number",
    "diffllama": "derives lambda_init from a layer's place",
    "zaya": "hands the states of its routers from layer to layer",
    "pegasus_x": "shifts the blocks of each second layer",
    "minimax": "derives its decay from a layer's place",
    "idefics": "puts a layer that attends to images in front of its layers by number",
    "qwen3_vl": "feeds visual features into its first text layers by number",
    "qwen3_vl_moe": "feeds visual features into its first text layers by number",
}
# Whatever the list says, their code makes the last layer attend to everything.
LAST_IS_FULL = frozenset({"diffusion_gemma_text", "embedding_gemma2_text", "gemma4_text", "gemma4_unified_text"})
# No list of layers can be kept and the rest dropped.
UNCUTTABLE = {
    "gemma3n": "packs an embedding for every layer into one tensor (embed_tokens_per_layer)",
    "gemma3n_text": "packs an embedding for every layer into one tensor (embed_tokens_per_layer)",
    "gemma4": "forces its last layer to full attention and packs per-layer embeddings into one tensor",
    "gemma4_text": "forces its last layer to full attention and packs per-layer embeddings into one tensor",
    "esmc": "divides what each layer adds by the square root of the depth",
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
