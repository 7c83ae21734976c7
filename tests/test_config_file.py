"""Options from a file, --config, and the file that --show-config prints."""

import json
import shlex
from pathlib import Path

import pytest
from handmade import checkpoint

from surgeon.cli.commands import commands
from surgeon.cli.config import expanded


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a directory with a model and a text."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "loc")
    (tmp_path / "text.txt").write_text("The cat sat on the mat.")
    return tmp_path


def words(typed: str, text: str, here: Path) -> list[str]:
    """Return a command line with a file in it."""
    (here / "run.yaml").write_text(text)
    return expanded(typed.split())[0]


def test_a_file_gives_what_the_command_line_leaves_open(here, run):
    (here / "cut.yaml").write_text("model: loc\nlayers: 2\noutput: two\ndtype: bf16\n")

    assert run("truncate", "--config", "cut.yaml").code == 0
    assert run("truncate", "--layers", "1", "--config=cut.yaml", "-o", "one").code == 0

    assert [json.loads((here / name / "config.json").read_text())["num_hidden_layers"] for name in ("one", "two")] == [
        1,
        2,
    ]
    assert json.loads((here / "one/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_receipt_holds_the_options_and_not_the_file(here, run):
    (here / "cut.yaml").write_text("model: loc\nlayers: 2\noutput: two\n")
    assert run("truncate", "--config", "cut.yaml").code == 0
    receipt = json.loads((here / "two/surgeon.json").read_text())
    (here / "cut.yaml").unlink()

    assert run(*shlex.split(receipt["command"])[1:], "--overwrite").code == 0
    assert run("run", "two/surgeon.json").code == 0
    assert (here / "two-replay/model.safetensors").read_bytes() == (here / "two/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("typed", "text", "expected"),
    [
        ("prune --config run.yaml", "model: loc\nlayers: 2", "prune --layers=2 loc"),
        ("prune here --config run.yaml", "model: loc\nlayers: 2", "prune --layers=2 here"),
        ("prune loc --config run.yaml --layers 1", "layers: 2", "prune loc --layers 1"),
        ("prune loc --config run.yaml", "data: [a, b]\nevaluate: false", "prune --data=a --data=b --no-evaluate loc"),
        ("prune loc --config run.yaml --data c", "data: [a, b]", "prune loc --data c"),
        ("prune loc --config run.yaml", "protect: [1, 1]", "prune --protect=1,1 loc"),
        ("finetune loc --config run.yaml", "packing: off\nlr: 1e-4", "finetune --packing=off --lr=1e-4 loc"),
        ("finetune loc --config run.yaml", "qlora: true\nlora: null", "finetune --qlora loc"),
        ("init --config run.yaml", "config: gpt2\nset: [n_layer=2]", "init --set=n_layer=2 gpt2"),
        ("run --config run.yaml", "recipe: r.yaml\nset: [a=b]\nfrom: cut", "run --set=a=b --from=cut r.yaml"),
        ("plot --config run.yaml", "runs: [a.run, b.run]\nx: tokens", "plot --x=tokens a.run b.run"),
    ],
)  # fmt: skip
def test_a_file_becomes_words_of_the_command_line(typed, text, expected, here):
    assert words(typed, text, here) == expected.split()


@pytest.mark.parametrize(
    ("text", "code", "error", "hint"),
    [
        ("layers: 2\nscroe: a", 2, "run.yaml:2: prune has no option scroe; did you mean score?", "surgeon prune"),
        ("layers: 2\n\nscore: lats", 2, "run.yaml:3: unknown --score 'lats'; did you mean last?", None),
        ("layers: 2\nseed: 1.5", 2, "run.yaml:2: --seed is '1.5', and has to be a whole number", None),
        ("layers: 2\nseed: -1", 2, "run.yaml:2: --seed is -1; it lies between 0 and 4294967295", "Such as --seed 1."),
        ("layers: 2\ngreedy: often", 2, "run.yaml:2: greedy of prune is often; it is true or false", None),
        ("layers: 2\nlayers: 3", 1, "run.yaml:2: layers is there twice", None),
        ("- layers", 1, "run.yaml:1: a config file is no mapping of names to values", None),
        ("layers: [2", 1, "run.yaml:1: no YAML: expected ',' or ']', but got '<stream end>'", None),
        ("config-file: x", 2, "run.yaml:1: prune has no option config-file", None),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_said_with_its_line(text, code, error, hint, here, run):
    (here / "run.yaml").write_text(text)

    outcome = run("prune", "loc", "--config", "run.yaml")

    assert outcome.code == code
    said, told = outcome.err.splitlines()
    assert said == f"error: {error}"
    assert told.startswith("hint: " if hint is None else f"hint: {hint}")


def test_a_file_in_the_output_is_not_replaced_with_it(here, run):
    assert run("truncate", "loc", "--layers", "2", "-o", "two").code == 0
    (here / "two/cut.yaml").write_text("model: loc\nlayers: 1\noutput: two\noverwrite: true\n")

    outcome = run("truncate", "--config", "two/cut.yaml")

    assert outcome.code == 1
    assert outcome.err.startswith("error: the output two holds what --config reads: two/cut.yaml")
    assert (here / "two/cut.yaml").exists()


def test_a_mistake_of_the_command_line_is_not_laid_to_the_file(here, run):
    (here / "run.yaml").write_text("layers: 2\nscore: last")

    assert run("prune", "loc", "--config", "run.yaml", "--score", "lats").err.startswith(
        "error: unknown --score 'lats'"
    )


def test_a_file_that_is_not_there_is_named_with_the_one_that_was_meant(here, run):
    (here / "run.yaml").write_text("layers: 2")

    outcome = run("truncate", "loc", "--config", "rnu.yaml")

    assert (outcome.code, outcome.err) == (
        1,
        "error: cannot read rnu.yaml: No such file or directory\nhint: Did you mean run.yaml?\n",
    )


GIVEN = {
    "finetune": "loc --data text.txt --data b.txt[:90%] --lr 1e-4 --packing off --lora 8 --no-compile --gist-impl auto",
    "prune": "loc --layers 75% --protect 1,1 --score last --no-evaluate --dtype bf16 -o out --overwrite",
    "grow": "loc --layers +2 --hidden-size 2x --noise 0.1 --no-verify",
    "init": "gpt2 --set n_layer=2 --set n_head=2 --tokenizer bytes",
    "generate": "loc --input-file text.txt --temperature 0.5 --top-p 0.9",
    "evaluate": "loc --data text.txt --metric exact-match --extract (-?[\\d,]+):",
    "truncate": "loc --layers 2 --inherit none --seed 3",
    "plot": "a.run b.run --x tokens",
    "compress": "loc --prompt true",
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_show_config_prints_can_be_given_back(name, here, run):
    printed = run(name, *GIVEN[name].split(), "--show-config")
    assert printed.code == 0, printed.err

    again = run(name, "--show-config", "--config", str(_written(here, printed.out)))

    assert again.out == printed.out
    assert {*GIVEN[name].split()} - {"-o"} <= {
        part for word in words(f"{name} --config run.yaml", printed.out, here) for part in (word, *word.split("=", 1))
    } | {"bf16"}


def _written(here: Path, text: str) -> Path:
    (here / "given.yaml").write_text(text)
    return here / "given.yaml"


@pytest.mark.parametrize("name", commands())
def test_every_command_prints_a_file_with_all_its_options_without_any_given(name, run):
    outcome = run(name, "--show-config")

    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"# surgeon {name} --config FILE")
    assert all(line.startswith("#") for line in outcome.out.splitlines() if line)
    assert "None" not in outcome.out


def test_show_config_checks_what_is_given_and_writes_nothing(here, run):
    refused = run("prune", "loc", "--score", "lats", "--layers", "2", "--show-config")

    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: unknown --score 'lats'; did you mean last?")
    assert run("truncate", "loc", "--layers", "2", "--show-config").code == 0
    assert sorted(path.name for path in here.iterdir()) == ["loc", "text.txt"]
