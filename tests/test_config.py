"""The config follows the layers: a surviving layer keeps its kind, or the surgery is refused."""

import json

import pytest
from later import LATER

from surgeon.anatomy.config import layer_kinds
from surgeon.anatomy.following import follow_layers
from surgeon.anatomy.halves import Pairing
from surgeon.anatomy.layer_rules import PLACE_BOUND, RULES, UNCUTTABLE
from surgeon.errors import CheckpointError, PlanError

if LATER:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

SLIDING, FULL = "sliding_attention", "full_attention"
CUTS = [[0, 1, 2, 3], [1, 2, 5, 7], [0, 2, 4, 6], [7, 6, 5], [3], [0, 1, 2, 3, 4, 5, 6, 7], [2, 2, 3, 3]]


def follow(config, keep, depth=8, *, tabled=True):
    return follow_layers(config, Pairing.of_layers(keep), depth, tabled=tabled).config


# Configs as they were written before transformers saved explicit lists; each is read back by transformers itself.
OLD_CONFIGS = [
    {"model_type": "gemma2"},
    {"model_type": "gemma3_text"},
    {"model_type": "gemma3_text", "sliding_window_pattern": 3},
    {"model_type": "cohere2"},
    {"model_type": "cohere2", "sliding_window_pattern": 3},
    {"model_type": "gpt_oss"},
    {"model_type": "olmo3"},
    {"model_type": "exaone4", "sliding_window": 16, "sliding_window_pattern": 4},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16, "max_window_layers": 3},
    {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 5},
    {"model_type": "qwen2_moe", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 5},
    {"model_type": "smollm3"},
    {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 16, "no_rope_layer_interval": 3},
    {"model_type": "qwen3_next"},
    {"model_type": "qwen3_next", "full_attention_interval": 3},
    {"model_type": "gpt_neo", "attention_types": [[["global", "local", "local", "local"], 2]]},
    {"model_type": "afmoe", "global_attn_every_n_layers": 3},
    {"model_type": "cwm"},
    {"model_type": "llama4_text", "interleave_moe_layer_step": 2},
]
EXPLICIT = ("layer_types", "no_rope_layers", "attention_layers", "moe_layers")


def kinds_in_transformers(config, depth):
    """Return what transformers says of each layer of this config: every per-layer list, transposed."""
    count = "num_layers" if config["model_type"] == "gpt_neo" else "num_hidden_layers"
    loaded = AutoConfig.for_model(**config | {count: depth})
    lists = []
    for key in EXPLICIT:
        value = getattr(loaded, key, None)
        if key == "moe_layers" and value is not None:
            value = [i in value for i in range(depth)]
        if value is not None:
            assert len(value) == depth, key
            lists.append(value)
    assert lists
    return list(zip(*lists, strict=True))


@pytest.mark.parametrize("keep", CUTS, ids=str)
@pytest.mark.parametrize("config", OLD_CONFIGS, ids=lambda config: json.dumps(config)[16:70])
def test_transformers_derives_the_kinds_that_the_layers_had(config, keep):
    count = "num_layers" if config["model_type"] == "gpt_neo" else "num_hidden_layers"
    before = kinds_in_transformers(config, 8)

    after = follow(config | {count: 8}, keep)

    assert after[count] == len(keep)
    assert kinds_in_transformers(after, len(keep)) == [before[i] for i in keep]


@pytest.mark.parametrize(
    "config", [c for c in OLD_CONFIGS if c["model_type"] not in ("gpt_neo", "llama4_text")], ids=str
)
def test_inspect_shows_the_kinds_that_transformers_derives(config):
    loaded = AutoConfig.for_model(**config, num_hidden_layers=8)

    assert layer_kinds(config | {"num_hidden_layers": 8}, 8) == loaded.layer_types


def test_every_rule_belongs_to_a_model_type_that_transformers_knows():
    known = set(CONFIG_MAPPING_NAMES)
    assert set(RULES) - known == set()
    assert (set(PLACE_BOUND) | set(UNCUTTABLE)) - known == set()


def test_explicit_lists_are_cut_and_stride_keys_left_alone():
    config = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "_sliding_window_pattern": 2,
    }

    after = follow(config, [1, 2], 4)

    assert after["layer_types"] == [FULL, SLIDING]
    assert after["_sliding_window_pattern"] == 2


def test_index_lists_are_renumbered():
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 8, "mlp_only_layers": [1, 4, 6], "decoder_sparse_step": 1}

    assert follow(config, [1, 2, 5, 6])["mlp_only_layers"] == [0, 3]


def test_a_sparse_step_that_no_longer_fits_becomes_a_list():
    """Of eight layers with a step of 2, the odd ones have experts; of layers 1, 2, 3 the first and the last."""
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": []}

    after = follow(config, [1, 2, 3])

    assert after["decoder_sparse_step"] == 1
    assert after["mlp_only_layers"] == [1]
    assert follow(config, [0, 1, 2, 3])["decoder_sparse_step"] == 2


