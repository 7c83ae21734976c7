"""Spellings: what the reader finds in each toy's config is what its tensors show, and no other module knows a key."""

import ast
from pathlib import Path

import pytest
import toys

import surgeon
from surgeon.anatomy.anatomy import EXPERT_NUMBER, Anatomy, read_anatomy
from surgeon.anatomy.config import positions_in, size_of, spelled
from surgeon.anatomy.families import FAMILIES
from surgeon.anatomy.spellings import SPELLINGS
from surgeon.checkpoint.source import spec_of
from surgeon.surgery import open_source

NO_FFN_KEY = ("bloom", "mpt")  # their code makes an MLP four times as wide as the state
EXPERTS = {"deepseek_v3": 9}  # and 7 of every other toy that has some
PACKAGE = Path(surgeon.__file__).parent

# Words of surgeon's own that are also a config key of some family: options of grow and prune, axes, scores, dimensions.
OWN_WORDS = {"hidden_size", "intermediate_size", "head_dim", "experts_per_token", "activation", "dim"}
# Where another module holds a key of some family's config, and what it means there.
EXCEPTIONS = {
    ("gist/saved.py", "num_attention_heads"): "a key of PEFT's adapter_config.json",
    (
        "measure/reload.py",
        "max_position_embeddings",
    ): "an attribute of transformers' config, whatever the file calls it",
}


def anatomy_of(path: Path) -> Anatomy:
    return read_anatomy(spec_of(open_source(path)))


@pytest.mark.parametrize("name", toys.TABLED)
def test_the_reader_agrees_with_the_table(name, toy):
    anatomy = anatomy_of(toy(name))

    for axis in ("vocab", "hidden", "ffn", "heads", "experts", "expert_ffn", "positions"):
        if axis in anatomy.sizes:
            assert size_of(anatomy.spec.config, axis) == anatomy.sizes[axis], axis
    for axis in ("kv_heads", "head_dim"):  # derived from the heads where the config is silent
        assert size_of(anatomy.spec.config, axis) in (anatomy.sizes[axis], None)


@pytest.mark.parametrize("name", toys.TOYS)
def test_the_reader_agrees_with_the_tensors(name, toy):
    anatomy = anatomy_of(toy(name))
    config, stacks = anatomy.spec.config, anatomy.stacks
    inside = [(tensor, spec.shape) for tensor, spec in anatomy.spec.tensors.items() if stacks[-1].locate(tensor)]
    outside = [spec.shape for tensor, spec in anatomy.spec.tensors.items() if not stacks[0].locate(tensor)]
    lengths = {length for _, shape in inside for length in shape}
    vocab, hidden, ffn = (size_of(config, quantity) for quantity in ("vocab", "hidden", "ffn"))

    assert vocab in {shape[0] for shape in outside}
    assert hidden in lengths
    assert size_of(config, "heads") == 8  # of every toy; no tensor of most families is as long
    if name in NO_FFN_KEY:
        assert ffn is None
        assert 4 * hidden in lengths
    elif name in ("qwen3_moe", "qwen2_moe"):  # the size of a dense MLP, which none of their layers has
        assert ffn == 52
    else:
        assert {ffn, 2 * ffn} & lengths  # gate and up may lie in one tensor
    if "num_experts_per_tok" in toys.TOYS[name]:
        numbers = {number.group() for tensor, _ in inside if (number := EXPERT_NUMBER.search(tensor))}
        stacked = {shape[0] for _, shape in inside if len(shape) == 3}
        assert size_of(config, "experts") in {len(numbers), *stacked}
        assert size_of(config, "experts") == EXPERTS.get(name, 7)
        assert size_of(config, "experts_per_token") == toys.TOYS[name]["num_experts_per_tok"]
    else:
        assert size_of(config, "experts") is None


def test_a_table_comes_before_the_spellings_of_others():
    config = {"model_type": "opt", "ffn_dim": 52, "intermediate_size": 3}

    assert size_of(config, "ffn") == 52
    assert size_of(config | {"model_type": "unheard-of"}, "ffn") == 3
    assert list(spelled(config, "ffn")) == ["ffn_dim", "intermediate_size"]


def test_only_a_whole_number_is_a_size():
    assert size_of({"num_attention_heads": "8", "n_head": 4}, "heads") == 4
    assert size_of({"sliding_window": None}, "window") is None
    assert size_of({"num_experts": True}, "experts") is None


def test_a_nested_config_is_read():
    nested = {"model_type": "some-vision", "text_config": {"model_type": "gpt2", "n_embd": 80}}

    assert size_of(nested, "hidden") == 80


def test_relative_positions_are_no_limit():
    assert positions_in({"model_type": "t5", "n_positions": 512, "relative_attention_num_buckets": 32}) is None
    assert positions_in({"model_type": "gpt2", "n_positions": 64}) == 64


def test_no_module_outside_of_anatomy_spells_a_config_key():
    keys = {key for group in SPELLINGS.values() for key in group}
    keys |= {key for family in FAMILIES.values() for group in family.sizes.values() for key in group}
    used = set()
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        if place.startswith("anatomy/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in keys - OWN_WORDS:
                used.add((place, node.value))

    assert used == set(EXCEPTIONS)
