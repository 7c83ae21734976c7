"""Weights by byte ranges from a Hub on loopback: what is downloaded, what is refused, and what is left on the disk."""

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import handmade
import pytest
from hub_server import FAULTS, TOKEN, HubServer
from test_hub import empty_hub, go_offline

import surgeon
from surgeon import text
from surgeon.checkpoint import hub_http, hub_ranges, range_store
from surgeon.checkpoint.derived import JoinedSource
from surgeon.checkpoint.hub import FIRST_REQUEST_BYTES, open_hub
from surgeon.checkpoint.source import open_directory
from surgeon.errors import CheckpointError, HubError

LAYERS = 32


def made(directory: Path, ffn: int) -> Path:
    """Return a Llama of 32 layers in one file."""
    sizes = {"hidden_size": 80, "intermediate_size": ffn, "num_hidden_layers": LAYERS}
    return handmade.checkpoint(directory, tensors=handmade.llama(layers=LAYERS, hidden=80, ffn=ffn), **sizes)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 32 layers of 80 kB. Read-only."""
    return made(tmp_path_factory.mktemp("deep") / "model", 64)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 32 layers of 2 MB. Read-only."""
    return made(tmp_path_factory.mktemp("large") / "model", 2000)


@pytest.fixture(scope="session")
def cut(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the first 4 layers of `deep`, cut from the disk."""
    return cut_locally(deep, tmp_path_factory.mktemp("cut") / "local")


def cut_locally(model: Path, out: Path) -> bytes:
    surgeon.truncate(model, layers=4).save(out)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub, and little patience."""
    from huggingface_hub import constants

    with empty_hub(tmp_path, monkeypatch) as server:
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2.0)
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


