"""Cuts of a model on the Hub that are killed, and two at once: every end is that of a cut on the disk."""

import json
import random
from pathlib import Path

import handmade
from hub_server import HubServer
from killed_ranges import check_store, kill, started

import surgeon

KILLS = 3


def published(server: HubServer, directory: Path) -> bytes:
    """Return the weights of the first 4 of 32 layers of a model, after putting it on the Hub."""
    sizes = {"hidden_size": 80, "intermediate_size": 1000, "num_hidden_layers": 32}
    handmade.checkpoint(directory, tensors=handmade.llama(layers=32, hidden=80, ffn=1000), **sizes)
    server.commit("org/deep", {path.name: path.read_bytes() for path in directory.iterdir()})
    surgeon.truncate(directory, layers=4).save(directory / "cut")
    return (directory / "cut/model.safetensors").read_bytes()


def test_a_cut_that_is_killed_goes_on_and_ends_the_same(tmp_path):
    chance = random.Random(0)
    with HubServer() as server:
        cut = published(server, tmp_path / "model")
        server.pause = 0.1
        kept = []
        for _ in range(KILLS):
            assert kill(server, tmp_path, tmp_path / "out", chance) or (tmp_path / "out/config.json").exists()
            kept.append(check_store(tmp_path))
        server.pause = 0.0
        out, err = started(server, tmp_path, tmp_path / "out").communicate()

    assert err == ""
    assert (tmp_path / "out/model.safetensors").read_bytes() == cut
    assert kept == sorted(kept)
    assert kept[-1] > 0
    assert json.loads(out)["bytes_downloaded"] < json.loads(out)["bytes_read"]  # the killed ones left something


def test_two_cuts_at_once_end_the_same_and_download_once(tmp_path):
    with HubServer() as server:
        cut = published(server, tmp_path / "model")
        server.pause = 0.02
        both = [started(server, tmp_path, tmp_path / name) for name in ("one", "two")]
        results = [process.communicate() for process in both]

    assert [err for _, err in results] == ["", ""]
    for name in ("one", "two"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == cut
    summaries = [json.loads(out) for out, _ in results]
    assert sum(summary["bytes_downloaded"] for summary in summaries) < 1.2 * summaries[0]["bytes_read"]
    assert check_store(tmp_path) > 0
