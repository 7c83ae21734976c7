"""The rules of a quantized checkpoint follow its layers, in every way in which a runtime may read them."""

import json
import random
import re
from contextlib import suppress
from fnmatch import fnmatchcase

import pytest
from handmade import checkpoint, llama
from later import LATER

import surgeon
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.quantized import follow_quantization, follow_quantization_file
from surgeon.checkpoint.header import CheckpointSpec, TensorSpec
from surgeon.errors import CheckpointError, PlanError

if LATER:
    from transformers.quantizers.quantizers_utils import should_convert_module

MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def quantized(depth=12, prefix="model.layers.", **config):
    tensors = {"lm_head.weight": TensorSpec("BF16", (4, 4))}
    for layer in range(depth):
        for module in MODULES:
            tensors[f"{prefix}{layer}.{module}.qweight"] = TensorSpec("I32", (4, 4))
    settings = {"model_type": "llama", "num_hidden_layers": depth, "quantization_config": {"quant_method": "gptq"}}
    return read_anatomy(CheckpointSpec(settings | config, tensors))


def followed(rules, keep, depth=12, **options):
    return follow_quantization({"quantization_config": rules}, quantized(depth, **options), keep)["quantization_config"]


def ignored(rules, keep, **options):
    return followed({"ignore": rules}, keep, **options)["ignore"]


# How runtimes read rules: each returns whether a rule picks the module of this name.
READERS = {
    "GPTQ's dynamic": lambda rule, name: re.match(rule.removeprefix("+:").removeprefix("-:"), name) is not None,
    "compressed-tensors": lambda rule, name: (
        re.match(rule.removeprefix("re:"), name) is not None if rule.startswith("re:") else name == rule
    ),
    "ModelOpt": lambda rule, name: fnmatchcase(name, rule),
    "AWQ": lambda rule, name: rule in name,
}


def picks(reader, rules, layer):
    return {module for module in MODULES for rule in rules if reader(rule, f"model.layers.{layer}.{module}")}


@pytest.mark.parametrize(
    ("rules", "keep", "after"),
    [
        (["lm_head", "model.layers.5.mlp.down_proj"], [0, 5, 6], ["lm_head", "model.layers.1.mlp.down_proj"]),
        (["model.layers.5.mlp.down_proj"], [0, 1], []),  # its layer is gone
        (["model.layers.1.mlp"], [1, 1, 0], ["model.layers.0.mlp", "model.layers.1.mlp"]),  # its layer is there twice
        (["language_model.model.layers.5.mlp"], [5], ["language_model.model.layers.0.mlp"]),
        (["model.visual.blocks.5.mlp", "vision.layers.3.x"], [5], ["model.visual.blocks.5.mlp", "vision.layers.3.x"]),
        ([r"re:.*layers\.5\..*"], [0, 5], [r"re:.*layers\.1\..*"]),
        ([r"re:.*layers\.(0|5)\.mlp\..*"], [4, 5, 0], [r"re:.*layers\.(?:1|2)\.mlp\..*"]),
        ([r"re:.*layers\.[0-2]\..*"], [2, 3], [r"re:.*layers\.(?:0)\..*"]),
        (["model.layers.*.self_attn"], [7, 3], ["model.layers.*.self_attn"]),
        ([r"re:.*layers\.\d+\.mlp.*"], [7, 3], [r"re:.*layers\.\d+\.mlp.*"]),
        (["model.layers.5.*"], [3, 5], ["model.layers.1.*"]),
        (["Linear", "re:.*router", "re:vision.*"], [7, 3], ["Linear", "re:.*router", "re:vision.*"]),
    ],
)  # fmt: skip
def test_a_rule_about_layers_follows_them(rules, keep, after):
    assert ignored(rules, keep) == after


@pytest.mark.parametrize("rule", [r"-:model\.layers\.3\.mlp.*", r"+:model\.layers\.3\.mlp.*", r"model\.layers\.3\.mlp"])
def test_the_keys_of_a_gptq_config_follow_in_their_order(rule):
    rules = {"bits": 4, "dynamic": {rule: {"bits": 8}, r"-:lm_head": {}}}

    after = followed(rules, [0, 3, 1])

    assert after == {"bits": 4, "dynamic": {rule.replace("3", "1"): {"bits": 8}, r"-:lm_head": {}}}


@pytest.mark.parametrize(
    "rule",
    [
        r"re:.*layers\.(?!0\.).*",  # every layer but the first
        r"re:model\.layers\.\d\.mlp.*",  # layers of one digit
        "model.layers.1",  # as a part of a name it is in layers 10 and 11 too
        "layers.1*",
        r"re:.*\.(3|5)\..*",
        r"re:.*layers\.1?[02468]\..*",
    ],
)
def test_a_rule_that_would_pick_other_layers_is_refused(rule):
    with pytest.raises(PlanError, match=r"quantization_config\.ignore picks layers by .*; when layers move"):
        ignored([rule], [3, 0, 10])


@pytest.mark.parametrize("rule", [r"re:.*layers\.(?!0\.).*", "model.layers.1", r"re:.*\.(3|5)\..*", r"re:(a+)+$"])
def test_the_first_layers_keep_any_rule_that_they_had(rule):
    assert ignored([rule], [0, 1, 2]) == [rule]


def test_a_rule_that_could_take_for_ever_is_refused():
    with pytest.raises(PlanError, match="too complex"):
        ignored([r"re:(\w+\.?)+x"], [1])


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"bits": [4, 4, 8, 4, 4, 4]}, "quantization_config.bits has as many entries"),
        ({"layers": {str(i): {} for i in range(6)}}, "quantization_config.layers has an entry for each layer's number"),
        ({"last": "model.layers.5.mlp"}, "would be there 0 times"),
    ],
)
def test_what_counts_layers_without_naming_them_is_refused(rules, named):
    with pytest.raises(PlanError, match=named):
        followed(rules, [1, 2], depth=6)


