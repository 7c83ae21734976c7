"""Every recipe of recipes/ runs on a toy, from its file as it is shipped, and the schema is that of the commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import demo
import pytest
import talkers
from recipe_runs import InProcess, run

from surgeon.recipe.reading import read_recipe

LATER = False
if LATER:
    import torch  # noqa: F401  # the steps train

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SHORT = {"batch-size": "2", "sequence-length": "32"}
# What each recipe is given on a toy: settings beside the model and the data, and the steps whose figures must be there.
TOY = {
    "prune-and-heal": (SHORT | {"model": "toy", "data": "text.txt", "steps": "2", "lr": "1e-3"}, "judged"),
    "draft-model": (
        SHORT | {"model": "toy", "data": "text.txt", "layers": "3", "steps": "2", "lr": "1e-3", "sampled": "8"},
        "judged",
    ),
    "prune-and-heal-iterated": (
        SHORT | {"model": "toy", "data": "text.txt", "layers": "80%", "ends": "< 1e9", "steps": "2", "lr": "1e-3"},
        "judged",
    ),
    "search-and-heal": (
        SHORT
        | {"model": "toy", "data": "text.txt", "unseen": "other.txt", "target": "100k", "evaluations": "6"}
        | {"samples": "4", "points": "[1, 2]", "steps": "2", "lr": "1e-3"},
        "judged-2",
    ),
    "inheritune": (
        SHORT | {"reference": "toy", "data": "text.txt", "steps": "2", "more": "+1", "until": "<= -1e9"},
        "judged-4",
    ),
    "inheritune-from-scratch": (
        SHORT | {"data": "text.txt", "steps": "3", "quarter": "2", "twice": "4", "samples": "2"},
        "judged-random-twice",
    ),
    "train-large-then-compress": (
        SHORT
        | {"data": "text.txt", "small-steps": "2", "large-steps": "1", "heal-steps": "1", "samples": "2"}
        | {"bits": "[4]"},
        "judged-cut-4",
    ),
    "question-formation": (
        {
            "lines": "60",
            "validation-lines": "20",
            "generalization-lines": "20",
            "lexicon": "30",
            "steps": "2",
            "floor": "<= 10",
        },
        "loss",
    ),
    "self-data-distillation": (
        {
            "model": "toy",
            "data": "rows.jsonl",
            "test": "[rows.jsonl, 'rows.jsonl[3:]']",
            "metrics": "[exact-match, rouge-l]",
            "extract": r"(\w+)",
            "test-tokens": "3",
            "max-new-tokens": "8",
            "seeds": "[0, 1]",
            "batch-size": "2",
            "sequence-length": "64",
        },
        "distilled-judged-1",
    ),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    talkers.talker(tmp_path / "toy", max_position_embeddings=256)
    talkers.written(tmp_path / "text.txt", talkers.TEXT * 8)
    talkers.written(tmp_path / "other.txt", talkers.TEXT[::-1] * 8)
    rows = [{"prompt": f"the cat {number}", "completion": "sat on the mat"} for number in range(6)]
    talkers.jsonl(tmp_path / "rows.jsonl", *rows)
    return tmp_path


def test_every_recipe_is_tried_here() -> None:
    assert {path.stem for path in RECIPES} == set(TOY)


NEED = {"train-large-then-compress": ("torchao", "compressed_tensors")}


@pytest.mark.parametrize("name", TOY)
def test_a_recipe_runs_on_a_toy_and_ends_with_its_figures(name: str, here: Path, one_thread: None) -> None:
    if missing := [library for library in NEED.get(name, ()) if find_spec(library) is None]:
        pytest.skip(f"pip install {missing[0]}")
    settings, last = TOY[name]
    given = [f"{key}={value}" for key, value in settings.items()]

    done = run(ROOT / f"recipes/{name}.yaml", here / "out", settings=given)

    figures = {step.name: step.result for step in done.outcomes}
    assert {"loss", "mean", "acceptance"} & set(figures[last])
    assert last in (here / "out/report.md").read_text()
    again = InProcess()
    run(ROOT / f"recipes/{name}.yaml", here / "out", again, settings=given)
    assert again.ran == []


def test_the_demo_reads_its_outcome_from_the_run(here: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = TOY["prune-and-heal"]
    given = [f"{key}={value}" for key, value in (settings | {"kd-weight": "1"}).items()]
    run(ROOT / "recipes/prune-and-heal.yaml", here / "out", settings=given)

    monkeypatch.setattr(demo, "RUN", here / "out")
    assert demo.SETTINGS.keys() <= read_recipe(demo.RECIPE, InProcess().names()).settings.keys()
    assert re.search(r"6 layers became 5\. .*\n[\d.]+ before, [\d.]+ cut, [\d.]+ healed", demo.outcome())


def test_each_recipe_says_how_it_is_run_and_names_the_schema() -> None:
    for path in RECIPES:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# yaml-language-server: $schema=schema.json\n"), path
        command = re.search(rf"#   surgeon run recipes/{path.name}((?: .*\\\n#)*.*)\n", text)
        assert command is not None, path
        recipe = read_recipe(path, InProcess().names())
        needed = {name for name, value in recipe.settings.items() if value.form == "null"}
        assert set(re.findall(r"--set ([\w-]+)=", command[1])) == needed, path


def test_the_schema_is_that_of_the_commands() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts/schema.py"), "--check"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    content = json.loads((ROOT / "recipes/schema.json").read_text())
    assert content["$defs"]["finetune"]["properties"]["max-steps"]["description"]
