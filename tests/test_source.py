"""A checkpoint directory as a source: which files count, what is refused, and what identifies it."""

import json
import shutil

import handmade
import pytest
from handmade import checkpoint, edit_config, llama, read_index, safetensors, shard_name, write_index

from surgeon.checkpoint.header import TensorSpec
from surgeon.checkpoint.source import fingerprint, is_companion, open_directory
from surgeon.errors import CheckpointError
from surgeon.surgery import open_source
from surgeon.text import printable

FIRST = shard_name(1, 3)


@pytest.fixture
def sharded(tmp_path):
    return checkpoint(tmp_path / "model", shards=3)


def refusal(directory) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        _ = open_source(directory).tensors
    assert caught.value.hint
    return caught.value


def test_a_sharded_checkpoint_holds_the_tensors_of_all_its_shards(sharded):
    source = open_directory(sharded)

    assert {name: stored.spec for name, stored in source.tensors.items()} == llama()
    assert {name: stored.file for name, stored in source.tensors.items()} == read_index(sharded)
    for name, stored in source.tensors.items():
        content = source.fetch(stored.file).read_bytes()[stored.start : stored.end]
        assert content == handmade.data(name, stored.spec.nbytes)


def test_where_one_file_and_an_index_lie_together_the_one_file_counts_as_in_transformers(sharded):
    (sharded / "model.safetensors").write_bytes(safetensors(llama(layers=2)))

    source = open_directory(sharded)

    assert {stored.file for stored in source.tensors.values()} == {"model.safetensors"}


# --- the index --------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named_with_its_number(sharded):
    (sharded / shard_name(2, 3)).unlink()

    assert str(refusal(sharded)) == f"shard 2 of 3 is missing: {sharded / shard_name(2, 3)}"


def test_a_tensor_that_the_index_places_in_the_wrong_shard_is_named(sharded):
    write_index(sharded, read_index(sharded) | {"model.embed_tokens.weight": shard_name(3, 3)})

    assert str(refusal(sharded)).startswith(f"{FIRST} holds 'model.embed_tokens.weight', but")


def test_a_tensor_that_the_index_omits_is_named(sharded):
    weight_map = read_index(sharded)
    del weight_map["model.embed_tokens.weight"]
    write_index(sharded, weight_map)

    message = str(refusal(sharded))
    assert message == f"{FIRST} holds 'model.embed_tokens.weight', but model.safetensors.index.json places it nowhere"


def test_a_tensor_that_only_the_index_knows_is_named(sharded):
    write_index(sharded, read_index(sharded) | {"ghost.weight": FIRST})

    assert "'ghost.weight'" in str(refusal(sharded))


def test_a_tensor_in_two_shards_is_named(sharded):
    held = [name for name, shard in read_index(sharded).items() if shard == FIRST]
    second = {name: spec for name, spec in llama().items() if read_index(sharded)[name] == shard_name(2, 3)}
    (sharded / shard_name(2, 3)).write_bytes(safetensors(second | {held[0]: llama()[held[0]]}))

    assert repr(held[0]) in str(refusal(sharded))