def test_leading_dense_layers_are_counted_again_or_the_cut_is_refused():
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 8, "first_k_dense_replace": 3}

    assert follow(config, [1, 2, 4, 5])["first_k_dense_replace"] == 2
    assert follow(config, [4, 5])["first_k_dense_replace"] == 0
    assert follow(config, [0, 1])["first_k_dense_replace"] in (2, 3)
    with pytest.raises(PlanError, match="deepseek_v3 derives its layer kinds from first_k_dense_replace; removing"):
        follow(config, [4, 0])


def test_periods_and_offsets_are_searched_for_or_the_cut_is_refused():
    """Jamba, attention at layers 1 and 5 of 8, experts at odd ones."""
    config = {
        "model_type": "jamba", "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1,
    }  # fmt: skip

    after = follow(config, [1, 2, 5, 6])

    assert (after["attn_layer_period"], after["attn_layer_offset"]) == (2, 0)
    assert (after["expert_layer_period"], after["expert_layer_offset"]) == (2, 0)
    with pytest.raises(PlanError, match="jamba derives its layer kinds from attn_layer_period and attn_layer_offset"):
        follow(config, [0, 1, 5, 6, 7])


def test_every_count_and_nested_text_configs_follow():
    assert follow({"model_type": "bart", "encoder_layers": 8, "decoder_layers": 8, "num_hidden_layers": 8}, [0, 1]) == {
        "model_type": "bart", "encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2,
    }  # fmt: skip
    nested = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 8, "layer_types": [SLIDING] * 7 + [FULL]},
        "vision_config": {"num_hidden_layers": 8},
    }

    after = follow(nested, [0, 7])

    assert after["text_config"]["num_hidden_layers"] == 2
    assert after["text_config"]["layer_types"] == [SLIDING, FULL]
    assert after["vision_config"] == {"num_hidden_layers": 8}
    assert nested["text_config"]["num_hidden_layers"] == 8


def test_a_list_as_long_as_an_unknown_model_is_deep_is_cut_and_said_so():
    config = {"model_type": "zorg", "num_hidden_layers": 3, "gates": [1, 2, 3], "eos_token_id": [1, 2, 3], "mix": [1]}

    edit = follow_layers(config, Pairing.of_layers([2, 0]), 3, tabled=False)

    assert edit.config["gates"] == [3, 1]
    assert edit.config["eos_token_id"] == [1, 2, 3]
    assert edit.notes == ["gates has one entry for each layer and was cut with them"]
    assert follow(config, [2, 0], 3, tabled=True)["gates"] == [1, 2, 3]


def test_an_unknown_stride_lets_layers_be_cut_from_the_end_but_not_moved():
    config = {"model_type": "zorg", "num_hidden_layers": 8, "global_layer_interval": 4}

    assert follow(config, [0, 1, 2], tabled=False)["num_hidden_layers"] == 3
    with pytest.raises(PlanError, match="zorg has global_layer_interval = 4"):
        follow(config, [1, 2, 3], tabled=False)


def test_a_residual_scale_that_depends_on_the_depth_is_kept():
    config = {"model_type": "minicpm3", "num_hidden_layers": 64, "scale_depth": 1.4}

    edit = follow_layers(config, Pairing.of_layers(list(range(16))), 64, tabled=False)

    assert edit.config["scale_depth"] / 16**0.5 == pytest.approx(1.4 / 64**0.5, rel=1e-12)
    assert "scale_depth 1.4 became 0.7" in edit.notes[0]


def test_per_layer_overrides_move_with_their_layers():
    config = {"model_type": "llama", "num_hidden_layers": 8, "per_layer_config": {"01": {"a": 1}, "06": {"b": 2}}}

    assert follow(config, [6, 0, 1])["per_layer_config"] == {"0": {"b": 2}, "2": {"a": 1}}


@pytest.mark.parametrize(("name", "reason"), [("zamba2", "shares the weights"), ("gemma3n", "packs an embedding")])
def test_models_whose_layers_cannot_be_cut_are_refused_with_the_reason(name, reason):
    with pytest.raises(PlanError, match=f"{name} {reason}"):
        follow({"model_type": name, "num_hidden_layers": 8}, [0, 1])
    assert follow({"model_type": name, "num_hidden_layers": 8}, list(range(8)))["num_hidden_layers"] == 8


def test_a_model_that_derives_numbers_from_a_layers_place_may_lose_its_end_only():
    config = {"model_type": "diffllama", "num_hidden_layers": 8}

    assert follow(config, [0, 1])["num_hidden_layers"] == 2
    with pytest.raises(PlanError, match="diffllama derives lambda_init from a layer's place"):
        follow(config, [1, 2])


def test_a_list_that_does_not_fit_the_depth_is_refused():
    with pytest.raises(CheckpointError, match="lists 3 layer_types for 8 layers"):
        follow({"model_type": "gemma2", "num_hidden_layers": 8, "layer_types": [FULL] * 3}, [0, 1])
