"""Reading from the Hub and uploading to it, against a small Hub on loopback (hub_server.py)."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import READ_ONLY_TOKEN, TOKEN, HubServer

from surgeon.checkpoint.header import TensorSpec, format_header
from surgeon.checkpoint.hub import FIRST_REQUEST_BYTES, open_hub, push
from surgeon.checkpoint.source import open_directory, spec_of
from surgeon.errors import CheckpointError, HubError

# huggingface_hub uploads to LFS in a way that httpx2 is about to retire.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

LAYERS_PER_SHARD = 2
NUM_SHARDS = 4


def safetensors(sizes: Mapping[str, int]) -> bytes:
    """Return a safetensors file with one U8 vector of each size."""
    data = b"".join(bytes([number % 251]) * size for number, size in enumerate(sizes.values(), start=1))
    return format_header({name: TensorSpec("U8", (size,)) for name, size in sizes.items()}) + data


def shard_name(number: int) -> str:
    return f"model-{number:05}-of-{NUM_SHARDS:05}.safetensors"


def sharded_files() -> dict[str, bytes]:
    """Return a repository of four shards, each 300 kB, with everything that real ones carry beside them."""
    files = {}
    weight_map = {}
    for number in range(1, NUM_SHARDS + 1):
        layers = range((number - 1) * LAYERS_PER_SHARD, number * LAYERS_PER_SHARD)
        sizes = {f"model.layers.{layer}.weight": 150_000 + layer for layer in layers}
        files[shard_name(number)] = safetensors(sizes)
        weight_map |= dict.fromkeys(sizes, shard_name(number))
    return files | {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        "tokenizer.json": b'{"version": "1.0"}',
        "LICENSE": b"MIT",
        "README.md": b"# original",
        ".gitattributes": b"*.safetensors filter=lfs",
        "pytorch_model.bin": b"p" * 50_000,
        "tf_model.h5": b"t" * 50_000,
        "onnx/model.onnx": b"o" * 50_000,
        "model.gguf": b"g" * 50_000,
    }


def single_files(size: int = 100) -> dict[str, bytes]:
    return {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": safetensors({"wte": size, "wpe": 7})}


@contextmanager
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Yield an empty Hub, with huggingface_hub pointed at it, an empty cache and no token."""
    from huggingface_hub import constants

    with HubServer() as server:
        use_endpoint(monkeypatch, server.endpoint)
        use_home(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # else uploads look for a Xet server
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub, and no patience."""
    from huggingface_hub.utils import _http

    with empty_hub(tmp_path, monkeypatch) as server:
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # huggingface_hub waits 23 s before it gives up
        yield server


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def use_home(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refusal(*args: str, **options: str) -> tuple[str, str]:
    """Return the message and the hint of the HubError that opening and planning such a model ends in."""
    with pytest.raises(HubError) as caught:
        assert open_hub(*args, **options).tensors
    assert caught.value.hint
    return str(caught.value), caught.value.hint


# --- what is read, and what is not ---


def test_a_plan_of_a_sharded_repository_reads_the_headers_and_no_weights(hub: HubServer) -> None:
    files = sharded_files()
    hub.commit("org/big", files)
    source = open_hub("org/big")
    assert spec_of(source).num_parameters == sum(150_000 + layer for layer in range(8))
    assert source.config == {"model_type": "llama"}
    sent = hub.fetched()
    shards = {shard_name(number) for number in range(1, 5)}
    assert set(sent) == shards | {"config.json", "model.safetensors.index.json"}
    assert all(sent[shard] == FIRST_REQUEST_BYTES for shard in shards)


def test_tensors_and_byte_ranges_are_those_of_the_same_files_on_disk(hub: HubServer, tmp_path: Path) -> None:
    files = sharded_files()
    hub.commit("org/big", files)
    for name, content in files.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(content)
    local = open_directory(tmp_path / "local")
    remote = open_hub("org/big")
    assert remote.tensors == local.tensors
    assert remote.companions == local.companions
    assert {"LICENSE", "tokenizer.json"} <= set(remote.companions)


def test_only_the_shards_and_companions_that_are_asked_for_are_downloaded(hub: HubServer) -> None:
    files = sharded_files()
    hub.commit("org/big", files)
    source = open_hub("org/big")
    wanted = {source.tensors[f"model.layers.{layer}.weight"].file for layer in range(3)}
    for name in [*wanted, *source.companions]:
        assert source.fetch(name).read_bytes() == files[name]
    cached = {path.name for path in source.snapshot.iterdir()}
    assert cached == {"config.json", "model.safetensors.index.json", *source.companions, *wanted}
    assert len(wanted) == 2
    assert not {"pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "model.gguf"} & set(hub.fetched())


def test_a_small_file_is_read_in_one_request(hub: HubServer) -> None:
    hub.commit("tiny", single_files())
    assert set(open_hub("tiny").tensors) == {"wte", "wpe"}
    assert [r for r in hub.requests if "model.safetensors" in r.path] == [
        ("GET", f"/tiny/resolve/{open_hub('tiny').commit}/model.safetensors", len(single_files()["model.safetensors"]))
    ]


def test_a_header_beyond_the_first_request_takes_one_more_for_the_rest(hub: HubServer) -> None:
    weights = safetensors({f"model.layers.{number}.weight": 50 for number in range(2000)})
    header_bytes = 8 + int.from_bytes(weights[:8], "little")
    hub.commit("org/many", single_files() | {"model.safetensors": weights})
    assert len(open_hub("org/many").tensors) == 2000
    assert FIRST_REQUEST_BYTES < header_bytes == hub.fetched()["model.safetensors"] < len(weights)


@pytest.mark.parametrize("num_tensors", [2, 2000])
def test_a_server_that_ignores_ranges_is_read_only_as_far_as_needed(hub: HubServer, num_tensors: int) -> None:
    sizes = {f"model.layers.{number}.weight": 50 for number in range(num_tensors)} | {"lm_head.weight": 500_000}
    weights = safetensors(sizes)
    hub.commit("org/mirror", single_files() | {"model.safetensors": weights})
    hub.ignore_range = True
    hub.stall_after = max(FIRST_REQUEST_BYTES, 8 + int.from_bytes(weights[:8], "little"))
    assert {name: tensor.spec.nbytes for name, tensor in open_hub("org/mirror").tensors.items()} == sizes


def test_weights_behind_a_redirect_are_read_by_range_and_the_token_stays_with_the_hub(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.use_cdn = True
    files = sharded_files()
    hub.commit("org/big", files, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source = open_hub("org/big")
    assert len(source.tensors) == 8
    assert [sent for _, path, sent in hub.requests if path.startswith("/cdn/")] == [FIRST_REQUEST_BYTES] * NUM_SHARDS
    assert source.fetch(shard_name(2)).read_bytes() == files[shard_name(2)]


def test_a_repository_under_its_old_name_is_followed(hub: HubServer) -> None:
    sha = hub.commit("openai-community/gpt2", single_files())
    hub.renamed["gpt2"] = "openai-community/gpt2"
    source = open_hub("gpt2")
    assert set(source.tensors) == {"wte", "wpe"}
    assert source.fetch("model.safetensors").read_bytes() == single_files()["model.safetensors"]
    assert source.provenance() == {"id": "gpt2", "commit": sha}


def test_headers_of_cached_shards_are_read_from_the_cache(hub: HubServer) -> None:
    hub.commit("tiny", single_files())
    source = open_hub("tiny")
    source.fetch("model.safetensors")
    hub.requests.clear()
    assert open_hub("tiny").tensors == source.tensors
    assert "model.safetensors" not in hub.fetched()


# --- one commit, and the cache ---


def test_a_push_between_two_reads_does_not_mix_two_commits(hub: HubServer) -> None:
    before = hub.commit("org/moving", single_files(100))
    source = open_hub("org/moving")
    after = hub.commit("org/moving", single_files(200) | {"new.txt": b""})
    assert source.tensors["wte"].spec.shape == (100,)
    assert source.fetch("model.safetensors").read_bytes() == single_files(100)["model.safetensors"]
    assert source.companions == []
    assert source.provenance() == {"id": "org/moving", "commit": before}
    assert open_hub("org/moving").provenance()["commit"] == after


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer) -> None:
    old = hub.commit("org/moving", single_files(100), ref="v1")
    hub.commit("org/moving", single_files(200))
    assert open_hub("org/moving").tensors["wte"].spec.shape == (200,)
    for revision in ("v1", old):
        source = open_hub("org/moving", revision=revision)
        assert source.tensors["wte"].spec.shape == (100,)
        assert source.provenance() == {"id": "org/moving", "commit": old, "revision": revision}


def test_what_was_done_once_can_be_done_again_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sharded_files()
    hub.commit("org/big", files)
    first = open_hub("org/big")
    read = [first.tensors["model.layers.0.weight"].file, *first.companions]
    for name in read:
        first.fetch(name)
    hub.requests.clear()
    go_offline(monkeypatch)
    second = open_hub("org/big")
    assert second.tensors == first.tensors  # three of the four shards were never downloaded
    assert second.companions == first.companions
    assert [second.fetch(name).read_bytes() for name in read] == [files[name] for name in read]
    assert second.provenance() == first.provenance()
    assert hub.requests == []


def test_offline_a_snapshot_that_another_program_downloaded_is_enough(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    hub.commit("org/big", sharded_files())
    for name in sharded_files():
        if name.endswith((".safetensors", ".json")):
            hf_hub_download("org/big", name)
    go_offline(monkeypatch)
    source = open_hub("org/big")
    assert len(source.tensors) == 8
    assert source.companions == ["tokenizer.json"]


def test_a_second_plan_asks_only_whether_the_branch_has_moved(hub: HubServer) -> None:
    hub.commit("org/big", sharded_files())
    first = open_hub("org/big")
    assert first.tensors
    hub.requests.clear()
    second = open_hub("org/big")
    assert second.tensors == first.tensors
    assert [(method, sent) for method, _, sent in hub.requests] == [("HEAD", 0)]


def test_notes_that_cannot_be_written_are_done_without(hub: HubServer, tmp_path: Path) -> None:
    hub.commit("tiny", single_files())
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "assets").write_bytes(b"in the way")
    assert open_hub("tiny").tensors


# --- what can go wrong ---


def test_an_unknown_repository_is_named(hub: HubServer) -> None:
    message, hint = refusal("org/nowhere")
    assert message == "the Hub has no model org/nowhere, or does not show it to you"
    assert hint == "Check the name; if it is private, log in with `hf auth login`, or set HF_TOKEN."


def test_a_private_repository_needs_the_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/secret", single_files(), private=True)
    message, hint = refusal("org/secret")
    assert "org/secret" in message
    assert "HF_TOKEN" in hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert set(open_hub("org/secret").tensors) == {"wte", "wpe"}


def test_a_token_that_the_hub_does_not_know_is_said_to_be_the_fault(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("tiny", single_files())
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    message, hint = refusal("tiny")
    assert message == "the Hub wants a valid token for config.json of tiny"
    assert hint == "To fix it, check the token in use: `hf auth login`, or set HF_TOKEN."


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_repository_says_where_to_ask(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    hub.commit("org/gated", single_files(), gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message, hint = refusal("org/gated")
    assert message == "org/gated is gated, and you have not been granted access"
    assert hint.startswith(f"Ask for access on {hub.endpoint}/org/gated, then ")


def test_an_unknown_revision_is_named(hub: HubServer) -> None:
    hub.commit("tiny", single_files())
    message, hint = refusal("tiny", revision="v9")
    assert message == "tiny has no revision 'v9'"
    assert hint == f"Its branches, tags and commits are listed on {hub.endpoint}/tiny/commits/main."


def test_a_repository_without_a_config_is_no_checkpoint(hub: HubServer) -> None:
    hub.commit("org/dataset", {"README.md": b""})
    message, hint = refusal("org/dataset")
    assert message == "the Hub has no config.json of org/dataset"
    assert hint == f"Its files are listed on {hub.endpoint}/org/dataset/tree/main."


def test_a_shard_that_the_index_names_and_the_repository_lacks_is_named(hub: HubServer) -> None:
    files = sharded_files()
    del files[shard_name(3)]
    hub.commit("org/torn", files)
    message, _ = refusal("org/torn")
    assert message == f"the Hub has no {shard_name(3)} of org/torn"


def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(hub: HubServer) -> None:
    message, hint = refusal("./models/typo")
    assert message == "'./models/typo' is neither an existing directory nor a Hub id"
    assert "owner/name" in hint
    assert hub.requests == []


def test_no_network_and_no_cache_is_one_sentence(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    use_endpoint(monkeypatch, nowhere)
    message, hint = refusal("org/big")
    assert message.startswith(f"cannot reach the Hub at {nowhere} for config.json of org/big: ")
    assert hint == "Check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 makes do with what is cached."


def test_no_network_in_the_middle_is_one_sentence(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/big", sharded_files())
    source = open_hub("org/big")
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(HubError, match=r"cannot reach the Hub at http://127\.0\.0\.1:9 for the file list of org/big"):
        assert source.tensors
    assert waits == []


def test_offline_and_not_cached_names_the_variable(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/big", sharded_files())
    go_offline(monkeypatch)
    message, hint = refusal("org/big")
    assert message == "config.json of org/big is not in the cache, and HF_HUB_OFFLINE is set"
    assert hint.startswith("Unset HF_HUB_OFFLINE")


def test_offline_a_shard_that_is_not_cached_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("tiny", single_files())
    assert open_hub("tiny").tensors
    go_offline(monkeypatch)
    with pytest.raises(HubError, match=r"model\.safetensors of tiny is not in the cache, and HF_HUB_OFFLINE is set"):
        open_hub("tiny").fetch("model.safetensors")


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_is_down_is_one_sentence(hub: HubServer, status: int) -> None:
    hub.commit("tiny", single_files())
    hub.fail_with = status
    message, _ = refusal("tiny")
    assert message == f"the Hub failed on config.json of tiny with status {status}"


def test_a_hub_that_goes_down_after_the_config_is_one_sentence(hub: HubServer) -> None:
    hub.commit("tiny", single_files())
    source = open_hub("tiny")
    assert source.files
    hub.fail_with = 502
    with pytest.raises(HubError, match=r"the Hub failed on model\.safetensors of tiny with status 502"):
        assert source.tensors


def test_a_forbidden_and_a_rate_limited_request_say_so(hub: HubServer) -> None:
    hub.commit("tiny", single_files())
    hub.fail_with = 403
    assert refusal("tiny")[0] == "your token has no permission for config.json of tiny"
    hub.fail_with = 429
    assert refusal("tiny")[0] == "the Hub refused config.json of tiny: too many requests"


def test_something_that_is_no_hub_is_recognised(hub: HubServer) -> None:
    hub.commit("tiny", single_files())
    hub.hide_commit = True
    message, hint = refusal("tiny")
    assert message == f"{hub.endpoint} does not answer as the Hub does"
    assert hint.startswith("Check HF_ENDPOINT")


def test_a_connection_that_drops_in_a_header_is_one_sentence_and_the_next_run_goes_on(hub: HubServer) -> None:
    hub.commit("tiny", single_files())
    source = open_hub("tiny")
    hub.hang_up_after = 20
    with pytest.raises(HubError, match=r"connection broke off in the middle of model\.safetensors of tiny"):
        assert source.tensors
    hub.hang_up_after = None
    assert set(open_hub("tiny").tensors) == {"wte", "wpe"}


def test_a_hub_that_stalls_is_one_sentence(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.commit("tiny", single_files())
    source = open_hub("tiny")
    hub.stall_after = 20
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    with pytest.raises(HubError, match=r"the Hub stopped answering in the middle of model\.safetensors of tiny"):
        assert source.tensors


def test_a_download_that_drops_midway_leaves_no_half_file(hub: HubServer) -> None:
    hub.commit("org/big", sharded_files())
    source = open_hub("org/big")
    assert source.tensors
    hub.hang_up_after = 100_000
    with pytest.raises(HubError, match=f"broke off in the middle of {shard_name(1)} of org/big") as caught:
        source.fetch(shard_name(1))
    assert caught.value.hint == "Run the command again; complete files are kept."
    assert not [path for path in source.snapshot.parents[1].rglob("*") if path.is_file() and path.stat().st_size > 9999]
    hub.hang_up_after = None
    assert source.fetch(shard_name(1)).read_bytes() == sharded_files()[shard_name(1)]


def test_a_cache_that_cannot_be_written_is_named(hub: HubServer, tmp_path: Path) -> None:
    hub.commit("tiny", single_files())
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_bytes(b"in the way")
    message, hint = refusal("tiny")
    assert message.startswith(f"config.json of tiny failed: Not a directory: {tmp_path / 'home' / 'hub'}")
    assert "HF_HOME" in hint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, file_download

    def write_to_full_disk(*_: object, **__: object) -> None:
        with Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"0")

    hub.commit("tiny", single_files())
    source = open_hub("tiny")
    monkeypatch.setattr(file_download, "http_get", write_to_full_disk)
    with pytest.raises(HubError) as caught:
        source.fetch("model.safetensors")
    assert str(caught.value) == f"the disk is full: no room for model.safetensors of tiny in {constants.HF_HUB_CACHE}"
    assert caught.value.hint == "Free some space, or set HF_HOME to a directory on a larger disk."


# --- content that is not what it should be ---


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"", "model.safetensors of org/bad is 0 bytes long, too short for a safetensors header"),
        (b"version https://git-lfs", "model.safetensors of org/bad claims a header of"),
        (safetensors({"wte": 9})[:-1], "model.safetensors of org/bad is truncated: its tensors end at byte"),
    ],
)
def test_damaged_weights_are_refused_from_the_header_alone(hub: HubServer, weights: bytes, message: str) -> None:
    hub.commit("org/bad", single_files() | {"model.safetensors": weights})
    with pytest.raises(CheckpointError, match=message):
        assert open_hub("org/bad").tensors


def test_a_header_that_was_refused_is_asked_for_again(hub: HubServer) -> None:
    sha = hub.commit("org/bad", single_files() | {"model.safetensors": b"not yet"})
    with pytest.raises(CheckpointError):
        assert open_hub("org/bad").tensors
    hub.repos["org/bad"].commits[sha] = single_files()
    assert open_hub("org/bad").tensors


def test_a_file_that_arrives_with_another_size_than_its_header_promised_is_refused(hub: HubServer) -> None:
    sha = hub.commit("org/bad", single_files(100))
    source = open_hub("org/bad")
    assert source.tensors
    hub.repos["org/bad"].commits[sha] = single_files(108)
    with pytest.raises(CheckpointError, match=r"model.safetensors of org/bad has \d+ bytes; its header promised \d+"):
        source.fetch("model.safetensors")


@pytest.mark.parametrize("shard", ["../../../.ssh/id_rsa", "/etc/passwd", "..", "a/b.safetensors"])
def test_an_index_that_points_outside_the_repository_is_refused(hub: HubServer, shard: str) -> None:
    index = json.dumps({"weight_map": {"wte": shard}}).encode()
    hub.commit("org/evil", {"config.json": b"{}", "model.safetensors.index.json": index})
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        assert open_hub("org/evil").tensors
    assert set(hub.fetched()) == {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("name", ["../evil.py", "/etc/cron.d/evil", "a/../../evil.py", "..\\evil.py", "C:evil.py"])
def test_a_file_list_that_leaves_the_directory_is_refused(hub: HubServer, name: str) -> None:
    hub.commit("org/evil", single_files() | {name: b"evil"})
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        assert open_hub("org/evil").companions


def test_pickles_only_hints_at_convert(hub: HubServer) -> None:
    hub.commit("org/old", {"config.json": b"{}", "pytorch_model.bin": b"p" * 1000})
    with pytest.raises(CheckpointError, match=r"org/old has no model\.safetensors") as caught:
        assert open_hub("org/old").tensors
    assert caught.value.hint == "hf download org/old --local-dir old && surgeon convert old"
    assert "pytorch_model.bin" not in hub.fetched()


def test_a_gguf_or_an_adapter_gets_its_own_hint(hub: HubServer) -> None:
    hub.commit("org/quant", {"config.json": b"{}", "q4.gguf": b"GGUF"})
    hub.commit("org/lora", {"config.json": b"{}", "adapter_config.json": b"{}"})
    with pytest.raises(CheckpointError) as quantised:
        assert open_hub("org/quant").tensors
    with pytest.raises(CheckpointError) as adapter:
        assert open_hub("org/lora").tensors
    assert quantised.value.hint == "hf download org/quant --local-dir quant && surgeon convert quant/q4.gguf"
    assert adapter.value.hint == "This is an adapter: hf download org/lora --local-dir lora, and name lora."


# --- uploading ---


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A finished checkpoint with a file in a subdirectory, and its weights as two shards."""
    directory = tmp_path / "result"
    files = {name: content for name, content in sharded_files().items() if not name.startswith((".", "onnx", "READ"))}
    for name, content in (files | {"README.md": b"---\nbase_model: gpt2\n---\n", "sub/merges.txt": b"a b"}).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def files_under(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("private", [False, True])
def test_push_uploads_every_file_with_its_bytes(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, result: Path, private: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    url = push(result, "me/result", private=private, reads={})
    assert url == f"{hub.endpoint}/me/result"
    repo = hub.repos["me/result"]
    assert repo.commits[repo.refs["main"]] == files_under(result)
    assert repo.private is private


def test_what_was_pushed_can_be_opened(hub: HubServer, monkeypatch: pytest.MonkeyPatch, result: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(result, "result", private=True, reads={})  # a name alone: the owner is whoever the token belongs to
    assert open_hub("me/result").tensors == open_directory(result).tensors


def test_push_into_an_existing_repository_adds_a_commit(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, result: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = hub.commit("me/result", single_files())
    push(result, "me/result", private=False, reads={})
    assert hub.repos["me/result"].refs["main"] != before


def test_a_private_push_into_a_public_repository_uploads_nothing(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, result: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = hub.commit("me/result", single_files())
    with pytest.raises(HubError, match="me/result exists and is public; nothing was uploaded"):
        push(result, "me/result", private=True, reads={})
    assert hub.repos["me/result"].refs["main"] == before


def test_push_without_a_token_says_how_to_get_one(hub: HubServer, result: Path) -> None:
    with pytest.raises(HubError, match="cannot upload to me/result without a token") as caught:
        push(result, "me/result", private=False, reads={})
    assert caught.value.hint == "`hf auth login`, or set HF_TOKEN to a token that can write."
    assert hub.requests == []


def test_push_with_a_token_that_may_not_write_says_so(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, result: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", READ_ONLY_TOKEN)
    with pytest.raises(HubError, match="your token has no permission for the upload to me/result") as caught:
        push(result, "me/result", private=False, reads={})
    assert caught.value.hint == f"Use a token with that permission: {hub.endpoint}/settings/tokens."


def test_push_with_a_wrong_token_or_offline_says_so(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, result: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    with pytest.raises(HubError, match="the Hub wants a valid token for the upload to me/result"):
        push(result, "me/result", private=False, reads={})
    go_offline(monkeypatch)
    with pytest.raises(HubError, match="cannot upload to me/result: HF_HUB_OFFLINE is set"):
        push(result, "me/result", private=False, reads={})


# --- the environment, in a process of its own ---

SCRIPT = """
import sys
from surgeon.checkpoint.hub import open_hub
from surgeon.errors import SurgeonError
assert "huggingface_hub" not in sys.modules
try:
    source = open_hub("org/secret")
    print(len(source.tensors), source.fetch("model.safetensors").stat().st_size, *source.companions)
except SurgeonError as error:
    print(error)
print(*sorted({"torch", "transformers", "numpy", "hf_xet"} & set(sys.modules)), file=sys.stderr)
"""


def run_script(tmp_path: Path, **environment: str) -> str:
    """Return what SCRIPT prints; its standard error must stay empty: no bars, no heavy imports."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=kept | {"HF_HOME": str(tmp_path / "home")} | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == ""
    return done.stdout.strip()


def test_the_environment_variables_of_the_hub_are_honoured(tmp_path: Path) -> None:
    with HubServer() as server:
        server.commit("org/secret", single_files() | {"vocab.txt": b"v"}, private=True)
        size = len(single_files()["model.safetensors"])
        without_token = run_script(tmp_path, HF_ENDPOINT=server.endpoint)
        with_token = run_script(tmp_path, HF_ENDPOINT=server.endpoint, HF_TOKEN=TOKEN)
        num_requests = len(server.requests)
        offline = run_script(tmp_path, HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="1")
        elsewhere = run_script(tmp_path, HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "new"))
    assert without_token == "the Hub has no model org/secret, or does not show it to you"
    assert with_token == offline == f"2 {size} vocab.txt"
    assert elsewhere == "config.json of org/secret is not in the cache, and HF_HUB_OFFLINE is set"
    assert len(server.requests) == num_requests
