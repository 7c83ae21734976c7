"""The command line as users meet it: what is printed where, JSON, exit codes."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import toys

import surgeon
from surgeon.text import layers, size


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "surgeon", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


def test_a_truncation_says_what_it_did_and_what_to_run_next(toy, tmp_path):
    result = run("truncate", toy("llama"), "--layers", "50%", "-o", tmp_path / "cut")

    assert result.returncode == 0
    for expected in (
        "6 → 3  (source layers 0-2)",
        "parameters",
        "config num_hidden_layers  6 → 3",
        f"next: surgeon finetune {tmp_path / 'cut'} --data text.txt --teacher {toy('llama')}",
    ):
        assert expected in result.stdout
    assert result.stderr == ""


def test_json_is_one_object_on_standard_output_and_nothing_else(toy, tmp_path):
    result = run("truncate", toy("llama"), "--layers", 4, "-o", tmp_path / "cut", "--json", "--seed", 3)

    summary = json.loads(result.stdout)
    assert summary["output"] == str(tmp_path / "cut")
    assert summary["layers"] == {"before": 6, "after": 4}
    assert summary["layer_map"] == [0, 1, 2, 3]
    assert summary["bytes_written"] == 4 * summary["parameters"]["after"]
    assert summary["parameters"]["before"] == sum(p.numel() for p in toys.load(toy("llama"))[0].parameters())
    assert summary["seconds"] > 0


def test_a_dry_run_writes_nothing_and_says_all(toy, tmp_path):
    text = run("truncate", toy("llama"), "--layers", 4, "--dry-run", cwd=tmp_path)
    parsed = json.loads(run("truncate", toy("llama"), "--layers", 4, "--dry-run", "--json", cwd=tmp_path).stdout)

    assert "llama-truncate-4L (not written)" in text.stdout
    assert "peak memory" in text.stdout
    assert parsed["output"] == "llama-truncate-4L"
    assert parsed["config"] == {"num_hidden_layers": {"before": 6, "after": 4}}
    assert list(tmp_path.iterdir()) == []


def test_the_default_output_is_the_models_name_with_what_was_done(toy, tmp_path):
    run("truncate", toy("llama"), "--layers", 2, cwd=tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["llama-truncate-2L"]
    receipt = json.loads((tmp_path / "llama-truncate-2L/surgeon.json").read_text())
    assert receipt["command"] == f"surgeon truncate {toy('llama')} --layers 2"


def test_inspect_prints_the_anatomy_for_people_and_for_scripts(toy):
    text = run("inspect", toy("gemma3_text")).stdout
    parsed = json.loads(run("inspect", toy("gemma3_text"), "--json", "--tensors").stdout)

    assert "AAB x2" in text
    assert parsed["sizes"]["ffn"] == 52
    assert parsed["tied"] is True
    assert parsed["layer_kinds"][2] == "full_attention"
    assert sum(parsed["parameters_by_part"].values()) == parsed["parameters"]
    assert parsed["tensors"]["model.norm.weight"] == {"dtype": "F32", "shape": [48], "file": "model.safetensors"}


def test_bad_usage_exits_with_2_one_line_and_a_hint(toy):
    for arguments in (["truncate", toy("llama")], ["truncate", toy("llama"), "--layer", "2"], ["cut", toy("llama")]):
        result = run(*arguments)
        assert result.returncode == 2
        assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["error", "hint"]


def test_debug_shows_the_traceback_that_is_hidden_otherwise(toy):
    plain, debug = (run("truncate", toy("llama"), "--layers", 9, *more) for more in ([], ["--debug"]))

    assert (plain.returncode, debug.returncode) == (1, 1)
    assert plain.stderr.startswith("error: cannot truncate to 9 layers: the model has 6\nhint: ")
    assert plain.stdout == ""
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr


def test_a_reader_that_goes_away_is_no_error_of_ours(toy):
    command = f"{sys.executable} -m surgeon inspect {toy('mixtral')} --tensors | head -1"

    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)

    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 1


def test_on_a_terminal_nothing_is_drawn_for_what_takes_less_than_a_second(toy, tmp_path):
    master, slave = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "surgeon",
        "truncate",
        str(toy("llama")),
        "--layers",
        "2",
        "-o",
        str(tmp_path / "cut"),
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)

    assert result.returncode == 0
    os.set_blocking(master, False)
    with pytest.raises(OSError, match="Input/output|temporarily unavailable"):
        os.read(master, 100)


def test_against_explains_a_cut_by_its_receipt(toy, tmp_path):
    surgeon.truncate(toy("olmo2"), layers=4).save(tmp_path / "cut")

    difference = surgeon.inspect(tmp_path / "cut", against=toy("olmo2")).difference
    text = run("inspect", tmp_path / "cut", "--against", toy("olmo2")).stdout

    assert difference is not None
    assert difference.layer_map == (0, 1, 2, 3)
    assert (difference.added, difference.changed, dict(difference.reshaped)) == ((), (), {})
    assert len(difference.same) == len(surgeon.inspect(tmp_path / "cut").tensors)
    assert all(name.startswith(("model.layers.4.", "model.layers.5.")) for name in difference.removed)
    assert difference.config == {"num_hidden_layers": (6, 4)}
    assert "only there" in text


def test_against_tells_changed_values_and_other_dtypes_apart(toy, tmp_path):
    surgeon.truncate(toy("llama"), layers=6, inherit=["attention", "mlp", "norm"]).save(tmp_path / "redrawn")
    surgeon.truncate(toy("llama"), layers=6).save(tmp_path / "rounded", dtype="bfloat16")

    redrawn = surgeon.inspect(tmp_path / "redrawn", against=toy("llama")).difference
    rounded = surgeon.inspect(tmp_path / "rounded", against=toy("llama")).difference

    assert redrawn is not None
    assert rounded is not None
    assert set(redrawn.changed) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert len(rounded.reshaped) == len(surgeon.inspect(toy("llama")).tensors)
    assert rounded.reshaped["model.norm.weight"][1].startswith("BF16")


def test_numbers_are_shown_as_people_say_them():
    assert [size(n) for n in (0, 999, 1000, 538_000_000, 4_260_000_000, 10**13)] == [
        "0 B", "999 B", "1 kB", "538 MB", "4.26 GB", "10 TB",
    ]  # fmt: skip
    assert layers([0, 1, 2, 5, None, None, 7]) == "0-2, 5, new, new, 7"


def test_against_explains_a_growth_by_its_receipt(toy, tmp_path):
    surgeon.grow(toy("llama"), layers=8, hidden_size="2x", intermediate_size=70).save(tmp_path / "grown")

    inspection = surgeon.inspect(tmp_path / "grown", against=toy("llama"))

    assert inspection.difference is not None
    assert inspection.difference.layer_map == (0, 1, 2, None, 3, 4, 5, None)
    assert inspection.difference.axis_maps == {"hidden": [[0, 48], [0, 48]], "ffn": [[0, 52], [-1, 18]]}
    assert "48 → 96: 48 kept, 48 copies" in str(inspection)
    assert "52 → 70: 52 kept, 18 new" in str(inspection)
