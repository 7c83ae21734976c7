"""Tokens and passwords: in no file and no message of surgeon's, and sent to no host but the Hub."""

import base64
import io
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from handmade import checkpoint
from hub_server import TOKEN, HubServer

import surgeon
from surgeon.text import scrubbed

CANARY = "hf_" + "Canary0" * 5  # of the form and the length of a token
PASSWORD = "a-password-with-hyphens"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"surgeon x --token {CANARY} -o out", "surgeon x --token *** -o out"),
        ("surgeon x --hf-token=short! -o out", "surgeon x --hf-token=*** -o out"),
        ("x --api-key zz9 --password=zz9", "x --api-key *** --password=***"),
        (f"cannot reach https://me:{PASSWORD}@hub.example/x", "cannot reach https://***@hub.example/x"),
        (f"https://{CANARY}@hub.example", "https://***@hub.example"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("no: Basic bWU6YS1wYXNzd29yZA==", "no: Basic ***"),
        ("https://cdn/x?a=1&X-Amz-Signature=0af&b=2", "https://cdn/x?a=1&X-Amz-Signature=***&b=2"),
        (f"('{CANARY}')", "('***')"),
    ],
)
def test_what_is_a_secret_by_its_form_is_taken_out(text, expected):
    assert scrubbed(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "surgeon gist m --tokens 4 --experts-per-token 2 --max-new-tokens 9 --gist-random-tokens 1,2",
        "surgeon prune m --key-value-heads 4 --tokens last",
        "error: --experts-per-token is 0; the least is 1",
        "https://huggingface.co/me/hf_model?x=1 and git@github.com:me/x and a:b@c",
        "a Basic information model of Basic Q8",
    ],
)
def test_what_only_looks_like_one_stays(text):
    assert scrubbed(text) == text


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"])
def test_the_values_of_the_environment_are_taken_out_whatever_their_form(name, monkeypatch):
    monkeypatch.setenv(name, "any thing/at all")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "allowed-everywhere")
    monkeypatch.setenv("MY_TOKEN", "short")

    assert scrubbed("x any thing/at all allowed-everywhere short") == "x *** allowed-everywhere short"


def test_a_receipt_and_a_card_hold_the_command_without_them(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", PASSWORD)
    command = f"surgeon truncate m --layers 2 --token {CANARY} https://u:{PASSWORD}@host {PASSWORD}"

    surgeon.truncate(checkpoint(tmp_path / "model"), layers=2).save(tmp_path / "out", command=command)

    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md"))
    assert "surgeon truncate m --layers 2 --token *** https://***@host ***" in written  # the receipt
    assert "surgeon truncate m --layers 2 --token '***' 'https://***@host' '***'" in written  # the card
    assert CANARY not in written
    assert PASSWORD not in written


def test_an_error_from_python_holds_none():
    error = surgeon.HubError(f"refused: {CANARY}", hint=f"See https://me:{PASSWORD}@hub.example.")

    assert str(error) == "refused: ***"
    assert error.hint == "See https://***@hub.example."


@pytest.mark.slow
def test_the_status_of_a_failed_run_holds_none(tmp_path):
    from surgeon.train.reporter import Reporter

    Reporter(tmp_path, None).failed(RuntimeError(f"the server said {CANARY}"))

    assert json.loads((tmp_path / "status.json").read_text())["error"] == "the server said ***"


# --- the command line -------------------------------------------------------------------------------------------


def told(home: Path, server: HubServer, *arguments: object, **environment: str) -> str:
    """Return all that a command printed, which must have failed."""
    hub = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": CANARY}
    hub["HF_ENDPOINT"] = server.endpoint.replace("//", f"//me:{PASSWORD}@")
    command = [sys.executable, "-m", "surgeon", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | hub | environment, cwd=home)
    assert process.returncode in (1, 2), process.stderr
    assert "error" in process.stderr.lower(), process.stderr
    return process.stdout + process.stderr


@pytest.mark.parametrize("more", [[], ["--debug"]])
@pytest.mark.parametrize("status", [400, 401])
def test_a_hub_that_repeats_the_token_is_told_without_it(status, more, tmp_path):
    """400 is told with the Hub's own message."""
    with HubServer() as server:
        server.commit("me/model", {"config.json": b"{}"})
        server.fail_with, server.repeats_token = status, True
        said = told(tmp_path, server, "truncate", "me/model", "--layers", 2, *more)

    assert CANARY not in said
    assert PASSWORD not in said
    assert base64.b64encode(f"me:{PASSWORD}".encode()).decode() not in said
    assert ("Traceback" in said) == bool(more)
    assert "***" in said or (status, more) == (401, [])


def test_a_mistake_in_usage_does_not_repeat_it(tmp_path):
    with HubServer() as server:
        assert CANARY not in told(tmp_path, server, "truncate", "model", CANARY, "--layers", 2)
        assert CANARY not in told(tmp_path, server, "truncate", "model", f"--token={CANARY}", "--layers", 2)


def test_standard_error_is_as_it_was_afterwards(run):
    before = sys.stderr

    assert run("truncate", "no-such-model/at/all", "--layers", 2).code == 1
    assert sys.stderr is before


def test_a_log_of_a_library_holds_none():
    from surgeon.cli.app import _WithoutSecrets

    stream = io.StringIO()
    print(f"wandb: {CANARY}", "logged in", file=_WithoutSecrets(stream), flush=True)  # type: ignore[type-var]

    assert stream.getvalue() == "wandb: *** logged in\n"


# --- other hosts ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a Hub that sends every reader, and every upload of a large file, to another name of its host."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http
    from test_hub import use_endpoint, use_home

    with HubServer() as server:
        use_endpoint(monkeypatch, server.endpoint)
        use_home(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # huggingface_hub waits 23 s before it gives up
        yield server


def test_an_endpoint_that_holds_a_password_is_told_without_it(hub, monkeypatch):
    from test_hub import use_endpoint

    from surgeon.checkpoint.hub import open_hub

    use_endpoint(monkeypatch, f"http://me:{PASSWORD}@127.0.0.1:1")  # where nobody listens
    with pytest.raises(surgeon.HubError, match=r"cannot reach the Hub at http://\*\*\*@127.0.0.1:1") as caught:
        open_hub("me/model")
    assert PASSWORD not in f"{caught.value} {caught.value.hint}"


def test_a_redirect_of_any_request_leaves_the_token_behind(hub, tmp_path):
    from surgeon.checkpoint.hub import open_hub

    model = checkpoint(tmp_path / "model")
    hub.commit("me/model", {path.name: path.read_bytes() for path in model.iterdir()})
    source = open_hub("me/model")
    hub.away = True
    for ask in (lambda: source.files, lambda: source.tensors, lambda: source.fetch("tokenizer.json")):
        with suppress(surgeon.HubError):  # it may be refused; it may not be let through with the token
            ask()

    assert any(path.startswith("/api/models") for _, path, _ in hub.requests)
    assert hub.leaks == []


def test_an_upload_to_another_host_goes_without_the_token(hub, tmp_path):
    from surgeon.checkpoint.hub import push

    model = checkpoint(tmp_path / "model")
    hub.away = True
    push(model, "me/result", private=False, reads={})

    repo = hub.repos["me/result"]
    assert repo.commits[repo.refs["main"]]["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert hub.leaks == []
