"""The benchmark for GPUs, dry: with toys on the CPU. What a card computes is not tested here."""

import json
from argparse import Namespace

import gpu
import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("name", ["exact", "speed", "accelerate", "scores", "gist", "adapters", "stream"])
def test_a_part_runs_dry_on_the_cpu(place, name):
    ended = gpu.one(name, Namespace(device="cpu", tiny=True, data=[]), place)

    assert ended["state"] == "done"
    judged = [value for value in ended["found"].values() if isinstance(value, dict) and "holds" in value]
    assert all(value["holds"] for value in judged)
    assert bool(judged) == (name in ("exact", "scores", "gist", "adapters"))


def test_a_part_that_fails_or_takes_too_long_is_told_and_ended(tmp_path):
    failed = gpu.guarded("speed", ["--out", str(tmp_path), "--budget", "much"], tmp_path, 60)
    ended = gpu.guarded("speed", ["--out", str(tmp_path), "--device", "cpu"], tmp_path, 0.2)

    assert (failed["state"], ended["state"]) == ("failed", "failed")
    assert "invalid float value: 'much'" in failed["why"]
    assert ended["why"] == "it was ended after 0 seconds"


def test_a_part_that_cannot_run_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    ended = gpu.one("qlora", Namespace(device="cpu", tiny=True, data=[]), tmp_path)

    assert ended == {"state": "skipped", "why": "bitsandbytes is not installed"}


def test_parts_beyond_the_budget_are_skipped_and_told(tmp_path):
    gpu.main(["--out", str(tmp_path), "--budget", "0", "--device", "cpu", "--tiny"])

    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {part["state"] for part in parts.values()} == {"skipped"}
    assert list(parts) == list(gpu.PARTS)
    assert "## speed: skipped" in (tmp_path / "gpu.md").read_text()
