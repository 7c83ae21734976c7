"""The tables against reality: tiny checkpoints with pairwise distinct sizes, saved by transformers."""

import json
from dataclasses import replace
from pathlib import Path

import encoders
import pictured
import pytest
import tabled
import toys
from later import LATER

import surgeon
from surgeon.anatomy.anatomy import read_anatomy
from surgeon.anatomy.axes import Places, parse, places, shape
from surgeon.anatomy.families import FAMILIES
from surgeon.checkpoint.header import TensorSpec
from surgeon.checkpoint.source import spec_of
from surgeon.errors import CheckpointError, PlanError
from surgeon.surgery import open_source

if LATER:
    import torch
    from safetensors.torch import load_file, save_file

UNTABLED = [name for name in toys.TOYS if name.partition("-")[0] not in FAMILIES]


def test_every_family_of_the_tables_has_a_toy():
    tested = {name.partition("-")[0] for name in (*toys.TABLED, *tabled.TYPES)}
    tested |= {str(config["text_config"]["model_type"]) for config in pictured.TYPES.values()}
    assert set(FAMILIES) <= tested | {name.partition(" ")[0] for name in encoders.TYPES}


@pytest.mark.parametrize("name", toys.TABLED)
def test_every_tensor_that_transformers_writes_has_the_shape_that_the_table_says(name, toy):
    anatomy = read_anatomy(spec_of(open_source(toy(name))))

    for tensor, spec in anatomy.spec.tensors.items():
        row, part = anatomy.row(tensor)
        assert shape(row.axes, anatomy.sizes) == spec.shape, tensor
        assert part != "buffer"


@pytest.mark.parametrize("name", toys.TABLED)
def test_a_checkpoint_that_lacks_any_one_tensor_is_refused_by_its_name(name, toy):
    spec = spec_of(open_source(toy(name)))

    for missing in spec.tensors:
        if "expert" in missing and "experts.3" not in missing:
            continue  # one expert stands for all
        rest = {tensor: value for tensor, value in spec.tensors.items() if tensor != missing}
        with pytest.raises(CheckpointError, match=missing.replace(".", r"\.").replace("[", r"\[")):
            read_anatomy(replace(spec, tensors=rest))


@pytest.mark.parametrize("name", toys.TABLED)
def test_a_tensor_of_another_shape_or_an_unknown_one_is_refused(name, toy):
    spec = spec_of(open_source(toy(name)))

    for tensor, value in spec.tensors.items():
        longer = TensorSpec(value.dtype, (value.shape[0] + 1, *value.shape[1:]))
        with pytest.raises(CheckpointError, match="but config.json implies|^config.json says vocab_size"):
            read_anatomy(replace(spec, tensors=dict(spec.tensors) | {tensor: longer}))
    extra = dict(spec.tensors) | {"adapter.weight": TensorSpec("F32", (3,))}
    with pytest.raises(CheckpointError, match=r"'adapter\.weight' is not a tensor of a"):
        read_anatomy(replace(spec, tensors=extra))


@pytest.mark.parametrize("name", UNTABLED)
def test_a_family_without_a_table_is_known_by_its_layers_alone(name, toy):
    anatomy = read_anatomy(spec_of(open_source(toy(name))))

    assert anatomy.depth == 6
    assert anatomy.family is None
    with pytest.raises(PlanError, match="only whole layers can be moved"):
        anatomy.require_family()


def test_old_gpt2_files_without_prefix_and_with_mask_buffers_are_read_and_cut(toy, tmp_path):
    """The first GPT-2 checkpoints on the Hub were saved from the headless model, causal masks included."""
    source = tmp_path / "gpt2"
    source.mkdir()
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(toy("gpt2") / "model.safetensors").items()
    }
    for layer in range(6):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((toy("gpt2") / "config.json").read_text())
    for key in ("tie_word_embeddings", "dtype"):
        config.pop(key)
    (source / "config.json").write_text(json.dumps(config))

    surgeon.truncate(source, layers=4).save(tmp_path / "cut")

    model, report = toys.load(tmp_path / "cut")
    reference, _ = toys.load(toy("gpt2"))
    assert not any(report.values())
    with toys.bypass(reference, [4, 5]):
        assert torch.equal(toys.logits(model), toys.logits(reference))


