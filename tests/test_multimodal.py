"""Models around a language model: in depth and width, on text and on an image, under all names in files."""

import json
from functools import cache

import pictured
import pytest
import talkers
from later import LATER
from test_narrow import narrowed, silent

import surgeon
from surgeon.anatomy.axes import axes_of
from surgeon.errors import PlanError
from surgeon.surgery import open_model
from surgeon.transforms.narrow import Kept, layers_with

if LATER:
    import torch
    from exact64 import EXACT, difference
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a function from a name of pictured.TYPES to its checkpoint in float64, built once. Read-only."""
    directory = tmp_path_factory.mktemp("pictured")
    return cache(lambda name: pictured.build64(name, directory / name))


@pytest.fixture(scope="module")
def before(pictures):
    """Return a function from a name to the logits of its checkpoint, on a text and with an image."""
    return cache(lambda name: pictured.logits64(pictured.load64(pictures(name))))


def assert_same(directory, expected):
    for one, other in zip(pictured.logits64(pictured.load64(directory)), expected, strict=True):
        assert difference(one, other) <= EXACT


def is_square(name):
    return name in ("qwen2_vl", "qwen2_5_vl")


def without_epsilon(directory):
    model = pictured.load64(directory)
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 1e-18)
    return pictured.logits64(model)


@pytest.mark.parametrize("name", pictured.TYPES)
def test_a_wider_language_model_reads_text_and_images_as_before(name, pictures, before, tmp_path):
    hidden = open_model(pictures(name)).anatomy.sizes["hidden"]
    heads = {} if is_square(name) else {"attention_heads": 12}

    surgeon.grow(pictures(name), hidden_size=hidden * 3 // 2, intermediate_size=71, **heads).save(tmp_path / "padded")
    assert_same(tmp_path / "padded", before(name))

    surgeon.grow(pictures(name), hidden_size="2x", intermediate_size="2x").save(tmp_path / "cloned")
    assert_same(tmp_path / "cloned", before(name))


@pytest.mark.parametrize("name", pictured.TYPES)
def test_what_holds_nothing_can_go_from_a_language_model_that_sees(name, pictures, tmp_path):
    kept = Kept(
        hidden=tuple(range(8, 48)) if is_square(name) else tuple(range(3, 75)),
        ffn={layer: tuple(range(layer, 41 + layer)) for layer in range(2)},
        kv_heads={layer: (1 - layer,) for layer in layers_with(open_model(pictures(name)).anatomy, "kv_heads")},
    )
    source = silent(pictures(name), tmp_path / "silent", kept)

    cut = narrowed(source, tmp_path / "cut", kept)

    for one, other in zip(without_epsilon(cut), without_epsilon(source), strict=True):
        assert difference(one, other) <= EXACT


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_vl"])
def test_a_deeper_language_model_reads_text_and_images_as_before(name, pictures, before, tmp_path):
    surgeon.grow(pictures(name), layers=3).save(tmp_path / "deep")

    assert_same(tmp_path / "deep", before(name))


@pytest.mark.parametrize("name", pictured.TYPES)
def test_every_tensor_has_its_row_and_only_other_towers_have_no_axes(name, pictures):
    anatomy = open_model(pictures(name)).anatomy

    assert anatomy.whole_family is not None
    for tensor, (row, _) in anatomy.rows.items():
        if row.kind == "opaque":
            assert all(axes_of(dim) <= {"?"} for dim in row.axes)
            assert any(word in tensor for word in ("vis", "tower", "projector", "connector", "linear_attn")), tensor


def renamed(source, directory, changes, config=None):
    """Return `directory`, now holding the checkpoint under other names, and another config where one is given."""
    directory.mkdir()
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        old = next((old for old in changes if name.startswith(old)), "")
        tensors[changes.get(old, "") + name.removeprefix(old)] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config) if config else (source / "config.json").read_text()
    (directory / "config.json").write_text(text)
    return directory


def test_the_names_of_transformers_4_57_are_known_too(pictures, before, tmp_path):
    names = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model.", "": "model."}
    source = renamed(pictures("llava"), tmp_path / "renamed", names)

    surgeon.grow(source, hidden_size=144, layers=3).save(tmp_path / "wide")

    assert_same(tmp_path / "wide", before("llava"))


@pytest.mark.parametrize(("name", "key"), [("qwen2_vl", "hidden_size"), ("qwen2_5_vl", "out_hidden_size")])
def test_a_config_from_before_text_config_says_the_size_that_the_tower_writes(name, key, pictures, before, tmp_path):
    whole = json.loads((pictures(name) / "config.json").read_text())
    text = whole.pop("text_config") | {"layer_types": None}
    flat = {**text, **whole}
    source = renamed(pictures(name), tmp_path / "flat", {}, flat)

    surgeon.grow(source, hidden_size=160).save(tmp_path / "wide")

    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert (config["hidden_size"], config["vision_config"][key]) == (160, 160)
    assert_same(tmp_path / "wide", before(name))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_head_with_sections_of_positions_keeps_its_size(name, pictures):
    with pytest.raises(PlanError, match="sections for time, height and width"):
        surgeon.grow(pictures(name), hidden_size="2x", head_dim="2x")


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_model_that_sees_is_evaluated_and_scored_on_text_and_writes(name, tmp_path):
    """Its vision tower has as many layers as its language model, and other names in the files than in memory."""
    source, text = pictured.talker(name, tmp_path / "toy"), talkers.written(tmp_path / "text.txt")
    tokens = talkers.tokenizer_of()(talkers.TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = AutoModelForImageTextToText.from_pretrained(source)

    evaluation = surgeon.evaluate(source, data=[text])
    pruned = surgeon.prune(source, layers=1, intermediate_size=20, score="angular", data=[text])

    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert evaluation.to_dict()["loss"] == pytest.approx(loss, abs=1e-5)  # float32, two orders of summing
    assert (pruned.anatomy.depth, pruned.anatomy.sizes["ffn"]) == (1, 20)
    assert surgeon.generate(source, "the cat", max_new_tokens=2).new_tokens == 2
