"""Scores and models from a Hub on loopback: streamed within a budget, they are those of the same files on the disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from later import LATER
from test_hub import use_endpoint, use_home

import surgeon
from surgeon.checkpoint.hub import open_hub
from surgeon.checkpoint.source import Source, open_directory

if LATER:
    import torch
    from transformers import AutoModelForCausalLM

    from surgeon.measure.scoring import ScoreRequest, perplexity, score


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy) -> Iterator[HubServer]:
    """A Hub with the model org/llama, and huggingface_hub pointed at it with an empty cache."""
    from huggingface_hub import constants

    with HubServer() as server:
        use_endpoint(monkeypatch, server.endpoint)
        use_home(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        server.commit("org/llama", {path.name: path.read_bytes() for path in toy("llama").iterdir()})
        yield server


def scores_of(source: Source) -> dict[str, Any]:
    tokens = torch.randint(0, 60, (6, 16), generator=torch.Generator().manual_seed(0))
    request = ScoreRequest(layers=["angular", "perplexity"], widths=["activation"], evaluate=True)
    scores = score(source, tokens, request)
    return {"layers": scores.layers, "widths": scores.widths, "loss": scores.loss, "after": perplexity(source, tokens)}


def magnitudes_of(source: Source) -> dict[str, Any]:
    scores = score(source, None, ScoreRequest(layers=["magnitude"], widths=["magnitude"]))
    return {"layers": scores.layers, "widths": scores.widths}


@pytest.mark.parametrize("budget", [None, "150KB"])
def test_scores_from_the_hub_are_those_of_the_disk(budget, hub, toy, tmp_path, monkeypatch):
    """Whole files where they fit the budget. Else layer by layer; each pass downloads the layers again."""
    size = (toy("llama") / "model.safetensors").stat().st_size
    if budget is not None:
        monkeypatch.setenv("SURGEON_CACHE_SIZE", budget)
    source, local = open_hub("org/llama"), open_directory(toy("llama"))

    assert scores_of(source) == scores_of(local)
    stored = sum(path.stat().st_blocks * 512 for path in (tmp_path / "home").rglob("*.sparse"))
    assert (stored == 0) == (budget is None)
    assert stored < size / 2
    assert magnitudes_of(source) == magnitudes_of(local)

    assert (source.snapshot / "model.safetensors").exists() == (budget is None)
    assert (source.transfer.nbytes == size) == (budget is None)


def test_a_dry_run_of_a_scored_cut_counts_what_the_scores_read(hub, toy):
    size = (toy("llama") / "model.safetensors").stat().st_size

    def planned(**options: Any) -> int:
        return surgeon.prune("org/llama", layers=2, protect=(0, 0), measure=False, **options).summary().bytes_downloaded

    assert planned(score="angular", data=["text.txt"]) == planned(score="magnitude") == size
    assert planned(score="last", data=["text.txt"]) == size  # for the perplexity
    assert planned(score="last") < size / 2
    assert planned(score="last", data=["text.txt"], evaluate=False) == size  # for the compensation
    assert planned(score="last", data=["text.txt"], evaluate=False, compensate=False) < size / 2


def test_ranges_are_no_model_to_transformers(hub, tmp_path):
    source = open_hub("org/llama")
    tensor = source.tensors["model.layers.1.mlp.up_proj.weight"]
    source.parts({tensor.file: [(tensor.start, tensor.end)]})
    assert list((tmp_path / "home").rglob("*.sparse"))

    with pytest.raises(OSError, match="org/llama"):
        AutoModelForCausalLM.from_pretrained("org/llama", local_files_only=True, cache_dir=tmp_path / "home/hub")