def test_the_grammar_reads_products_blocks_numbers_and_nesting():
    sizes = {"heads": 3, "head_dim": 5, "hidden": 7, "positions": 11}

    assert shape(parse("(heads head_dim) hidden"), sizes) == (15, 7)
    assert shape(parse("hidden (heads head_dim + heads 2)"), sizes) == (7, 21)
    assert shape(parse("(positions + 2) hidden"), sizes) == (13, 7)
    assert shape(parse("1 1 positions positions"), sizes) == (1, 1, 11, 11)
    assert shape(parse(""), sizes) == ()
    assert shape(parse("(heads (2 head_dim + hidden)) 4"), sizes) == (51, 4)


def test_places_of_a_nested_dimension_keep_each_block_apart():
    """Per head a query and a key of two positions; the queries double theirs, the heads swap and gain one."""
    (dim,) = parse("(heads (group qk + qk))")
    sizes = {"heads": 2, "group": 1, "qk": 2}

    def maps(axis: str, block: frozenset[str]) -> Places | None:
        if axis == "heads":
            return Places((1, 0, -1), (1.0, 3.0, 1.0))
        return Places((0, 0, 1, 1), (0.5,) * 4) if axis == "qk" and "group" in block else None

    found = places(dim, sizes, maps)

    assert found.index == (4, 4, 5, 5, 6, 7, 0, 0, 1, 1, 2, 3, -1, -1, -1, -1, -1, -1)
    assert found.scale == (0.5,) * 4 + (1.0,) * 2 + (1.5,) * 4 + (3.0,) * 2 + (0.5,) * 4 + (1.0,) * 2


def test_a_quantized_checkpoint_is_moved_by_layers_and_nothing_else(tmp_path: Path):
    """As gpt-oss is published: 4-bit blocks and their scales, which no table describes."""
    tensors = {"model.embed_tokens.weight": torch.zeros(9, 4)}
    for layer in range(3):
        tensors[f"model.layers.{layer}.mlp.experts.down_proj_blocks"] = torch.full((2, 3), layer, dtype=torch.uint8)
    config = {
        "model_type": "gpt_oss",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))

    summary = surgeon.truncate(tmp_path, layers=2).save(tmp_path / "cut")

    assert summary.layers == (3, 2)
    assert load_file(tmp_path / "cut/model.safetensors")["model.layers.1.mlp.experts.down_proj_blocks"].eq(1).all()
    with pytest.raises(PlanError, match="quantized checkpoint cannot be stored"):
        surgeon.truncate(tmp_path, layers=2).save(tmp_path / "cast", dtype="bfloat16")
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.2.mlp"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    summary = surgeon.truncate(tmp_path, layers=2).save(tmp_path / "first")
    assert summary.config_changes["quantization_config.modules_to_not_convert"] == (["model.layers.2.mlp"], [])


def test_a_stale_vocab_size_is_named_with_the_number_to_set(tmp_path):
    for name, key in (("llama", "vocab_size"), ("gpt2", "vocab_size"), ("t5", "vocab_size")):
        directory = toys.build(name, tmp_path / name)
        file = directory / "config.json"
        config = json.loads(file.read_text())
        holder = config.get("text_config", config)
        right, holder[key] = holder[key], holder[key] - 3
        file.write_text(json.dumps(config))

        with pytest.raises(CheckpointError) as caught:
            read_anatomy(spec_of(open_source(directory)))

        assert str(caught.value).startswith(f"config.json says {key} = {right - 3}, and '")
        assert str(caught.value).endswith(f"' has {right}")
        assert caught.value.hint.startswith(f'Set "{key}": {right} in config.json;')
