"""What is published holds no path of this machine: cards never do, and receipts and configs not where they go."""

import json
from pathlib import Path

import pytest
from handmade import checkpoint, edit_config, llama
from hub_server import TOKEN, HubServer
from test_secrets import hub  # noqa: F401  # a fixture

import surgeon
from surgeon.checkpoint.hub import push
from surgeon.checkpoint.receipt import public_command, public_record, public_text


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("surgeon truncate /home/ann/model --layers 2", "surgeon truncate model --layers 2"),
        ("surgeon truncate '/home/ann/my models/one' -o '../two three'", "surgeon truncate one -o 'two three'"),
        ("surgeon prune ~/model --data=/home/ann/a.txt", "surgeon prune model --data=a.txt"),
        ("surgeon grow org/model --donor here/big -o runs/out", "surgeon grow org/model --donor big -o out"),
        ("surgeon x org/model:en --lr 1e-3 --freeze layers=0-2,head", None),
        ("surgeon x m --push-to-hub me/model --extract '#### (-?[0-9]+/[0-9]+)'", None),
        ("HF_ENDPOINT=https://hub.example/x surgeon x", None),
    ],
)
def test_a_command_keeps_the_last_name_of_a_path_and_ids_of_the_hub(command, expected, tmp_path, monkeypatch):
    (tmp_path / "here/big").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert public_command(command) == (expected or command)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sizes of /home/ann/small, and 3/4 of it", "sizes of small, and 3/4 of it"),
        ("see https://hub.example/me/x and (~/secret/a.txt)", "see https://hub.example/me/x and (a.txt)"),
        ("5 tokens/s, bytes/token; org/model; and/or", None),
    ],
)
def test_a_sentence_keeps_the_last_name_of_a_path(text, expected):
    assert public_text(text) == (expected or text)


def test_a_record_keeps_all_that_identifies(tmp_path):
    (tmp_path / "with space").mkdir()
    record = {
        "source": {"path": str(tmp_path / "with space"), "fingerprint": "sha256-sampled:00", "id": "org/model"},
        "steps": [{"finetune": {"data": [{"data": "/d/a.txt", "sha256": "0"}], "settings": {"teacher": "~/big"}}}],
        "layer_map": [0, None],
        "versions": {"python": "3.12"},
    }

    assert public_record(record) == {
        "source": {"path": "with space", "fingerprint": "sha256-sampled:00", "id": "org/model"},
        "steps": [{"finetune": {"data": [{"data": "a.txt", "sha256": "0"}], "settings": {"teacher": "big"}}}],
        "layer_map": [0, None],
        "versions": {"python": "3.12"},
    }


# --- what goes to the Hub ---------------------------------------------------------------------------------------


def texts_of(server: HubServer, repo_id: str) -> dict[str, str]:
    """Return the files of a repository that are text."""
    repo = server.repos[repo_id]
    files = repo.commits[repo.refs["main"]]
    return {name: raw.decode() for name, raw in files.items() if not name.endswith(".safetensors")}


def holds(files: dict[str, str], *words: str) -> list[str]:
    return [name for name, text in files.items() if any(word in text for word in words)]


def test_nothing_that_is_pushed_holds_a_path_and_the_local_receipt_does(hub, run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    home = tmp_path / "home-of-ann"
    model = checkpoint(home / "models/base")
    edit_config(model, _name_or_path=str(home / "older/base"))
    (model / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(home / "older"), "model_max": 5}))
    donor = checkpoint(home / "models/big", tensors=llama(layers=5), num_hidden_layers=5)
    words = ["grow", model, "--layers", 5, "--donor", donor, "--no-verify", "-o", home / "out"]

    outcome = run(*words, "--push-to-hub", "me/grown")

    assert outcome.code == 0, outcome.err
    pushed = texts_of(hub, "me/grown")
    assert holds(pushed, "home-of-ann", str(tmp_path), str(Path.home())) == []
    local, public = json.loads((home / "out/surgeon.json").read_text()), json.loads(pushed["surgeon.json"])
    assert local["source"]["path"] == str(model)
    assert public["source"]["path"] == "base"
    assert public["source"]["donor"]["path"] == "big"
    assert public["source"]["fingerprint"] == local["source"]["fingerprint"]
    assert public["command"] == "surgeon grow base --layers 5 --donor big --no-verify -o out --push-to-hub me/grown"
    assert public["layer_map"] == local["layer_map"]
    assert json.loads(pushed["config.json"])["_name_or_path"] == "base"
    assert json.loads(pushed["tokenizer_config.json"]) == {"name_or_path": "older", "model_max": 5}
    assert (home / "out/tokenizer_config.json").read_bytes() == (model / "tokenizer_config.json").read_bytes()
    assert holds({"README.md": (home / "out/README.md").read_text()}, "home-of-ann", str(tmp_path)) == []


def test_scores_and_adapters_are_pushed_without_paths(hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = checkpoint(tmp_path / "out")
    for name in ("scores.json", "search.json", "adapter_config.json", "gist.json"):
        (out / name).write_text(
            json.dumps({"model": {"path": str(tmp_path)}, "base_model_name_or_path": str(tmp_path)})
        )

    push(out, "me/adapter", private=False, reads={})

    assert holds(texts_of(hub, "me/adapter"), str(tmp_path)) == []


def test_what_holds_no_path_is_pushed_byte_for_byte(hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = checkpoint(tmp_path / "out")
    (out / "config.json").write_text('{"model_type":   "llama", "_name_or_path": "org/model"}')
    (out / "templates").mkdir()
    (out / "templates/a.jinja").write_text("{{ x }}")

    push(out, "me/plain", private=False, reads={})

    pushed = texts_of(hub, "me/plain")
    assert pushed["config.json"] == (out / "config.json").read_text()
    assert pushed["templates/a.jinja"] == "{{ x }}"


def test_a_card_names_a_model_of_this_machine_by_its_last_name(tmp_path):
    model = checkpoint(tmp_path / "models/base")
    surgeon.truncate(model, layers=2).save(tmp_path / "out", command=f"surgeon truncate {model} --layers 2")

    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: base\n" in card
    assert "surgeon truncate base --layers 2" in card
    assert str(tmp_path) not in card


def test_a_model_that_has_moved_is_recognised_by_its_receipts_fingerprint(tmp_path):
    model = checkpoint(tmp_path / "model")
    surgeon.grow(model, layers=5, at=[0, 1]).save(tmp_path / "out")
    layer_map = surgeon.inspect(tmp_path / "out", against=model).difference.layer_map
    assert layer_map != (0, 1, 2, None, None), "the layers are not matched by their numbers"
    model.rename(tmp_path / "moved")

    assert surgeon.inspect(tmp_path / "out", against=tmp_path / "moved").difference.layer_map == layer_map
