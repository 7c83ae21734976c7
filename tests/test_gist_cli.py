"""`surgeon gist` as users type it."""

import json

import pytest
import talkers
import toys
from later import LATER

from surgeon.gist.tokens import read_gist

if LATER:
    from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    directory = tmp_path_factory.mktemp("talker") / "llama"
    toys.build("llama", directory, vocab_size=290)
    talkers.tokenizer_of().save_pretrained(directory)
    return directory


def test_a_gist_token_is_added_and_said(talker, tmp_path, run):
    done = run("gist", talker, "--tokens", 4, "-o", tmp_path / "gist")

    assert done.code == 0, done.err
    assert "vocab_size" in done.out
    assert "290 → 291" in done.out
    assert f"next: surgeon finetune {tmp_path / 'gist'} --gist --data" in done.out
    config = json.loads((tmp_path / "gist/config.json").read_text())
    assert read_gist(config).num_tokens == 4
    assert "surgeon gist" in (tmp_path / "gist/README.md").read_text()
    assert not any(toys.load(tmp_path / "gist")[1].values())


def test_a_name_is_made_where_none_is_given(talker, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert run("gist", talker, "--quiet").code == 0

    assert AutoTokenizer.from_pretrained(tmp_path / "llama-gist").convert_tokens_to_ids("<GIST>") == 290


def test_json_is_one_object_with_what_changed(talker, tmp_path, run):
    done = run("gist", talker, "--tokens", 2, "--distinct", "-o", tmp_path / "gist", "--json")

    found = json.loads(done.out)
    assert found["layers"] == {"before": 6, "after": 6}
    assert found["parameters"]["after"] - found["parameters"]["before"] == 2 * 2 * 48  # embedding and head
    assert found["config"]["vocab_size"] == {"before": 290, "after": 292}
    assert found["config"]["gist"]["after"]["tokens"] == ["<GIST_0>", "<GIST_1>"]


def test_a_dry_run_writes_nothing(talker, tmp_path, run):
    done = run("gist", talker, "-o", tmp_path / "gist", "--dry-run")

    assert done.code == 0
    assert "(not written)" in done.out
    assert not (tmp_path / "gist").exists()


def test_check_measures_and_writes_nothing(talker, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)

    done = run("gist", talker, "--check")

    assert done.code == 0
    assert "loading" in done.err
    assert "supported" in done.out
    assert "leak" in done.out
    assert list(tmp_path.iterdir()) == []


def test_check_gives_the_figures_as_json(talker, run):
    found = json.loads(run("gist", talker, "--check", "--json").out)

    assert found.keys() == {"supported", "reason", "leak", "control", "cache_difference", "rebased_difference"}
    assert found["supported"]
    assert found["leak"] == 0.0


def test_check_fails_where_a_model_cannot_be_gisted(toy, run):
    done = run("gist", toy("lfm2"), "--check")

    assert done.code == 1
    assert "not supported: layers 0-1, 3-4 of lfm2 are conv" in done.out


def test_what_cannot_be_gisted_is_refused_before_anything_is_written(toy, tmp_path, run):
    done = run("gist", toy("lfm2"), "-o", tmp_path / "gist")

    assert done.code == 1
    assert done.err.startswith("error: layers 0-1, 3-4 of lfm2 are conv")
    assert "\nhint: " in done.err
    assert not (tmp_path / "gist").exists()


def test_twice_is_refused(talker, tmp_path, run):
    run("gist", talker, "-o", tmp_path / "gist")

    done = run("gist", tmp_path / "gist", "-o", tmp_path / "more")

    assert done.code == 1
    assert "has gist tokens already" in done.err


def test_a_plan_needs_neither_torch_nor_transformers(talker):
    import subprocess
    import sys

    code = (
        "import sys, surgeon\n"
        f"surgeon.add_gist({str(talker)!r}, tokens=2).summary()\n"
        "print(*{'torch', 'transformers', 'numpy', 'tokenizers'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == ""
