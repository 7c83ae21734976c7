"""Conversion of pickles and GGUF files to safetensors: the same numbers, nothing run, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import toys
from later import LATER

import surgeon
from surgeon.checkpoint.derived import wrapper_of
from surgeon.checkpoint.formats.torch_file import read_torch_file
from surgeon.errors import CheckpointError, OutputError, PlanError

if LATER:
    import torch
    from safetensors.torch import load_file, save_file


# Families whose modules and files have the same names, so that a state dict is a checkpoint.
FAMILIES = ["llama", "llama-tied", "gpt2", "opt", "opt-post-norm", "gemma2", "qwen3", "phi3", "olmo2"]
FAMILIES += ["bloom", "falcon", "t5", "t5-gated", "bart", "bert", "roberta"]


def state_dict(directory: Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a toy: tied tensors under each of their names, sharing one storage."""
    return toys.load(directory, dtype="auto")[0].state_dict()


def pickled(directory: Path, state: Any, *, config: Path, **options: Any) -> Path:
    """Return `directory`, now a checkpoint with `state` in pytorch_model.bin and the config of `config`."""
    directory.mkdir()
    shutil.copy(config / "config.json", directory)
    torch.save(state, directory / "pytorch_model.bin", **options)
    return directory


def sharded(directory: Path, state: dict[str, torch.Tensor], *, config: Path) -> Path:
    """Return `directory`, now a checkpoint with `state` in three pickles and an index."""
    directory.mkdir()
    shutil.copy(config / "config.json", directory)
    shards = {f"pytorch_model-{number:05d}-of-00003.bin": list(state)[number - 1 :: 3] for number in (1, 2, 3)}
    for shard, names in shards.items():
        torch.save({name: state[name] for name in names}, directory / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def assert_same_tensors(one: Path, other: Path) -> None:
    found, expected = (load_file(directory / "model.safetensors") for directory in (one, other))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pickle_becomes_the_checkpoint_that_transformers_writes(name, legacy, toy, tmp_path):
    options = {"_use_new_zipfile_serialization": not legacy}
    source = pickled(tmp_path / "old", state_dict(toy(name)), config=toy(name), **options)

    surgeon.convert(source).save(tmp_path / "new")

    assert_same_tensors(tmp_path / "new", toy(name))
    assert not any(toys.load(tmp_path / "new")[1].values())


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "mpt"])
def test_a_pickle_with_the_names_of_files_keeps_its_bytes(name, toy, tmp_path):
    source = pickled(tmp_path / "old", load_file(toy(name) / "model.safetensors"), config=toy(name))

    surgeon.convert(source).save(tmp_path / "new")

    assert_same_tensors(tmp_path / "new", toy(name))


def test_a_sharded_pickle_becomes_the_checkpoint_that_transformers_writes(toy, tmp_path):
    source = sharded(tmp_path / "old", state_dict(toy("llama")), config=toy("llama"))

    surgeon.convert(source).save(tmp_path / "new")

    assert_same_tensors(tmp_path / "new", toy("llama"))


