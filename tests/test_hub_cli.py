"""The whole command line against a Hub on loopback: a Hub id in, a checkpoint out, and up again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import toys
from hub_server import TOKEN, HubServer

import surgeon


def run(home: Path, server: HubServer, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run surgeon in a process of its own, with an empty cache in `home`."""
    hub = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "surgeon", *map(str, arguments)],
        env=os.environ | hub | environment,
        capture_output=True,
        text=True,
        cwd=home,
    )


def repository(directory: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint as a repository, with weights of another format and a card beside them."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    card = b"---\nlicense: mit\n---\n# Source\n"
    return files | {"pytorch_model.bin": b"p" * 50_000, "tokenizer.json": b"{}", "README.md": card}


def test_a_hub_models_config_and_files_begin_a_new_one_without_its_weights(toy, tmp_path):
    with HubServer() as server:
        commit = server.commit("org/model", repository(toy("llama")))

        done = run(tmp_path, server, "init", "org/model", "--seed", 3, "-o", tmp_path / "new", "--json")

        assert done.returncode == 0, done.stderr
        assert not any(file.endswith((".safetensors", ".bin")) for file in server.fetched())
    surgeon.init(toy("llama"), seed=3).save(tmp_path / "local")
    hub, local = (tmp_path / name / "model.safetensors" for name in ("new", "local"))
    assert hub.read_bytes() == local.read_bytes()
    assert (tmp_path / "new/tokenizer.json").read_bytes() == b"{}"
    source = json.loads((tmp_path / "new/surgeon.json").read_text())["source"]
    assert (source["id"], source["commit"], source["config"]) == ("org/model", commit, "org/model")


def test_a_hub_model_is_planned_without_its_weights_cut_and_pushed(toy, tmp_path):
    whole = surgeon.open_model(toy("gemma2"))
    whole.save(tmp_path / "sharded", max_shard_size="100KB")
    with HubServer() as server:
        commit = server.commit("org/model", repository(tmp_path / "sharded"))

        planned = run(tmp_path, server, "truncate", "org/model", "--layers", 2, "--dry-run", "--json")
        asked = [file for file in server.fetched() if file.endswith(".safetensors")]
        command = ("truncate", "org/model", "--layers", 2, "--json", "--push-to-hub", "me/cut")
        done = run(tmp_path, server, *command, HF_TOKEN=TOKEN)

        assert planned.stderr == done.stderr.replace(f"uploaded to {server.endpoint}/me/cut\n", "") == ""
        summary = json.loads(done.stdout)
        assert json.loads(planned.stdout)["bytes_written"] == summary["bytes_written"]
        assert summary["url"] == f"{server.endpoint}/me/cut"
        assert len(asked) == len(whole.summary(max_shard_size="100KB").files)  # their headers
        assert "pytorch_model.bin" not in server.fetched()
        pushed = server.repos["me/cut"]
        assert set(pushed.commits[pushed.refs["main"]]) >= {"config.json", "model.safetensors", "surgeon.json"}
    out = tmp_path / "model-truncate-2L"
    assert json.loads((out / "surgeon.json").read_text())["source"]["commit"] == commit
    assert "base_model: org/model" in (out / "README.md").read_text()
    assert "license: mit" in (out / "README.md").read_text()
    surgeon.truncate(toy("gemma2"), layers=2).save(tmp_path / "local")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "local/model.safetensors").read_bytes()
    assert not any(toys.load(out)[1].values())


def test_a_hub_failure_is_one_line_and_a_hint(tmp_path):
    with HubServer() as server:
        unknown = run(tmp_path, server, "truncate", "org/none", "--layers", 2)
        offline = run(tmp_path, server, "inspect", "org/none", HF_HUB_OFFLINE="1")

    for result in (unknown, offline):
        assert result.returncode == 1
        assert result.stdout == ""
        error, hint = result.stderr.splitlines()
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
    assert list(tmp_path.glob("none*")) == []
