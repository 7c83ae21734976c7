"""`surgeon compress` as users type it."""

import hashlib
import json
import signal
import subprocess
import sys

import pytest
import talkers
from later import LATER

import surgeon
from surgeon.errors import OutputError

if LATER:
    from surgeon.gist import saved

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gisted(tmp_path_factory):
    """Return a function from a toy's name to that toy with a tokenizer and two gist tokens to a gist."""
    home, made = tmp_path_factory.mktemp("gisted"), {}

    def get(name):
        if name not in made:
            talkers.talker(home / name, name)
            surgeon.add_gist(home / name, tokens=2).save(home / f"{name}-gist")
            made[name] = home / f"{name}-gist"
        return made[name]

    return get


def test_a_prompt_is_compressed_checked_and_said(gisted, tmp_path, run):
    done = run("compress", gisted("llama"), "--prompt", "The cat sat on the mat.", "-o", tmp_path / "bot")

    assert done.code == 0, done.err
    assert "→ 2" in done.out
    assert "of the largest logit" in done.out
    assert f"next: surgeon generate {gisted('llama')} TEXT --gist" in done.out
    assert sorted(path.name for path in (tmp_path / "bot").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "gist.json",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["bot"]


def test_gist_json_says_what_it_is_and_keeps_the_prompt_to_itself(gisted, tmp_path, run):
    run("compress", gisted("gpt2"), "--prompt", "The cat sat.", "--tokens", 3, "-o", tmp_path / "bot", "-q")

    about = json.loads((tmp_path / "bot/gist.json").read_text())
    assert about["num_tokens"] == 3
    assert about["position_offset"] == about["prompt"]["tokens"] > 0
    assert about["prompt"]["sha256"] == hashlib.sha256(b"The cat sat.").hexdigest()
    assert "text" not in about["prompt"]
    assert about["model"]["fingerprint"].startswith("sha256-sampled:")
    assert about["layout"] == "text"
    assert list(about)[:7] == ["format", "model", "dtype", "token_ids", "layout", "prompt", "check"]
    assert about["dtype"] == "float32"
    assert about["check"]["difference"] <= 1e-5
    assert about["versions"]["transformers"]
    assert (tmp_path / "bot/gist.safetensors").is_file()


def test_the_text_is_kept_when_asked_for_and_a_file_is_read_to_its_end(gisted, tmp_path, run):
    talkers.written(tmp_path / "system.txt", "The cat é🌿.\n")

    run("compress", gisted("llama"), "--prompt-file", tmp_path / "system.txt", "--keep-text", "-o", tmp_path / "bot")

    assert json.loads((tmp_path / "bot/gist.json").read_text())["prompt"]["text"] == "The cat é🌿.\n"


def test_json_is_one_object_and_bench_adds_the_costs(gisted, tmp_path, run):
    done = run("compress", gisted("llama"), "--prompt", "The cat sat.", "-o", tmp_path / "bot", "--json", "--bench")

    found = json.loads(done.out)
    assert found["output"] == str(tmp_path / "bot")
    assert found["gist_tokens"] == 2
    assert found["stored_as"] == "adapter_model.safetensors"
    assert [row["name"] for row in found["cost"]["rows"]] == ["nothing cached", "whole prompt cached", "gist cached"]
    assert found["cost"]["break_even"] >= 1


def test_a_name_is_made_where_none_is_given(gisted, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert run("compress", gisted("llama"), "--prompt", "The cat.", "--tokens", 1).code == 0

    assert (tmp_path / "llama-gist-compress-1T/gist.json").is_file()


def test_a_chat_puts_the_gist_behind_the_system_turn(gisted, tmp_path, run):
    model = gisted("llama")
    run("compress", model, "--prompt", "Be kind.", "--chat", "-o", tmp_path / "chat")
    run("compress", model, "--prompt", "<system>Be kind.", "-o", tmp_path / "text")

    chat, text = (saved.read(tmp_path / name) for name in ("chat", "text"))
    assert chat.about["layout"] == "chat"
    # The template writes no begin-of-text token, which plain text has: that is the one difference.
    assert chat.about["prompt"]["tokens"] == text.about["prompt"]["tokens"] - 1


def test_an_encoders_prompt_is_compressed_too(gisted, tmp_path, run):
    assert run("compress", gisted("t5"), "--prompt", "The cat sat.", "-o", tmp_path / "bot").code == 0

    assert saved.read(tmp_path / "bot").states.encoded.shape == (1, 2, 48)


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (["--prompt", " "], "the prompt is empty", 1),
        (["--prompt", "see <GIST>"], "the prompt contains <GIST>", 1),
        (["--prompt", "a", "--tokens", "0"], "--tokens is 0", 2),
        (["--prompt-file", "no-such-file"], "cannot read no-such-file", 1),
        (["--prompt", "The cat sat on the mat. " * 40], "and the model sees 64", 1),
        (["--prompt", "a", "--device", "tpu"], "unknown --device 'tpu'", 2),
    ],
)
def test_a_mistake_is_one_line_and_a_hint(options, said, code, gisted, tmp_path, run):
    done = run("compress", gisted("llama"), *options, "-o", tmp_path / "bot", "-q")

    assert done.code == code
    assert said in done.err
    assert len(done.err.splitlines()) == 2
    assert "\nhint: " in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_output_is_no_name_to_be_made(gisted, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()

    done = run("compress", gisted("llama"), "--prompt", "a", "-o", "", "-q")

    assert done.code == 1
    assert ". exists and is not empty" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("options", [[], ["--prompt", "a", "--prompt-file", "b"]])
def test_one_prompt_is_wanted(options, gisted, run):
    assert run("compress", gisted("llama"), *options).code == 2


def test_a_model_without_gist_tokens_is_sent_to_surgeon_gist(toy, run):
    done = run("compress", toy("llama"), "--prompt", "a")

    assert done.code == 1
    assert "has no gist tokens" in done.err
    assert "hint: surgeon gist" in done.err


def test_an_existing_output_is_replaced_only_when_asked_and_only_if_it_is_a_prompt(gisted, tmp_path, run):
    out, model = tmp_path / "bot", gisted("llama")
    run("compress", model, "--prompt", "one", "-o", out)
    first = (out / "gist.json").read_bytes()

    assert "is not empty" in run("compress", model, "--prompt", "two", "-o", out).err
    assert (out / "gist.json").read_bytes() == first
    assert run("compress", model, "--prompt", "two", "-o", out, "--overwrite").code == 0
    assert (out / "gist.json").read_bytes() != first
    assert "is not a compressed prompt" in run("compress", model, "--prompt", "a", "-o", model, "--overwrite").err
    assert (model / "config.json").is_file()


def test_a_full_disk_leaves_nothing(gisted, tmp_path, run, monkeypatch):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # fails as a full disk does
    try:
        with pytest.raises(OutputError):
            surgeon.compress(gisted("llama"), "The cat sat.", output=tmp_path / "bot")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)

    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing_that_looks_like_a_prompt(gisted, tmp_path):
    code = (
        "import os, signal, surgeon, surgeon.verbs.compress as it\n"
        "write = it.write_files\n"
        "def die(stage, files):\n"
        "    write(stage, dict(list(files.items())[:-1]))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "it.write_files = die\n"
        f"surgeon.compress({str(gisted('llama'))!r}, 'The cat.', output={str(tmp_path / 'bot')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)

    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "bot").exists()
    assert not list(tmp_path.rglob("gist.json"))
    surgeon.compress(gisted("llama"), "The cat.", output=tmp_path / "bot")
    assert [path.name for path in tmp_path.iterdir()] == ["bot"]
