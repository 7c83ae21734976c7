"""The rules by which a layer's kind follows from its place: those of transformers; what is unknown stays in place."""

import json

import every_type
import pytest
from later import LATER

import surgeon
from surgeon.anatomy.following import WITHOUT_CACHE, follow_layers
from surgeon.anatomy.halves import Pairing
from surgeon.anatomy.layer_rules import INDEX_LISTS, RULES
from surgeon.errors import PlanError
from surgeon.surgery import open_model
from surgeon.transforms.layers import keep_layers

if LATER:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def derived(model_type, depth):
    """Return a type's config of `depth` layers, its per-layer lists as transformers derives them."""
    return json.loads(every_type.small_config(model_type, num_hidden_layers=depth).to_json_string(use_diff=False))


@pytest.mark.parametrize("depth", [6, 7])
def test_a_rule_derives_the_list_that_transformers_derives(depth):
    wrong, compared = [], 0
    for model_type in sorted(RULES.keys() & set(CONFIG_MAPPING) - every_type.NEEDS.keys()):
        config = derived(model_type, depth)
        for rule in RULES[model_type]:
            listed = config.get(rule.explicit) if rule.explicit else None
            if rule.express is None or not listed or rule.explicit in INDEX_LISTS:
                continue
            compared += 1
            said = rule.kinds({key: value for key, value in config.items() if key != rule.explicit}, depth)
            wrong += [(model_type, rule.explicit, said, listed)] * (list(said) != listed)
    assert compared > 50
    assert not wrong


@pytest.fixture
def unknown(tmp_path):
    """Return a checkpoint of a type that no table knows: its fourth layer has other tensors, and no list says so."""
    directory = every_type.build("qwen3_5_text", tmp_path / "unknown", published=True)
    config = json.loads((directory / "config.json").read_text())
    assert "layer_types" not in config
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "not_known_yet"}))
    return directory


@pytest.mark.parametrize("keep", [[0, 1, 3, 4], [1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 1]])
def test_a_layer_of_an_unknown_type_does_not_come_where_other_tensors_are_built(unknown, keep):
    with pytest.raises(PlanError, match=r"layer [03] of not_known_yet differs .* because of its place"):
        keep_layers(open_model(unknown).anatomy, keep)


def test_the_first_layers_of_an_unknown_type_keep_their_places(unknown):
    assert surgeon.truncate(unknown, layers=5).plan.layer_map == (0, 1, 2, 3, 4)


def test_a_layer_of_an_unknown_type_may_take_the_place_of_one_that_is_built_alike(unknown):
    assert keep_layers(open_model(unknown).anatomy, [0, 2, 4, 3, 5]).layer_map == (0, 2, 4, 3, 5)


def test_sizes_that_differ_are_other_tensors_too(tmp_path):
    directory = every_type.build("gemma4_unified_text", tmp_path / "unknown")
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "not_known_yet"}
    lists = ("layer_types", "per_layer_config")
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in lists}))

    with pytest.raises(PlanError, match="differs from the others in .* because of its place"):
        keep_layers(open_model(directory).anatomy, [0, 2, 3, 5])


def test_a_text_with_a_letter_for_each_layer_is_cut_with_them(tmp_path):
    """As nemotron_h is published: transformers counts the letters, and fills layers that the files do not have."""
    directory = every_type.build("nemotron_h", tmp_path / "hybrid")
    config = json.loads((directory / "config.json").read_text())
    config.pop("layers_block_type")
    old = {"num_hidden_layers": 6, "hybrid_override_pattern": "ME*-ME"}
    (directory / "config.json").write_text(json.dumps(config | old))

    assert keep_layers(open_model(directory).anatomy, [0, 2, 5]).config["hybrid_override_pattern"] == "M*E"


@pytest.mark.parametrize(("keep", "refused"), [([0, 1, 3], True), ([0, 1, 2, 3], False), ([1, 2, 3], False)])
def test_a_layer_that_shares_an_indexer_follows_its_owner(tmp_path, keep, refused):
    kinds = ["full", "full", "full", "shared", "full", "shared"]
    anatomy = open_model(every_type.build("hy_v4", tmp_path / "shared", indexer_types=kinds)).anatomy
    if not refused:
        assert keep_layers(anatomy, keep).config["indexer_types"] == [kinds[i] for i in keep]
        return
    with pytest.raises(PlanError, match=r"layer 3 takes from layer 2 \(indexer_types"):
        keep_layers(anatomy, keep)


