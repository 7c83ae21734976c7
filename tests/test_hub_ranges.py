"""Weights by byte ranges from a Hub on loopback: what is downloaded, what is refused, and what is left on the disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import handmade
import pytest
from hub_server import FAULTS, HubServer
from test_hub import use_endpoint, use_home

import surgeon
from surgeon.checkpoint import hub_http, hub_ranges

LAYERS = 32
SIZES = {"hidden_size": 80, "intermediate_size": 2000, "num_hidden_layers": LAYERS}


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 32 layers of 2 MB, in one file. Read-only."""
    tensors = handmade.llama(layers=LAYERS, hidden=80, ffn=2000)
    return handmade.checkpoint(tmp_path_factory.mktemp("deep") / "model", tensors=tensors, **SIZES)


@pytest.fixture(scope="session")
def cut(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of its first 4 layers, cut from the disk."""
    out = tmp_path_factory.mktemp("cut") / "local"
    surgeon.truncate(deep, layers=4).save(out)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub, with huggingface_hub pointed at it, an empty cache, no token, and little patience."""
    from huggingface_hub import constants

    with HubServer() as server:
        use_endpoint(monkeypatch, server.endpoint)
        use_home(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2.0)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(hub_http, "BACKOFF", (0.01,) * len(hub_http.BACKOFF))
        monkeypatch.setattr(hub_ranges, "BACKOFF", (0.01,) * len(hub_http.BACKOFF))
        yield server


def publish(hub: HubServer, directory: Path, **access: Any) -> None:
    hub.commit("org/deep", {path.name: path.read_bytes() for path in directory.iterdir()}, **access)


def truncated(out: Path) -> tuple[bytes, surgeon.Summary]:
    """Return the weights of the first 4 layers of the model on the Hub, and the summary."""
    summary = surgeon.truncate("org/deep", layers=4).save(out)
    return (out / "model.safetensors").read_bytes(), summary


def ranges_of(home: Path) -> Path:
    return next(home.glob("assets/surgeon/*/*/ranges"))


# --- what is downloaded ---


def test_a_cut_downloads_the_bytes_that_it_needs_and_is_that_of_the_disk(hub, deep, cut, tmp_path):
    publish(hub, deep)

    weights, summary = truncated(tmp_path / "out")

    assert weights == cut
    assert summary.bytes_downloaded == pytest.approx(summary.bytes_read, rel=0.03)
    header = hub_sizes_of_header(deep)
    assert hub.sent_of_weights() <= 1.05 * (summary.bytes_read + header)
    assert json.loads((tmp_path / "out/surgeon.json").read_text())["fetched"] == "ranges"


def hub_sizes_of_header(deep: Path) -> int:
    with (deep / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_with_every_fault_a_cut_is_the_same_and_costs_little_more(hub, deep, cut, tmp_path):
    publish(hub, deep)
    surgery = surgeon.truncate("org/deep", layers=4)
    hub.faults = [fault for fault in FAULTS if fault != "whole"]

    summary = surgery.save(tmp_path / "out")

    assert (tmp_path / "out/model.safetensors").read_bytes() == cut
    assert hub.faults == []
    assert summary.bytes_downloaded <= 1.05 * summary.bytes_read
    assert hub.sent_of_weights() <= 1.05 * (summary.bytes_read + hub_sizes_of_header(deep))


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_makes_wrong_bytes(fault, hub, deep, cut, tmp_path):
    publish(hub, deep)
    hub.use_cdn = True
    surgery = surgeon.truncate("org/deep", layers=4)
    hub.faults = [fault] * 4

    surgery.save(tmp_path / "out")

    assert (tmp_path / "out/model.safetensors").read_bytes() == cut
    assert hub.faults == []