def header_size(model: Path) -> int:
    with (model / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_a_cut_downloads_the_bytes_that_it_needs_and_is_that_of_the_disk(hub, deep, cut, tmp_path):
    publish(hub, deep)

    weights, summary = truncated(tmp_path / "out")

    assert weights == cut
    assert summary.bytes_read <= summary.bytes_downloaded <= 1.02 * summary.bytes_read
    assert hub.sent_of_weights() == summary.bytes_downloaded + header_size(deep)
    receipt = json.loads((tmp_path / "out/surgeon.json").read_text())
    assert (receipt["fetched"], receipt["sha256_unchecked"]) == ("ranges", ["model.safetensors"])


@pytest.mark.parametrize("use_cdn", [False, True])
def test_with_every_fault_a_cut_is_the_same_and_costs_little_more(use_cdn, hub, large, tmp_path):
    """Of 4 of 32 layers. The whole file in place of a range is left out here: the server counts all that it sends."""
    publish(hub, large)
    hub.use_cdn = use_cdn
    surgery = surgeon.truncate("org/deep", layers=4)
    hub.faults = [fault for fault in FAULTS if fault != "whole"]

    summary = surgery.save(tmp_path / "out")

    assert hub.faults == []
    assert (tmp_path / "out/model.safetensors").read_bytes() == cut_locally(large, tmp_path / "local")
    assert summary.bytes_downloaded <= 1.05 * summary.bytes_read
    assert hub.sent_of_weights() <= 1.05 * (summary.bytes_read + header_size(large))


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_makes_wrong_bytes(fault, hub, deep, cut, tmp_path):
    publish(hub, deep)
    hub.use_cdn = True
    surgery = surgeon.truncate("org/deep", layers=4)
    hub.faults = [fault] * 4

    surgery.save(tmp_path / "out")

    assert (tmp_path / "out/model.safetensors").read_bytes() == cut
    assert hub.faults == []


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_the_first_request_for_a_header_matters(fault, hub, deep, tmp_path):
    publish(hub, deep)
    hub.faults = [fault]

    assert open_hub("org/deep").tensors == surgeon.open_model(deep).source.tensors


def test_ranges_from_another_host_take_one_question_for_the_address_and_no_token(hub, deep, cut, tmp_path, monkeypatch):
    """The server refuses a token at the other host."""
    publish(hub, deep, private=True)
    hub.use_cdn = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    surgery = surgeon.truncate("org/deep", layers=4)
    assert surgery.summary().layers == (LAYERS, 4)
    hub.requests.clear()

    surgery.save(tmp_path / "out")

    assert (tmp_path / "out/model.safetensors").read_bytes() == cut
    weights = [method for method, path, _ in hub.requests if path.endswith(".safetensors")]
    assert weights == ["HEAD"]
    assert len([path for _, path, _ in hub.requests if path.startswith("/cdn/")]) == len(hub.ranges) - 1


def test_an_address_that_expires_is_asked_for_again(hub, deep, cut, tmp_path):
    publish(hub, deep)
    hub.use_cdn = True
    hub.signed_for = 9  # of the 12 requests that it takes

    weights, summary = truncated(tmp_path / "out")

    assert weights == cut
    assert summary.bytes_downloaded <= 1.05 * summary.bytes_read  # and not the whole file
    questions = [path for method, path, _ in hub.requests if method == "HEAD" and path.endswith(".safetensors")]
    assert 1 < len(questions) < 6


def test_connections_that_break_off_are_resumed_where_they_broke(hub, deep, cut, tmp_path):
    publish(hub, deep)
    hub.use_cdn = True
    surgery = surgeon.truncate("org/deep", layers=4)
    assert surgery.summary().layers == (LAYERS, 4)
    hub.requests.clear()
    hub.hang_up_after = 20_000

    summary = surgery.save(tmp_path / "out")

    assert (tmp_path / "out/model.safetensors").read_bytes() == cut
    assert hub.sent_of_weights() <= 1.05 * summary.bytes_read
    assert summary.bytes_downloaded <= 1.05 * summary.bytes_read


@pytest.mark.parametrize(
    ("headers", "seconds"), [({"RateLimit": '"resolvers";r=0;t=7'}, 8.0), ({"Retry-After": "5"}, 5.0), ({}, None)]
)
def test_a_hub_that_limits_requests_is_waited_for_as_it_says(headers, seconds, hub, deep, cut, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(hub_ranges.time, "sleep", waits.append)
    publish(hub, deep)
    surgery = surgeon.truncate("org/deep", layers=4)
    assert surgery.summary().layers == (LAYERS, 4)
    hub.limit_headers = headers
    hub.faults = ["429"]

    surgery.save(tmp_path / "out")

    longest = max(waits)
    assert (tmp_path / "out/model.safetensors").read_bytes() == cut
    assert longest == pytest.approx(hub_ranges.BACKOFF[0] if seconds is None else seconds, abs=0.5)


def test_a_server_without_ranges_is_asked_for_the_whole_file(hub, deep, cut, tmp_path):
    publish(hub, deep)
    surgery = surgeon.truncate("org/deep", layers=4)
    assert surgery.summary().layers == (LAYERS, 4)
    hub.ignore_range = True

    summary = surgery.save(tmp_path / "out")

    assert (tmp_path / "out/model.safetensors").read_bytes() == cut
    assert (surgery.source.snapshot / "model.safetensors").read_bytes() == (deep / "model.safetensors").read_bytes()
    assert summary.bytes_downloaded - (deep / "model.safetensors").stat().st_size in range(FIRST_REQUEST_BYTES)
    assert "fetched" not in json.loads((tmp_path / "out/surgeon.json").read_text())


def test_a_server_that_gives_wrong_ranges_for_ever_ends_in_the_whole_file(hub, deep, cut, tmp_path):
    publish(hub, deep)
    surgery = surgeon.truncate("org/deep", layers=4)
    assert surgery.summary().layers == (LAYERS, 4)
    hub.faults = ["shifted"] * 100

    surgery.save(tmp_path / "out")

    assert (tmp_path / "out/model.safetensors").read_bytes() == cut
    assert (surgery.source.snapshot / "model.safetensors").exists()


@pytest.mark.parametrize("fault", ["500", "slow", "429"])
def test_a_hub_that_fails_for_ever_is_one_sentence(fault, hub, deep, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(hub_ranges.time, "sleep", lambda _: None)
    publish(hub, deep)
    surgery = surgeon.truncate("org/deep", layers=4)
    assert surgery.summary().layers == (LAYERS, 4)
    hub.faults = [fault] * 1000

    with pytest.raises(HubError, match=r"model\.safetensors of org/deep") as caught:
        surgery.save(tmp_path / "out")

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- whole files ---


def test_a_file_of_which_nearly_all_is_read_is_downloaded_whole(hub, deep, tmp_path):
    publish(hub, deep)
    surgery = surgeon.truncate("org/deep", layers=31)
    planned = surgery.summary().bytes_downloaded

    summary = surgery.save(tmp_path / "out")

    assert planned == summary.bytes_downloaded == (deep / "model.safetensors").stat().st_size
    assert (surgery.source.snapshot / "model.safetensors").exists()


def test_a_file_in_the_cache_is_not_downloaded(hub, deep, cut, tmp_path):
    from huggingface_hub import hf_hub_download

    publish(hub, deep)
    hf_hub_download("org/deep", "model.safetensors")
    hub.requests.clear()

    weights, summary = truncated(tmp_path / "out")

    assert weights == cut
    assert summary.bytes_downloaded == 0
    assert "model.safetensors" not in hub.fetched()


def test_a_dry_run_says_what_the_run_downloads(hub, deep, tmp_path):
    publish(hub, deep)
    planned = surgeon.truncate("org/deep", layers=4).summary()

    done = truncated(tmp_path / "out")[1]
    again = surgeon.truncate("org/deep", layers=4).summary()

    assert planned.bytes_downloaded == done.bytes_downloaded == planned.to_dict()["bytes_downloaded"]
    assert f"  downloads                 {text.size(planned.bytes_downloaded)}" in str(planned)
    assert again.bytes_downloaded == 0
    assert "bytes_downloaded" not in surgeon.truncate(deep, layers=4).summary().to_dict()


def test_gaps_are_filled_only_where_they_add_little():
    joined = hub_ranges.joined

    assert joined([(0, 10_000_000), (10_000_100, 20_000_000)]) == [(0, 20_000_000)]
    assert joined([(0, 1000), (1100, 2000)]) == [(0, 1000), (1100, 2000)]
    assert joined([(0, 2 << 30), ((2 << 30) + (1 << 20), 4 << 30)]) == [(0, 2 << 30), ((2 << 30) + (1 << 20), 4 << 30)]
    spans = [(i * 100_000, i * 100_000 + 90_000) for i in range(100)]
    assert range_store.total(joined(spans)) <= 1.02 * range_store.total(spans)


# --- what is stored ---


def test_what_was_downloaded_is_not_downloaded_again_and_works_offline(hub, deep, cut, tmp_path, monkeypatch):
    publish(hub, deep)
    truncated(tmp_path / "first")
    hub.requests.clear()
    go_offline(monkeypatch)

    weights, summary = truncated(tmp_path / "second")

    assert weights == cut
    assert summary.bytes_downloaded == 0
    assert hub.requests == []


def test_what_was_downloaded_is_read_where_nothing_can_be_written_any_more(hub, deep, cut, tmp_path, monkeypatch):
    publish(hub, deep)
    surgeon.truncate("org/deep", layers=4).save(tmp_path / "first")
    asked = len(hub.ranges)
    open_file, home = os.open, str(tmp_path / "home")

    def read_only(path, flags, *rest, **options):
        if str(path).startswith(home) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open_file(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)
    surgeon.truncate("org/deep", layers=4).save(tmp_path / "again")

    assert (tmp_path / "again/model.safetensors").read_bytes() == cut
    assert len(hub.ranges) == asked


def test_offline_the_tensors_that_are_not_there_are_named(hub, deep, tmp_path, monkeypatch):
    publish(hub, deep)
    truncated(tmp_path / "first")
    go_offline(monkeypatch)

    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set") as caught:
        surgeon.truncate("org/deep", layers=5).save(tmp_path / "second")

    assert str(caught.value).startswith(
        "the cache lacks 'model.layers.4.input_layernorm.weight' and 8 more tensors of org"
    )


def test_a_longer_cut_downloads_only_the_further_layers(hub, deep, tmp_path):
    publish(hub, deep)
    shorter = truncated(tmp_path / "first")[1]

    summary = surgeon.truncate("org/deep", layers=6).save(tmp_path / "second")

    assert summary.bytes_downloaded <= 1.03 * (summary.bytes_read - shorter.bytes_read)


def test_nothing_takes_ranges_for_a_whole_file(hub, deep, tmp_path):
    from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache

    publish(hub, deep)
    truncated(tmp_path / "out")

    cache = Path(constants.HF_HUB_CACHE)
    files = [item.file_name for repo in scan_cache_dir(cache).repos for rev in repo.revisions for item in rev.files]
    assert "model.safetensors" not in files
    assert try_to_load_from_cache("org/deep", "model.safetensors", cache_dir=cache) is None
    stored = [path.name for path in ranges_of(tmp_path / "home").iterdir()]
    assert all(name.endswith((".sparse", ".map.json", ".lock")) for name in stored)


def test_a_block_that_changed_on_the_disk_is_downloaded_again(hub, deep, cut, tmp_path):
    publish(hub, deep)
    truncated(tmp_path / "first")
    data = next(ranges_of(tmp_path / "home").glob("*.sparse"))
    with data.open("r+b") as file:
        file.seek(header_size(deep) + 150_000)
        file.write(b"changed")

    weights, summary = truncated(tmp_path / "second")

    assert weights == cut
    assert 0 < summary.bytes_downloaded <= hub_ranges.SMALLEST_PART


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 9, "size": 1}'])
def test_a_damaged_map_is_no_map(content, hub, deep, cut, tmp_path):
    publish(hub, deep)
    truncated(tmp_path / "first")
    next(ranges_of(tmp_path / "home").glob("*.map.json")).write_bytes(content)

    weights, summary = truncated(tmp_path / "second")

    assert weights == cut
    assert summary.bytes_downloaded >= summary.bytes_read


def test_where_all_bytes_are_there_the_sha256_is_compared(hub, deep, tmp_path):
    publish(hub, deep)
    source = open_hub("org/deep")
    end = max(tensor.end for tensor in source.tensors.values())
    start = header_size(deep)

    source.parts({"model.safetensors": [(start, end // 2)]})
    assert source.transfer.ranges == {"model.safetensors"}
    source.parts({"model.safetensors": [(0, start), (end // 2, end - 50_000)]})
    source.parts({"model.safetensors": [(end - 50_000, end)]})

    assert source.transfer.ranges == set()


def test_bytes_that_do_not_have_the_sha256_are_forgotten(hub, deep, tmp_path):
    publish(hub, deep)
    source = open_hub("org/deep")
    end = max(tensor.end for tensor in source.tensors.values())
    source.parts({"model.safetensors": [(0, end // 2)]})
    hub.faults = ["", "", "flipped"]

    with pytest.raises(CheckpointError, match="do not have the SHA-256 that the Hub names"):
        source.parts({"model.safetensors": [(end // 2, end)]})

    assert not list(ranges_of(tmp_path / "home").glob("*.map.json"))


def test_a_full_disk_is_named_with_the_store(hub, deep, tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    publish(hub, deep)
    surgery = surgeon.truncate("org/deep", layers=4)
    assert surgery.summary().layers == (LAYERS, 4)
    monkeypatch.setattr(range_store.os, "pwrite", full)

    with pytest.raises(HubError, match=r"the disk is full: no room for model\.safetensors in .*/assets/surgeon/"):
        surgery.source.parts({"model.safetensors": [(500_000, 900_000)]})


def test_a_store_that_cannot_be_made_is_done_without(hub, deep, cut, tmp_path):
    publish(hub, deep)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/assets").write_bytes(b"in the way")

    weights, _ = truncated(tmp_path / "out")

    assert weights == cut


def test_ranges_long_unused_and_those_beyond_the_size_are_removed(hub, deep, tmp_path, monkeypatch):
    publish(hub, deep)
    truncated(tmp_path / "out")
    directory = ranges_of(tmp_path / "home")
    root = directory.parents[2]
    (old,) = directory.glob("*.map.json")

    range_store.make_room(root, 0)
    assert old.exists()
    monkeypatch.setenv("SURGEON_CACHE_SIZE", "1MB")
    range_store.make_room(root, 1000)
    assert old.exists()
    range_store.make_room(root, 900_000)
    assert not list(directory.glob("*.map.json"))
    assert not list(directory.glob("*.sparse"))

    monkeypatch.delenv("SURGEON_CACHE_SIZE")
    truncated(tmp_path / "again")
    month = 31 * 86_400
    os.utime(old, (old.stat().st_atime - month, old.stat().st_mtime - month))
    range_store.make_room(root, 0)
    assert not list(directory.glob("*.sparse"))


def test_a_size_that_is_none_is_named(hub, deep, tmp_path, monkeypatch):
    publish(hub, deep)
    monkeypatch.setenv("SURGEON_CACHE_SIZE", "plenty")

    with pytest.raises(HubError, match="cannot read SURGEON_CACHE_SIZE='plenty' as a size"):
        truncated(tmp_path / "out")


def test_a_part_outlives_the_removal_of_its_file(hub, deep, tmp_path, monkeypatch):
    publish(hub, deep)
    source = open_hub("org/deep")
    part = source.parts({"model.safetensors": [(300_000, 400_000)]})["model.safetensors"]
    monkeypatch.setenv("SURGEON_CACHE_SIZE", "100KB")

    other = source.parts({"model.safetensors": [(2_000_000, 2_100_000)]})["model.safetensors"]

    whole = (deep / "model.safetensors").read_bytes()
    assert not part.path.exists()
    for held, start in [(part, 300_000), (other, 2_000_000)]:
        with held.opened() as opened:
            read = bytearray(100_000)
            opened.read_into(read, start)
            assert read == whole[start : start + 100_000]
            with pytest.raises(CheckpointError, match="were not fetched"):
                opened.read_into(read, start + 1_000)


def test_of_a_donor_on_the_hub_only_the_ranges_are_downloaded(hub, deep):
    publish(hub, deep)
    joined = JoinedSource(open_directory(deep), open_hub("org/deep"), "donor")
    here, there = (joined.tensors[f"{prefix}model.norm.weight"] for prefix in ("", "donor:"))
    wanted = {item.file: [(item.start, item.end)] for item in (here, there)}

    assert joined.missing(wanted) == there.spec.nbytes
    parts = joined.parts(wanted)

    read = [bytearray(item.spec.nbytes) for item in (here, there)]
    for item, buffer in zip((here, there), read, strict=True):
        with parts[item.file].opened() as opened:
            opened.read_into(buffer, item.start)
    assert read[0] == read[1]
    assert (joined.transfer.nbytes, joined.transfer.ranges) == (there.spec.nbytes, {"donor:model.safetensors"})
    assert joined.missing(wanted) == 0


def test_a_store_that_is_removed_during_a_run_is_made_again(hub, deep, tmp_path):
    publish(hub, deep)
    source = open_hub("org/deep")
    source.parts({"model.safetensors": [(300_000, 400_000)]})
    shutil.rmtree(ranges_of(tmp_path / "home"))

    part = source.parts({"model.safetensors": [(600_000, 700_000)]})["model.safetensors"]

    assert part.present == ((600_000, 700_000),)


def test_a_file_that_was_compared_is_compared_again_once_a_block_of_it_changed(hub, deep, tmp_path):
    publish(hub, deep)
    source = open_hub("org/deep")
    end = max(tensor.end for tensor in source.tensors.values())
    for span in [(0, end // 2), (end // 2, end)]:
        source.parts({"model.safetensors": [span]})
    assert source.transfer.ranges == set()
    data = next(ranges_of(tmp_path / "home").glob("*.sparse"))
    with data.open("r+b") as file:
        file.seek(end - 10)
        file.write(b"changed")

    hub.faults = ["flipped"]
    with pytest.raises(CheckpointError, match="do not have the SHA-256 that the Hub names"):
        open_hub("org/deep").parts({"model.safetensors": [(end // 2, end)]})


def test_a_store_that_was_made_anew_is_not_touched_by_who_holds_the_old_one(tmp_path):
    def stored(content: bytes) -> range_store.RangeFile:
        made = range_store.RangeFile.create(tmp_path, "model.safetensors", size=100, etag="e")
        made.write(content, 0)
        digest = range_store.digest_of()
        digest.update(content)
        made.add([range_store.Block(0, len(content), digest.hexdigest())])
        return made

    old = stored(b"old")
    again = range_store.RangeFile.find(tmp_path, "model.safetensors", size=100)
    old.forget()
    new = stored(b"newer")
    old.write(b"x", 0)
    again.check([(0, 3)])
    old.add([range_store.Block(3, 4, "0")])

    found = range_store.RangeFile.find(tmp_path, "model.safetensors", size=100)
    assert again.present == []  # its only block changed on the disk
    assert found.path == new.path
    assert found.present == [(0, 5)]


def test_without_ranges_and_without_room_for_the_file_the_reason_is_given(hub, deep, tmp_path, monkeypatch):
    publish(hub, deep)
    surgery = surgeon.truncate("org/deep", layers=4)
    assert surgery.summary().layers == (LAYERS, 4)
    hub.ignore_range = True
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))

    with pytest.raises(HubError, match="cannot be read by ranges .*, and the whole file is [0-9.]+ MB, more than"):
        surgery.save(tmp_path / "out")


def test_runs_that_remove_each_others_ranges_still_read_all_that_they_asked_for(hub, deep, monkeypatch):
    publish(hub, deep)
    whole = (deep / "model.safetensors").read_bytes()
    monkeypatch.setenv("SURGEON_CACHE_SIZE", "100KB")  # less than two layers

    def read_layers(seed: int) -> int:
        source, count = open_hub("org/deep"), 0
        for layer in random.Random(seed).choices(range(4), k=40):
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            item = source.tensors[name]
            part = source.parts({item.file: [(item.start, item.end)]}, among={item.file: [(0, len(whole))]})[item.file]
            with part.opened() as opened:
                read = bytearray(item.spec.nbytes)
                opened.read_into(read, item.start)
            count += read == whole[item.start : item.end]
        return count

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(read_layers, range(3))) == [40, 40, 40]


def test_a_store_that_another_run_makes_anew_in_between_is_not_taken_for_this_one(hub, deep, monkeypatch):
    publish(hub, deep)
    first, second = open_hub("org/deep"), open_hub("org/deep")
    first.parts({"model.safetensors": [(300_000, 400_000)]})
    check = range_store.RangeFile.check

    def meanwhile(self: range_store.RangeFile, spans: list[tuple[int, int]]) -> None:
        monkeypatch.setattr(range_store.RangeFile, "check", check)
        self.forget()
        second.parts({"model.safetensors": [(600_000, 700_000)]})
        check(self, spans)

    monkeypatch.setattr(range_store.RangeFile, "check", meanwhile)
    part = first.parts({"model.safetensors": [(600_000, 700_000)]})["model.safetensors"]

    with part.opened() as opened:
        read = bytearray(100_000)
        opened.read_into(read, 600_000)
    assert read == (deep / "model.safetensors").read_bytes()[600_000:700_000]


def test_a_file_of_another_commit_or_size_than_its_header_is_refused(hub, deep, tmp_path):
    publish(hub, deep)
    source = open_hub("org/deep")
    wanted = {"model.safetensors": [(300_000, 400_000)]}
    assert source.tensors

    hub.hide_commit = True
    with pytest.raises(HubError, match=r"does not answer as the Hub does for model\.safetensors of org/deep"):
        source.parts(wanted)
    hub.hide_commit = False
    hub.repos["org/deep"].commits[source.commit]["model.safetensors"] += b"more"
    with pytest.raises(HubError, match=r"model\.safetensors of org/deep has \d+ bytes; its header promised \d+"):
        source.parts(wanted)


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        (200, {}),
        (416, {}),
        (206, {"Content-Range": "bytes 11-20/100"}),
        (206, {"Content-Range": "bytes 10-18/100"}),
        (206, {"Content-Range": "bytes 10-19/101"}),
        (206, {"Content-Range": "bytes 10-19/*"}),
        (206, {"Content-Length": "9"}),
        (206, {"Content-Encoding": "gzip"}),
        (206, {"Content-Encoding": "br"}),
    ],
)
def test_an_answer_is_exactly_the_range_that_was_asked_for(status, changes):
    right = {"Content-Range": "bytes 10-19/100", "Content-Length": "10"}
    hub_ranges._check(206, right, 10, 20, 100)

    with pytest.raises(hub_http.WrongAnswer):
        hub_ranges._check(status, right | changes, 10, 20, 100)


def test_whether_a_stored_head_is_a_copy_is_seen_by_little_of_it(hub, tmp_path):
    """Head and embedding have 2 MB each; handmade ones differ from the first byte on."""
    tensors = handmade.llama(vocab=70_000)
    model = handmade.checkpoint(tmp_path / "tied", tensors=tensors, vocab_size=70_000, tie_word_embeddings=True)
    weights = model / "model.safetensors"
    head, embedding = (handmade.data(name, 2_240_000) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    weights.write_bytes(weights.read_bytes().replace(head, embedding))
    publish(hub, model)

    summary = surgeon.truncate("org/deep", layers=1).summary(tmp_path / "out")
    sent = hub.sent_of_weights()

    assert "lm_head.weight is left out: it equals model.embed_tokens.weight" in summary.notes[0]
    assert sent < 1_000_000
    assert surgeon.truncate(model, layers=1).summary(tmp_path / "out").notes == summary.notes