def test_whatever_is_not_refused_says_of_each_layer_what_it_said_before():
    """Over random rules and cuts: each runtime's own reading is the judge."""
    random.seed(0)
    starts = ["model.layers.", "re:.*layers\\.", "+:model\\.layers\\.", "layers.", "re:.*\\.", "*", ""]
    middles = ["1", "11", "3", "(1|11)", "[0-3]", "\\d+", "*", "1\\d?", ".", "(?!0)\\d+"]
    ends = ["", ".mlp", "\\.mlp", ".*", "\\..*", "*", ".mlp.down_proj", "\\.mlp\\.down_proj", "$"]
    kept = refused = 0
    for _ in range(400):
        rule = random.choice(starts) + random.choice(middles) + random.choice(ends)
        keep = random.choice([[0, 1, 2], [1, 3, 11], [11, 10], [3, 3, 1], list(range(1, 12)), [0, 2, 4, 11]])
        try:
            after = ignored([rule], keep)
        except PlanError:
            refused += 1
            continue
        kept += 1
        for name, reader in READERS.items():
            with suppress(re.error):  # no expression, so this runtime would not take it
                before = [picks(reader, [rule], i) for i in keep]
                assert [picks(reader, after, j) for j in range(len(keep))] == before, (name, rule, keep, after)

    assert min(kept, refused) > 50


def test_transformers_leaves_the_same_modules_unquantized():
    rules = ["lm_head", "model.layers.3.mlp", "model.layers.10.self_attn.q_proj", "model.layers.*.mlp.gate_proj"]
    keep = [0, 3, 10, 11]

    after = ignored(rules, keep)

    for j, i in enumerate(keep):
        for module in MODULES:
            assert should_convert_module(f"model.layers.{j}.{module}", after) == should_convert_module(
                f"model.layers.{i}.{module}", rules
            )


def test_rules_inside_the_config_of_the_language_model_follow_too():
    tensors = {f"model.language_model.layers.{i}.mlp.up.qweight": TensorSpec("I32", (4, 4)) for i in range(3)}
    config = {"model_type": "zorg_vl", "text_config": {"model_type": "zorg", "num_hidden_layers": 3}}
    config["text_config"]["compression_config"] = {"ignore": ["model.language_model.layers.2.mlp.up"]}
    anatomy = read_anatomy(CheckpointSpec(config, tensors))

    after = follow_quantization(config, anatomy, [2])

    assert after["text_config"]["compression_config"] == {"ignore": ["model.language_model.layers.0.mlp.up"]}
    with pytest.raises(PlanError, match="a quantized checkpoint has no table"):
        anatomy.require_family()


def test_the_file_beside_the_weights_follows_and_keeps_its_bytes_where_nothing_changes(tmp_path):
    model = checkpoint(tmp_path / "model", model_type="zorg9", quantization_config={"quant_method": "modelopt"})
    rules = {"quantization": {"exclude_modules": ["lm_head", "model.layers.2.mlp*"], "quant_algo": "NVFP4"}}
    (model / "hf_quant_config.json").write_text(json.dumps(rules))
    depth = surgeon.inspect(model).anatomy.depth

    surgeon.truncate(model, layers=depth).save(tmp_path / "whole")
    surgeon.truncate(model, layers=2).save(tmp_path / "first")

    assert (tmp_path / "whole/hf_quant_config.json").read_text() == json.dumps(rules)
    assert json.loads((tmp_path / "first/hf_quant_config.json").read_text())["quantization"]["exclude_modules"] == [
        "lm_head",
        "model.layers.2.mlp*",  # names no layer of the result
    ]


def test_a_file_beside_the_weights_is_refused_where_it_cannot_follow():
    anatomy = quantized()
    rules = json.dumps({"exclude": ["model.layers.3.mlp.down_proj"]}).encode()

    assert json.loads(follow_quantization_file("quant_config.json", rules, anatomy, [3])) == {
        "exclude": ["model.layers.0.mlp.down_proj"]
    }
    for content, keep, named in [
        (rules, [0, None, 1], "does not say how a new layer"),
        (b"{", [1], "hf_quant_config.json is not JSON"),
        (b"[" * 100_000, [1], "hf_quant_config.json is not JSON"),
    ]:
        with pytest.raises(PlanError, match=named):
            follow_quantization_file("hf_quant_config.json", content, anatomy, keep)


def test_a_cut_that_would_shift_rules_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    quantization = {"quant_method": "compressed-tensors", "ignore": [r"re:.*layers\.(?!0\.).*"]}
    model = checkpoint(tmp_path / "model", quantization_config=quantization)

    with pytest.raises(PlanError, match="picks layers by"):
        surgeon.prune(model, layers=1, score="random", seed=1).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_form_that_config_json_hides_is_named_where_the_tensors_are_unknown(tmp_path):
    tensors = llama()
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = tensors["model.norm.weight"]
    model = checkpoint(tmp_path / "model", tensors=tensors)
    with pytest.raises(CheckpointError, match="weight_scale"):
        surgeon.truncate(model, layers=1)
    (model / "hf_quant_config.json").write_text("{}")

    with pytest.raises(
        CheckpointError, match="is quantized, as hf_quant_config.json says, and its config.json does not"
    ):
        surgeon.truncate(model, layers=1)