def test_a_pickle_in_bfloat16_keeps_its_bytes(tmp_path):
    original = toys.build("llama", tmp_path / "original", dtype="bfloat16")
    source = pickled(tmp_path / "old", state_dict(original), config=original)

    surgeon.convert(source).save(tmp_path / "new")

    assert load_file(tmp_path / "new/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert_same_tensors(tmp_path / "new", original)


def test_a_pickle_is_stored_in_the_dtype_asked_for(toy, tmp_path):
    source = pickled(tmp_path / "old", state_dict(toy("llama")), config=toy("llama"))
    rounded = toys.build("llama", tmp_path / "rounded", dtype="bfloat16")

    surgeon.convert(source).save(tmp_path / "new", dtype="bfloat16")

    assert_same_tensors(tmp_path / "new", rounded)


def test_tensors_that_are_not_contiguous_are_laid_out_and_the_temporary_file_goes(toy, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    state = state_dict(toy("llama"))
    wide = torch.zeros(48, 300)
    for name in [name for name in state if "q_proj" in name]:
        state[name] = state[name].t().contiguous().t()
    name = "model.layers.2.self_attn.o_proj.weight"
    wide[:, 5:165:2] = state[name]
    state[name] = wide[:, 5:165:2]
    state["model.norm.weight"] = torch.tensor(1.5).expand(48)
    source = pickled(tmp_path / "old", state, config=toy("llama"))

    surgeon.convert(source).save(tmp_path / "new")

    found = load_file(tmp_path / "new/model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert not list((tmp_path / "temporary").iterdir())


def test_views_that_overlap_are_written_whole(toy, tmp_path):
    state = state_dict(toy("llama"))
    block = torch.randn(3 * 48)
    state["model.layers.0.input_layernorm.weight"] = block[:48]
    state["model.layers.1.input_layernorm.weight"] = block[24:72]
    state["model.layers.2.input_layernorm.weight"] = block[:48]  # shared by two layers: no config says so
    source = pickled(tmp_path / "old", state, config=toy("llama"))

    surgeon.convert(source).save(tmp_path / "new")

    found = load_file(tmp_path / "new/model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(("says", "stored"), [(True, False), (False, True), (None, True)])
def test_a_head_that_shares_its_storage_is_stored_unless_the_config_ties_it(says, stored, toy, tmp_path):
    source = pickled(tmp_path / "old", state_dict(toy("llama-tied")), config=toy("llama-tied"))
    config = json.loads((source / "config.json").read_text())
    config.pop("tie_word_embeddings")  # Llama's default: not tied
    (source / "config.json").write_text(json.dumps(config | ({} if says is None else {"tie_word_embeddings": says})))

    surgery = surgeon.convert(source)
    summary = surgery.save(tmp_path / "new")

    assert ("lm_head.weight" in load_file(tmp_path / "new/model.safetensors")) == stored
    assert any("lm_head.weight" in note for note in summary.notes) == (not stored)
    assert not any(toys.load(tmp_path / "new")[1].values())


def test_layer_norms_of_2019_get_the_names_of_today(toy, tmp_path):
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state_dict(toy("bert")).items()
    }
    source = pickled(tmp_path / "old", old, config=toy("bert"), _use_new_zipfile_serialization=False)

    surgeon.convert(source).save(tmp_path / "new")

    assert any("gamma" in name for name in old)
    assert_same_tensors(tmp_path / "new", toy("bert"))


def test_buffers_of_old_files_are_left_out(toy, tmp_path):
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for layer in range(6)}
    constants = {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(6)}
    source = pickled(tmp_path / "old", state_dict(toy("gpt2")) | masks | constants, config=toy("gpt2"))

    summary = surgeon.convert(source).save(tmp_path / "new")

    assert "11 more buffers" in summary.notes[-1]
    assert_same_tensors(tmp_path / "new", toy("gpt2"))


def test_a_result_never_replaces_its_source(toy, tmp_path):
    source = pickled(tmp_path / "old", state_dict(toy("llama")), config=toy("llama"))

    with pytest.raises(OutputError, match="is what SRC reads"):
        surgeon.convert(source).save(source, overwrite=True)


def test_entries_without_numbers_are_left_out_and_named(toy, tmp_path):
    state = OrderedDict(state_dict(toy("llama")), version=3, _extra_state=None)
    source = pickled(tmp_path / "old", state, config=toy("llama"))

    summary = surgeon.convert(source).save(tmp_path / "new")

    assert_same_tensors(tmp_path / "new", toy("llama"))
    assert [note.split()[0] for note in summary.notes] == ["version", "_extra_state"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_dtype_is_where_the_file_says(legacy, tmp_path):
    if legacy:  # torch itself fails to save its newer dtypes in the old format
        names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64"
    else:
        names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 uint16 uint32 uint64"
        names += " float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    random = torch.randint(0, 2, (7, 5, 8), dtype=torch.uint8)
    tensors = {name: random[1:].view(getattr(torch, name)).clone() for name in names.split()}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "parameter": torch.nn.Parameter(torch.ones(2))}
    torch.save(tensors, tmp_path / "tensors.bin", _use_new_zipfile_serialization=not legacy)
    save_file(tensors, tmp_path / "tensors.safetensors")

    found = read_torch_file(tmp_path / "tensors.bin").tensors

    data = (tmp_path / "tensors.bin").read_bytes()
    expected = surgeon.checkpoint.header.read_header(tmp_path / "tensors.safetensors")
    assert {name: view.spec for name, view in found.items()} == {name: entry.spec for name, entry in expected.items()}
    for name, view in found.items():
        assert view.is_contiguous
        assert data[view.start : view.end] == tensors[name].detach().flatten().view(torch.uint8).numpy().tobytes()


def test_converting_a_pickle_imports_no_torch(toy, tmp_path):
    source = pickled(tmp_path / "old", state_dict(toy("llama")), config=toy("llama"))
    code = "import sys, surgeon; surgeon.convert(sys.argv[1]).save(sys.argv[2]); print('torch' in sys.modules)"

    command = [sys.executable, "-c", code, source, tmp_path / "new"]
    environment = os.environ | {"PYTHONPATH": str(Path(surgeon.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    assert done.stdout == "False\n"


def test_the_other_files_of_the_checkpoint_come_along(toy, tmp_path):
    source = pickled(tmp_path / "old", state_dict(toy("llama")), config=toy("llama"))
    (source / "tokenizer.json").write_text("{}")
    (source / "training_args.bin").write_bytes(b"\0")

    surgery = surgeon.convert(source)
    surgery.save(tmp_path / "new")

    assert surgery.name == "old-convert"
    files = {path.name for path in (tmp_path / "new").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "surgeon.json", "tokenizer.json"}
    assert (tmp_path / "new/config.json").read_text() == (source / "config.json").read_text() + "\n" * (
        not (source / "config.json").read_text().endswith("\n")
    )


def test_a_pickle_is_found_by_its_own_name_too(toy, tmp_path):
    source = pickled(tmp_path / "old", state_dict(toy("llama")), config=toy("llama"))

    surgery = surgeon.convert(source / "pytorch_model.bin")
    surgery.save(tmp_path / "new")

    assert surgery.name == "old-convert"
    assert_same_tensors(tmp_path / "new", toy("llama"))


# --- what is refused ----------------------------------------------------------------------------------------------


class Payload:
    """Unpickles by running a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_with_a_payload_is_refused_and_not_run(legacy, toy, tmp_path):
    state = state_dict(toy("llama")) | {"payload": Payload(f"touch {tmp_path}/run")}
    source = pickled(tmp_path / "old", state, config=toy("llama"), _use_new_zipfile_serialization=not legacy)

    with pytest.raises(CheckpointError, match=r"^pytorch_model.bin holds more than tensors: 'posix.system'$"):
        surgeon.convert(source)

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda: {"nested": torch.ones(2)}, "a dict under 'odd'"),
        (lambda: torch.ones(2, 2).to_sparse(), "_rebuild_sparse_tensor"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "marked"),
        (lambda: torch.ones(2, dtype=torch.complex128), "ComplexDoubleStorage"),
        (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused_by_name(value, named, toy, tmp_path):
    source = pickled(tmp_path / "old", state_dict(toy("llama")) | {"odd": value()}, config=toy("llama"))

    with pytest.raises(CheckpointError, match=named):
        surgeon.convert(source)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_truncated_pickle_is_refused_wherever_it_ends(legacy, toy, tmp_path):
    options = {"_use_new_zipfile_serialization": not legacy}
    file = pickled(tmp_path / "old", state_dict(toy("llama")), config=toy("llama"), **options) / "pytorch_model.bin"
    whole = file.read_bytes()

    for size in (0, 3, 10, 100, 5000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin (is|claims)"):
            surgeon.convert(file.parent)


def test_damaged_bytes_never_end_in_another_error(toy, tmp_path):
    torch.save({"a": torch.ones(3, 4), "b": torch.ones(2)}, tmp_path / "zip.bin")
    torch.save({"a": torch.ones(3, 4)}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    random = torch.Generator().manual_seed(0)

    for original in ("zip.bin", "legacy.bin"):
        whole = (tmp_path / original).read_bytes()
        for _ in range(1000):
            damaged = bytearray(whole)
            for place in torch.randint(len(whole), (4,), generator=random).tolist():
                damaged[place] = int(torch.randint(256, (), generator=random))
            (tmp_path / "damaged.bin").write_bytes(damaged)
            try:
                views = read_torch_file(tmp_path / "damaged.bin").tensors
            except CheckpointError:
                continue
            assert all(view.end <= len(whole) for view in views.values())


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    torch.save({"secret": torch.ones(7), "a": torch.ones(3)}, tmp_path / "honest.bin")
    with zipfile.ZipFile(tmp_path / "honest.bin") as old, zipfile.ZipFile(tmp_path / "lying.bin", "w") as new:
        for name in old.namelist():  # a shape is pickled as K\x03\x85: the number 3, then a tuple of one
            new.writestr(name, old.read(name).replace(b"K\x03\x85", b"K\x04\x85"))

    with pytest.raises(CheckpointError, match="'a' reaches beyond its storage"):
        read_torch_file(tmp_path / "lying.bin")


def test_compressed_data_is_refused(tmp_path):
    torch.save({"a": torch.ones(300)}, tmp_path / "honest.bin")
    with (
        zipfile.ZipFile(tmp_path / "honest.bin") as old,
        zipfile.ZipFile(tmp_path / "small.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))

    with pytest.raises(CheckpointError, match="compresses"):
        read_torch_file(tmp_path / "small.bin")


@pytest.mark.parametrize("place", ["../outside/pytorch_model.bin", "/etc/passwd", "..", "a/b.bin"])
def test_an_index_that_leaves_the_directory_is_refused(place, toy, tmp_path):
    source = sharded(tmp_path / "old", state_dict(toy("llama")), config=toy("llama"))
    index = json.loads((source / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = place
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        surgeon.convert(source)


def test_a_missing_shard_is_named(toy, tmp_path):
    source = sharded(tmp_path / "old", state_dict(toy("llama")), config=toy("llama"))
    (source / "pytorch_model-00002-of-00003.bin").unlink()

    with pytest.raises(CheckpointError, match=r"shard 2 of 3 is missing: .*pytorch_model-00002-of-00003.bin"):
        surgeon.convert(source)


def test_a_tensor_that_is_not_in_its_shard_is_named(toy, tmp_path):
    source = sharded(tmp_path / "old", state_dict(toy("llama")), config=toy("llama"))
    index = json.loads((source / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["model.lost.weight"] = "pytorch_model-00002-of-00003.bin"
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match=r"'model.lost.weight' in pytorch_model-00002-of-00003.bin"):
        surgeon.convert(source)


def test_a_missing_tensor_is_named(toy, tmp_path):
    state = state_dict(toy("llama"))
    del state["model.layers.3.mlp.up_proj.weight"]
    source = pickled(tmp_path / "old", state, config=toy("llama"))

    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.3.mlp.up_proj.weight'"):
        surgeon.convert(source)


def test_there_must_be_something_to_convert(toy, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(toy("llama") / "config.json", empty)
    pointer = tmp_path / "pointer"
    pointer.mkdir()
    shutil.copy(toy("llama") / "config.json", pointer)
    (pointer / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")

    cases = {
        tmp_path / "nowhere": "no such file",
        toy("llama"): "safetensors checkpoint already",
        empty: "nothing to convert",
        pointer: "Git LFS pointer",
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            surgeon.convert(path)


# --- GGUF ---------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 260}  # multiples of 32: a row of Q8_0 blocks
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def write_gguf(
    path: Path, original: Path, quantization: str, *, pre_tokenizer: str = "gpt-2"
) -> dict[str, torch.Tensor]:
    """Return the numbers that GGUF file `path` now holds: those of the Llama toy `original`, quantized."""
    gguf = pytest.importorskip("gguf")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    kind = gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(6)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_key_length(10)
    writer.add_value_length(10)
    writer.add_rope_dimension_count(10)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    tokens = ["<pad>", "<s>", "</s>", *bytes_to_unicode().values(), "ĠĠ"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}</s>{% endfor %}")
    numbers = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        stored = name
        for ours, theirs in GGUF_NAMES.items():
            stored = stored.replace(ours, theirs)
        fits = tensor.ndim == 2 and (quantization == "F16" or tensor.shape[-1] % 32 == 0)
        used = kind if fits else gguf.GGMLQuantizationType.F32
        numbers[name] = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), used), used).copy())
        heads = {"q_proj": 8, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # llama.cpp wants the two halves of a rotary pair side by side
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(stored, gguf.quantize(tensor.contiguous().numpy(), used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Llama toy whose sizes suit GGUF."""
    return toys.build("llama", tmp_path_factory.mktemp("gguf") / "llama", **SIZES)


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0"])
def test_a_gguf_becomes_a_checkpoint_with_its_dequantized_numbers(quantization, llama, tmp_path):
    expected = write_gguf(tmp_path / "toy.gguf", llama, quantization)

    surgery = surgeon.convert(tmp_path / "toy.gguf", staging=tmp_path / "staging")
    surgery.save(tmp_path / "new")

    found = load_file(tmp_path / "new/model.safetensors")
    assert surgery.name == "toy-convert"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(toys.load(tmp_path / "new")[1].values())


def test_a_gguf_brings_its_tokenizer_and_leaves_no_temporary_file(llama, tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "toy.gguf", llama, "Q8_0")

    surgeon.convert(tmp_path / "toy.gguf", staging=tmp_path / "staging").save(tmp_path / "new", dtype="bfloat16")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    text = "Naïve 日本語 🤖\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi</s>"
    assert json.loads((tmp_path / "new/config.json").read_text())["dtype"] == "bfloat16"
    assert not list((tmp_path / "staging").iterdir())


@pytest.mark.parametrize(("pre_tokenizer", "expected"), [("gpt-2", ["Ġ", "Ġ", "1"]), ("smollm", ["ĠĠ", "1"])])
def test_digits_are_split_off_as_the_file_says(pre_tokenizer, expected, llama, tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "toy.gguf", llama, "F16", pre_tokenizer=pre_tokenizer)

    surgeon.convert(tmp_path / "toy.gguf").save(tmp_path / "new")

    assert AutoTokenizer.from_pretrained(tmp_path / "new").tokenize("  1") == expected


def test_code_beside_a_gguf_never_runs(llama, tmp_path, run, monkeypatch):
    write_gguf(tmp_path / "toy.gguf", llama, "F16")
    auto_map = {"AutoTokenizer": ["code.Tokenizer", None], "AutoConfig": "code.Config"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: ...\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))

    run("convert", tmp_path / "toy.gguf", "-o", tmp_path / "new")

    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGML, an older format")

    with pytest.raises(CheckpointError, match=r"model.gguf is not a GGUF file"):
        surgeon.convert(tmp_path / "model.gguf")


def test_a_truncated_gguf_is_refused_wherever_it_ends(llama, tmp_path):
    write_gguf(tmp_path / "toy.gguf", llama, "Q8_0")
    whole = (tmp_path / "toy.gguf").read_bytes()

    for size in (4, 20, 100, 3000, len(whole) // 2, len(whole) - 64):
        (tmp_path / "toy.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"toy.gguf is truncated or damaged"):
            surgeon.convert(tmp_path / "toy.gguf", staging=tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["toy.gguf"]


def test_an_architecture_that_transformers_cannot_read_is_refused_by_name(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "zorg")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(CheckpointError, match="architecture 'zorg'"):
        surgeon.convert(tmp_path / "odd.gguf", staging=tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def test_a_gguf_without_the_gguf_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("surgeon.checkpoint.formats.gguf.find_spec", lambda _: None)

    with pytest.raises(CheckpointError) as caught:
        surgeon.convert(tmp_path / "model.gguf")

    assert caught.value.hint == 'pip install "surgeon[gguf]"'


# What training tools leave behind


@pytest.mark.parametrize(
    ("wrapper", "inner"),
    [
        ("_orig_mod.", "model"),
        ("module.", None),
        ("base_model.model.", "state_dict"),
        ("module._orig_mod.", "model_state_dict"),
    ],
)
def test_what_a_training_tool_puts_before_all_names_is_taken_off_and_said(tmp_path, wrapper, inner):
    toy = toys.build("llama", tmp_path / "toy")
    state = {wrapper + name: tensor for name, tensor in load_file(toy / "model.safetensors").items()}
    saved = state if inner is None else {inner: state, "optimizer": {"state": {0: torch.ones(2)}}, "step": 3}

    surgery = surgeon.convert(pickled(tmp_path / "trained", saved, config=toy))
    surgery.save(tmp_path / "out")

    assert_same_tensors(tmp_path / "out", toy)
    assert f"taken off the names of all {len(state)} tensors: {wrapper}" in surgery.plan.all_notes
    beside = [] if inner is None else ["optimizer", "step"]
    left_out = [note for note in surgery.plan.all_notes if "left out" in note]
    assert left_out == [f"{name} is not a tensor and is left out" for name in beside]


def test_a_safetensors_checkpoint_with_such_names_is_converted_too(tmp_path):
    toy = toys.build("llama", tmp_path / "toy")
    wrapped = tmp_path / "wrapped"
    shutil.copytree(toy, wrapped)
    state = load_file(toy / "model.safetensors")
    save_file({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, wrapped / "model.safetensors")

    surgeon.convert(wrapped).save(tmp_path / "out")

    assert_same_tensors(tmp_path / "out", toy)
    with pytest.raises(CheckpointError, match="is a safetensors checkpoint already"):
        surgeon.convert(toy)


@pytest.mark.parametrize("name", ["ckpt.pt", "last.ckpt", "model.pth"])
def test_a_file_of_a_training_script_is_named_itself(tmp_path, name):
    toy = toys.build("llama", tmp_path / "toy")
    directory = pickled(tmp_path / "trained", {"model": state_dict(toy)}, config=toy)
    (directory / "pytorch_model.bin").rename(directory / name)

    surgeon.convert(directory / name).save(tmp_path / "out")

    assert_same_tensors(tmp_path / "out", toy)


def test_a_prefix_that_some_tensors_lack_stays():
    assert wrapper_of(["module.a", "module.b"]) == "module."
    assert wrapper_of(["module.a", "b"]) == wrapper_of([]) == ""


def test_a_model_with_adapters_inside_is_refused_by_name(tmp_path):
    toy = toys.build("llama", tmp_path / "toy")
    state = {f"base_model.model.{name}": tensor for name, tensor in load_file(toy / "model.safetensors").items()}
    state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, 2)

    with pytest.raises(PlanError, match=r"adapters inside, .*q_proj\.lora_A\.default\.weight") as caught:
        surgeon.convert(pickled(tmp_path / "trained", state, config=toy))
    assert "merge_and_unload" in caught.value.hint


def test_a_file_of_two_models_is_refused(tmp_path):
    toy = toys.build("llama", tmp_path / "toy")
    state = {"model": {"a": torch.ones(2)}, "state_dict": {"a": torch.ones(2)}}
    with pytest.raises(CheckpointError, match="models under 'model' and 'state_dict'"):
        surgeon.convert(pickled(tmp_path / "trained", state, config=toy))


def test_a_base_is_for_an_adapter(tmp_path):
    toy = toys.build("llama", tmp_path / "toy")
    with pytest.raises(PlanError, match="--base goes with an adapter"):
        surgeon.convert(toy, base="gpt2")
