"""Links in a checkpoint are followed where they stay in it, or in the Hub's cache, and refused where they lead out."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import checkpoint, llama, snapshot

import surgeon
from surgeon.checkpoint.receipt import read_receipt
from surgeon.checkpoint.source import check_links, open_directory
from surgeon.errors import CheckpointError

SECRET = "the content of a private file"
SHARD = "model-00001-of-00002.safetensors"
LEADS_OUT = "is a link that leads out of the checkpoint: to"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return path


def lead_out(model: Path, file: str) -> None:
    """Replace a file by a link to a copy of it beside the checkpoint, or to a secret where there was none."""
    outer, path = model.parent / "outer" / file, model / file
    outer.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.replace(outer) if path.exists() else outer.write_text(SECRET)
    path.symlink_to(os.path.relpath(outer, path.parent))


READ = {
    "notes.txt": 1,
    "tokenizer.json": 1,
    "deep/er/vocab.txt": 1,
    "config.json": 1,
    "model.safetensors": 1,
    "model.safetensors.index.json": 2,
    SHARD: 2,
}


@pytest.mark.parametrize("file", READ)
def test_a_link_that_leads_out_is_refused_by_name_and_nothing_is_written(file, run, tmp_path):
    model = checkpoint(tmp_path / "model", shards=READ[file])
    lead_out(model, file)
    before = snapshot(tmp_path)

    outcome = run("truncate", model, "--layers", 2, "-o", tmp_path / "out")

    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {model / file} {LEADS_OUT} {tmp_path / 'outer' / file}\nhint: If you trust")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "inner", "../model/../secret", "directory/secret"])
def test_every_way_out_is_seen(target, secret, tmp_path):
    model = checkpoint(tmp_path / "model")
    (model / "inner").symlink_to("../secret")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/secret").write_text(SECRET)
    (model / "directory").symlink_to("../beside")
    (model / "notes.txt").symlink_to(target)

    with pytest.raises(CheckpointError, match=LEADS_OUT):
        surgeon.truncate(model, layers=2).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_that_stay_inside_and_a_model_that_is_a_link_are_followed(run, tmp_path):
    model = checkpoint(tmp_path / "disk/model")
    (model / "store").mkdir()
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        (model / file).rename(model / "store" / file)
    (model / "model.safetensors").symlink_to("store/model.safetensors")
    (model / "config.json").symlink_to(model / "store/config.json")
    (model / "tokenizer.json").symlink_to("hop")
    (model / "hop").symlink_to("../model/store/tokenizer.json")
    (tmp_path / "link").symlink_to("disk/model")

    outcome = run("truncate", tmp_path / "link", "--layers", 2, "-o", tmp_path / "out")

    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "out/tokenizer.json").is_symlink()
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"version": "1.0"}'


def test_a_directory_that_is_a_link_is_not_entered(tmp_path):
    model = checkpoint(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.txt").write_text(SECRET)
    (model / "data").symlink_to("../data")

    surgeon.truncate(model, layers=2).save(tmp_path / "out")
    assert not (tmp_path / "out/data").exists()


def test_links_among_what_is_not_read_do_not_matter(tmp_path):
    model = checkpoint(tmp_path / "model")
    for file in ("pytorch_model.bin", ".cache/thing", "checkpoint-7/notes.txt", "scores.json"):
        lead_out(model, file)

    surgeon.truncate(model, layers=2).save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["config.json", "model.safetensors", "tokenizer.json", "README.md", "surgeon.json"]
    )


# --- the Hub's cache --------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """Return a snapshot in a cache of huggingface_hub 2, whose largest file is a blob that repositories share."""
    cache = tmp_path / "hub"
    snapshot = checkpoint(cache / "models--me--model/snapshots/0123abc", shards=2)
    blobs = cache / "models--me--model/blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number}")
        path.symlink_to(f"../../blobs/{number}")
    blob = cache / "blobs/ab" / ("ab" + "0" * 62)
    blob.parent.mkdir(parents=True)
    (snapshot / SHARD).resolve().rename(blob)
    (snapshot / SHARD).parent.joinpath((snapshot / SHARD).readlink()).symlink_to(f"../../blobs/ab/{blob.name}")
    return snapshot


def test_a_snapshot_in_the_cache_is_read_through_its_links(cached, tmp_path):
    source = open_directory(cached)

    assert {name: stored.spec for name, stored in source.tensors.items()} == llama()
    assert source.companions == ["tokenizer.json"]
    check_links(cached)
    surgeon.truncate(cached, layers=2).save(tmp_path / "out")


@pytest.mark.parametrize("target", ["../../../../secret", "../../../blobs/secret", "../../refs/main", "../other/note"])
def test_a_link_in_a_snapshot_to_anything_but_a_blob_is_refused(target, cached, secret):
    place = cached / target
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(SECRET)
    (cached / "notes.txt").symlink_to(target)

    with pytest.raises(CheckpointError, match=f"notes.txt {LEADS_OUT}"):
        _ = open_directory(cached).companions


def test_a_blob_that_leads_out_of_the_cache_is_refused(cached, secret):
    (cached.parents[1] / "blobs/9").symlink_to(secret)
    (cached / "notes.txt").symlink_to("../../blobs/9")

    with pytest.raises(CheckpointError, match=f"notes.txt {LEADS_OUT} {secret}"):
        _ = open_directory(cached).companions


# --- every reader -----------------------------------------------------------------------------------------------


def test_a_receipt_and_scores_that_lead_out_are_refused(run, secret, tmp_path):
    model = checkpoint(tmp_path / "model")
    lead_out(model, "surgeon.json")
    lead_out(model, "scores.json")

    with pytest.raises(CheckpointError, match=f"surgeon.json {LEADS_OUT}"):
        read_receipt(model)
    outcome = run("prune", model, "--layers", 2, "--score", "last", "--scores-from", model, "--dry-run")
    assert f"scores.json {LEADS_OUT}" in outcome.err


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_transformers_is_not_given_a_directory_with_links_that_lead_out(file, tmp_path):
    from surgeon.models.loading import loadable
    from surgeon.surgery import open_source

    model = checkpoint(tmp_path / "model")
    assert loadable(open_source(model)) == (str(model), None)
    lead_out(model, file)
    with pytest.raises(CheckpointError, match=f"{file} {LEADS_OUT}"):
        loadable(open_source(model))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["gist.json", "adapter_config.json", "adapter_model.safetensors", "gist.safetensors"])
def test_a_compressed_prompt_with_a_link_that_leads_out_is_refused(file, tmp_path):
    import torch

    from surgeon.gist.saved import files_of, read
    from surgeon.gist.states import GistStates

    offset = 5 if file == "gist.safetensors" else 0
    states = GistStates(((torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)),), offset=offset)
    (tmp_path / "bot").mkdir()
    for name, content in files_of(states, {"token_ids": [3]}, base="m").items():
        (tmp_path / "bot" / name).write_bytes(content)
    assert read(tmp_path / "bot").about["num_tokens"] == 1
    lead_out(tmp_path / "bot", file)

    with pytest.raises(CheckpointError, match=f"{file} {LEADS_OUT}"):
        read(tmp_path / "bot")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "surgeon.json"])
def test_an_adapter_with_a_link_that_leads_out_is_refused(file, tmp_path):
    from surgeon.gist.compressor import Compressor

    (tmp_path / "adapter").mkdir()
    step = {"finetune": {"settings": {"gist_reader": "frozen"}}}
    for name, content in {"adapter_config.json": {}, "surgeon.json": {"steps": [step]}}.items():
        (tmp_path / "adapter" / name).write_text(json.dumps(content))
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"")
    model = open_directory(checkpoint(tmp_path / "model"))
    Compressor(tmp_path / "adapter").check(model)
    lead_out(tmp_path / "adapter", file)

    with pytest.raises(CheckpointError, match=f"{file} {LEADS_OUT}"):
        Compressor(tmp_path / "adapter").check(model)


BESIDE: dict[str, Callable[[Path], None]] = {
    "the pickle": lambda place: lead_out(place, "pytorch_model.bin"),
    "a companion": lambda place: lead_out(place, "notes.txt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BESIDE)
def test_a_checkpoint_to_convert_is_held_to_the_same_rule(what, run, tmp_path):
    import torch

    place = checkpoint(tmp_path / "old")
    (place / "model.safetensors").unlink()
    torch.save({name: torch.zeros(spec.shape) for name, spec in llama().items()}, place / "pytorch_model.bin")
    BESIDE[what](place)

    outcome = run("convert", place, "-o", tmp_path / "out")
    assert outcome.code == 1
    assert LEADS_OUT in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["model.gguf", "chat_template.jinja"])
def test_a_gguf_file_and_what_lies_beside_it_too(file, run, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/model.gguf").write_bytes(b"GGUF")
    lead_out(tmp_path / "old", file)

    outcome = run("convert", tmp_path / "old", "-o", tmp_path / "out")
    assert f"{file} {LEADS_OUT}" in outcome.err


def test_finetune_refuses_a_companion_that_leads_out_before_it_trains(run, tmp_path):
    model = checkpoint(tmp_path / "model")
    lead_out(model, "notes.txt")

    (tmp_path / "text.txt").write_text("The cat sat on the mat.")

    outcome = run("finetune", model, "--data", tmp_path / "text.txt", "-o", tmp_path / "out")
    assert f"notes.txt {LEADS_OUT}" in outcome.err
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("mark", ["surgeon.json", "gist.json", "run.json"])
def test_results_and_runs_that_were_saved_in_a_model_are_no_part_of_it(mark, tmp_path):
    """A run's directory holds the tokens of the text that it trained on."""
    model = checkpoint(tmp_path / "model")
    (model / "inner").mkdir()
    (model / "inner" / mark).write_text("{}")
    (model / "inner/notes.txt").write_text(SECRET)

    assert open_directory(model).companions == ["tokenizer.json"]