def test_what_a_layer_takes_from_another_is_renumbered(tmp_path):
    overrides = {"kv_source_layers": [0, 1, 2, 2, 4, 4]}
    anatomy = open_model(every_type.build("mistral_large4_text", tmp_path / "source", **overrides)).anatomy

    assert keep_layers(anatomy, [0, 2, 3, 4, 5]).config["kv_source_layers"] == [0, 1, 1, 3, 3]
    with pytest.raises(PlanError, match=r"layer 3 takes from layer 2"):
        keep_layers(anatomy, [0, 1, 3])


def test_the_last_layer_attends_to_everything_where_the_code_makes_it(tmp_path):
    directory = every_type.build("gemma4_unified_text", tmp_path / "last")

    with pytest.raises(PlanError, match="makes its last layer attend to everything, and layer 3 does not"):
        surgeon.truncate(directory, layers=4)
    assert surgeon.truncate(directory, layers=3).plan.layer_map == (0, 1, 2)


@pytest.mark.parametrize(
    ("model_type", "keep"),
    [("qwen3_next", [0, 1, 2]), ("lfm2", [0, 1]), ("jamba", [0, 1]), ("bamba", [0, 1]), ("recurrent_gemma", [0, 1])],
)
def test_a_hybrid_without_a_layer_that_attends_is_told_that_it_generates_nothing(model_type, keep, tmp_path):
    """transformers: `get_seq_length` can only be called on Attention layers. Its forward pass works."""
    config = json.loads(every_type.small_config(model_type).to_json_string(use_diff=False))

    assert WITHOUT_CACHE in follow_layers(config, Pairing.of_layers(keep), 6, tabled=False).notes
    assert WITHOUT_CACHE not in follow_layers(config, Pairing.of_layers(range(6)), 6, tabled=False).notes


def test_a_list_of_layers_that_nobody_knows_holds_its_layers_in_place():
    config = {"model_type": "not_known_yet", "num_hidden_layers": 6, "special_block_ids": [2, 5]}

    def follow(keep):
        return follow_layers(config, Pairing.of_layers(keep), 6, tabled=False).config

    assert follow([0, 1, 2, 3, 4, 5])["special_block_ids"] == [2, 5]
    assert follow([0, 1, 2, 3, 4, 5, 0])["num_hidden_layers"] == 7
    for keep in ([0, 2, 3, 4, 5], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 2]):
        with pytest.raises(PlanError, match=r"special_block_ids = \[2, 5\]"):
            follow(keep)


def test_layers_that_attend_to_the_whole_picture_still_do_when_they_move(tmp_path):
    every_type.build("sam3_vit_model", tmp_path / "toy", global_attn_indexes=[1, 3])
    stacked = surgeon.grow(tmp_path / "toy", layers=9, depth_method="stack")
    assert stacked.plan.layer_map == (0, 1, 2, 3, 4, 5, 0, 1, 2)
    stacked.save(tmp_path / "stacked")
    assert json.loads((tmp_path / "stacked" / "config.json").read_text())["global_attn_indexes"] == [1, 3, 7]


@pytest.mark.parametrize(
    ("given", "keep", "expected"),
    [([6], [0, 1, 2], [3]), ([0, 2, 6], [0, 1, 3, 5], [0, 2, 4]), ([-1], [0, 5], [2]), ([2], [1, 2], [1])],
)
def test_a_backbone_hands_on_the_stages_that_it_handed_on(given, keep, expected):
    config = json.loads(every_type.small_config("dinov2", out_indices=given).to_json_string(use_diff=False))
    edit = follow_layers(config, Pairing.of_layers(keep), 6, tabled=False).config
    result = CONFIG_MAPPING["dinov2"](**edit)  # it checks the stages against their names
    assert result.out_indices == edit["out_indices"] == expected
    assert result.out_features == edit["out_features"] == [result.stage_names[stage] for stage in expected]


def test_a_stage_that_a_backbone_hands_on_is_not_removed():
    config = json.loads(every_type.small_config("dinov2", out_indices=[3, 6]).to_json_string(use_diff=False))
    with pytest.raises(PlanError, match=r"hands on stage 3 .* its layer would be removed"):
        follow_layers(config, Pairing.of_layers([0, 1, 5]), 6, tabled=False)