@pytest.mark.parametrize(
    "shard",
    [
        "../outside/x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "..",
        ".",
        "",
        "a\0b",
        7,
        None,
        ["x"],
    ],
)
def test_an_index_that_names_a_file_outside_the_directory_is_refused(shard, sharded, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/x.safetensors").write_bytes(safetensors({"model.norm.weight": TensorSpec("F32", (8,))}))
    write_index(sharded, read_index(sharded) | {"model.norm.weight": shard})

    error = refusal(sharded)

    assert f"places 'model.norm.weight' in {shard!r}, outside the checkpoint" in str(error)
    assert "Do not use this checkpoint" in error.hint


def test_a_shard_whose_name_is_too_long_for_any_file_system_is_missing(sharded):
    write_index(sharded, read_index(sharded) | {"model.norm.weight": "x" * 300})

    assert "is missing" in str(refusal(sharded))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": "x"}'])
def test_an_index_without_a_weight_map_is_named(content, sharded):
    (sharded / "model.safetensors.index.json").write_text(content)

    assert str(refusal(sharded)) == f"{sharded / 'model.safetensors.index.json'} has no weight_map"


def test_an_index_that_is_not_json_is_named_with_the_line(sharded):
    (sharded / "model.safetensors.index.json").write_text('{\n"weight_map": {\n')

    assert "index.json is not JSON" in str(refusal(sharded))
    assert "at line 3" in str(refusal(sharded))


@pytest.mark.parametrize("file", [FIRST, "config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_a_link_to_nothing_is_called_that(file, sharded):
    (sharded / file).unlink()
    (sharded / file).symlink_to("../blobs/gone")

    with pytest.raises(CheckpointError, match=f"{file} is a broken link: it points to ../blobs/gone"):
        _ = (source := open_source(sharded)).tensors, source.companions


# --- the config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1]", "is not a model config: it holds a list, not an object"),
        (b'"llama"', "it holds a str, not an object"),
        (b"null", "it holds a NoneType, not an object"),
        (b"", "is not JSON: Expecting value at line 1"),
        (b'{\n  "model_type": "llama",\n  oops\n}', "at line 3"),
        (b'{"model_type": "\xff"}', "is not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "is not JSON: maximum recursion depth"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    ],
)
def test_a_bad_config_is_named_with_the_reason(content, reason, tmp_path):
    directory = checkpoint(tmp_path / "model")
    (directory / "config.json").write_bytes(content)

    with pytest.raises(CheckpointError) as caught:
        _ = open_directory(directory).config

    assert str(caught.value).startswith(f"{directory / 'config.json'} ")
    assert reason in str(caught.value)
    assert caught.value.hint


def test_a_config_that_is_a_directory_is_named(tmp_path):
    directory = checkpoint(tmp_path / "model")
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()

    with pytest.raises(CheckpointError, match=r"cannot read .*config.json: Is a directory"):
        _ = open_directory(directory).config


# --- paths that hold no checkpoint ------------------------------------------------------------------------------


def test_a_directory_without_config_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors(llama()))

    assert str(refusal(tmp_path)) == f"{tmp_path} is not a checkpoint: it has no config.json"


def test_an_empty_directory_is_no_checkpoint(tmp_path):
    assert "is not a checkpoint" in str(refusal(tmp_path))


def test_a_directory_of_checkpoints_suggests_one_of_them(tmp_path):
    checkpoint(tmp_path / "run/final")

    assert refusal(tmp_path / "run").hint == f"Did you mean {tmp_path / 'run/final'}?"


@pytest.mark.parametrize(
    "name", ["./missing", "missing/", "/nowhere/at/all", "~nobody-of-this-name/model", "a/b/c", "x" * 300, "a\0b"]
)
def test_a_path_that_does_not_exist_is_called_that(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert str(refusal(name)) == f"no such directory: {printable(name)}"


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("model.safetensors", "Name the directory that holds it."),
        ("x.gguf", "surgeon convert"),
        ("x.bin", "surgeon convert"),
    ],
)
def test_a_path_to_a_file_is_refused(file, hint, tmp_path):
    path = tmp_path / file
    path.write_bytes(safetensors(llama()))

    error = refusal(path)

    assert str(error) == f"{path} is a file; a checkpoint is a directory"
    assert error.hint.startswith(hint)


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("pytorch_model.bin", "surgeon convert {directory}"),
        ("pytorch_model-00001-of-00002.bin", "surgeon convert {directory}"),
        ("model.Q8_0.gguf", "surgeon convert {directory}/model.Q8_0.gguf"),
        ("tf_model.h5", "A checkpoint is a directory with config.json and model.safetensors"),
    ],
)
def test_a_directory_with_weights_in_another_form_says_what_to_do(file, hint, tmp_path):
    directory = checkpoint(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    (directory / file).write_bytes(b"{}")

    error = refusal(directory)

    assert str(error) == f"{directory} has no model.safetensors"
    assert hint.format(directory=directory) in error.hint


def test_a_directory_without_config_says_what_to_do_with_what_it_has(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"{}")

    assert refusal(tmp_path).hint == f"surgeon convert {tmp_path / 'x.gguf'}"


def test_a_revision_of_a_directory_is_refused(tmp_path):
    directory = checkpoint(tmp_path / "model")

    with pytest.raises(CheckpointError, match="a revision is for a model on the Hub"):
        open_source(directory, revision="main")


# --- what travels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "modeling_x.py",
        "generation_config.json",
        "1_Pooling/config.json",
        "runs.md",
        "checkpoint-notes.txt",
        "additional_chat_templates/tool.jinja",
        "tokenizer.model",
    ],
)
def test_what_goes_with_the_weights_travels(name):
    assert is_companion(name)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "surgeon.json",
        "model.safetensors",
        "MODEL.SAFETENSORS",
        "x/y.bin",
        "model.safetensors.index.json",
        "model.fp16.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "tf_model.h5.index.json",
        "flax_model.msgpack",
        ".gitattributes",
        ".cache/huggingface/x.lock",
        "checkpoint-500/trainer_state.json",
        "runs/Nov21/events",
        "onnx/model.onnx",
        "model.gguf",
        "optimizer.pt",
        "consolidated.00.pth",
    ],
)
def test_weights_hidden_files_and_training_leftovers_stay(name):
    assert not is_companion(name)


