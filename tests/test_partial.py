"""Tables that name the MLP alone: it grows and shrinks exactly, and all else is refused with the reason."""

import json
from functools import cache

import every_type
import pytest
from later import LATER
from test_narrow import narrowed, silent

import surgeon
from surgeon.errors import PlanError
from surgeon.surgery import open_model
from surgeon.transforms.narrow import Kept, layers_with

if LATER:
    import torch
    from exact64 import EXACT, Exact64, difference
    from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

# One type of every other table; benchmarks/families.py tries all types.
TYPES = (
    *("afmoe", "cohere2_moe", "ctrl", "fuyu", "gte", "jamba", "lfm3", "longt5", "m2m_100", "molmo2_text", "mpnet"),
    *("nanochat", "phi4_multimodal"),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a function from a model type to its toy in float64, built once. Read-only."""

    def build(name):
        directory = tmp_path_factory.mktemp("partial")
        config = every_type.small_config(name).to_dict()
        both = {"encoder_ffn_dim": config["decoder_ffn_dim"]} if "encoder_ffn_dim" in config else {}
        every_type.build(name, directory / "32", **both)
        every_type.load(directory / "32", dtype=torch.float64)[0].save_pretrained(directory / "64")
        return directory / "64"

    return cache(build)


def logits64(directory):
    model, report = every_type.load(directory, dtype=torch.float64)
    assert not any(report.values()), report
    with Exact64():
        return every_type.logits(model)


@pytest.mark.parametrize("name", TYPES)
def test_an_mlp_grows_exactly_and_loses_what_holds_nothing(name, small, tmp_path):
    anatomy = open_model(small(name)).anatomy
    layers = sorted(layers_with(anatomy, "ffn"))
    half = anatomy.sizes["ffn"] // 2

    surgeon.grow(small(name), intermediate_size=anatomy.sizes["ffn"] + 15).save(tmp_path / "wide")
    assert difference(logits64(tmp_path / "wide"), logits64(small(name))) <= EXACT

    kept = Kept(ffn={layer: tuple(range(layer % 4, half + layer % 4)) for layer in layers})
    source = silent(small(name), tmp_path / "silent", kept)
    assert difference(logits64(narrowed(source, tmp_path / "cut", kept)), logits64(source)) <= EXACT
    assert difference(logits64(source), logits64(small(name))) > EXACT  # so the neurons that went were no idle ones


@pytest.mark.parametrize("size", ["hidden_size", "attention_heads", "key_value_heads", "head_dim"])
def test_what_the_table_does_not_name_is_refused_with_the_reason(size, small):
    with pytest.raises(PlanError, match="names the MLP alone"):
        surgeon.grow(small("nanochat"), **{size: "2x"})
    if size != "head_dim":
        with pytest.raises(PlanError, match="names the MLP alone"):
            surgeon.prune(small("nanochat"), **{size: 4})


def test_a_checkpoint_that_its_table_does_not_fit_is_still_cut_in_depth(small, tmp_path):
    source = tmp_path / "odd"
    source.mkdir()
    for file in small("nanochat").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 57}))

    with pytest.raises(PlanError, match=r"no table of its tensors that fits it \(.*fc1.* config.json implies \[57"):
        surgeon.grow(source, intermediate_size="2x")
    assert surgeon.truncate(source, layers=2).plan.layer_map == (0, 1)


def test_inspect_shows_the_one_size_and_says_that_the_table_is_no_more_than_that(small):
    shown = surgeon.inspect(small("nanochat"))

    assert shown.sizes == {"ffn": 56}
    assert "the table speaks of some axes" in str(shown)


def test_the_neurons_of_least_weight_go_first(small, tmp_path):
    surgeon.prune(small("nanochat"), intermediate_size=20, score="magnitude").save(tmp_path / "cut")
    before, after = (load_file(path / "model.safetensors") for path in (small("nanochat"), tmp_path / "cut"))

    for layer in range(every_type.DEPTH):
        name = f"model.layers.{layer}.mlp.fc{{}}.weight"
        write, read = before[name.format(1)], before[name.format(2)]
        stay = (write.abs().sum(1) + read.abs().sum(0)).topk(20).indices.sort().values
        assert torch.equal(after[name.format(1)], write[stay])
        assert torch.equal(after[name.format(2)], read[:, stay])