def test_a_result_saved_inside_the_source_is_not_part_of_it(tmp_path):
    directory = checkpoint(tmp_path / "model")
    (directory / "docs").mkdir()
    (directory / "docs/usage.md").write_text("x")
    checkpoint(directory / "cut")
    (directory / "cut/surgeon.json").write_text("{}")

    assert open_directory(directory).companions == ["docs/usage.md", "tokenizer.json"]


# --- the fingerprint --------------------------------------------------------------------------------------------


def test_the_fingerprint_does_not_depend_on_place_layout_tokenizer_or_order_of_keys(tmp_path):
    one = checkpoint(tmp_path / "one")
    other = checkpoint(tmp_path / "elsewhere/other", shards=3)
    (other / "tokenizer.json").write_text("another")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(dict(reversed(config.items()))))

    assert fingerprint(open_directory(one)) == fingerprint(open_directory(other))


def test_the_fingerprint_changes_with_every_tensor_and_with_the_config(tmp_path):
    original = checkpoint(tmp_path / "original")
    source = open_directory(original)
    found = {fingerprint(source)}
    for number, stored in enumerate(source.tensors.values()):
        copy = shutil.copytree(original, tmp_path / str(number))
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[min(stored.start + 511, stored.end - 1)] ^= 1  # 512 bytes of each tensor are looked at
        (copy / "model.safetensors").write_bytes(content)
        found.add(fingerprint(open_directory(copy)))
    edit_config(original, rope_theta=1e6)
    found.add(fingerprint(open_directory(original)))

    assert len(found) == len(source.tensors) + 2


def test_the_fingerprint_changes_with_a_name_a_shape_and_a_dtype(tmp_path):
    layouts = [
        {"a": TensorSpec("F32", (2, 3)), "b": TensorSpec("F32", (1,))},
        {"a": TensorSpec("F32", (3, 2)), "b": TensorSpec("F32", (1,))},
        {"a": TensorSpec("I32", (2, 3)), "b": TensorSpec("F32", (1,))},
        {"c": TensorSpec("F32", (2, 3)), "b": TensorSpec("F32", (1,))},
    ]
    found = set()
    for number, layout in enumerate(layouts):
        directory = checkpoint(tmp_path / str(number), tensors=layout)
        header = (directory / "model.safetensors").read_bytes()[:-28]
        (directory / "model.safetensors").write_bytes(header + bytes(28))  # the same numbers everywhere
        found.add(fingerprint(open_directory(directory)))

    assert len(found) == len(layouts)
