"""The tutorials run from beginning to end, on the first layers of the trained model and with few steps."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

import surgeon

TUTORIALS = Path(__file__).parents[2] / "docs/tutorials"
# What each makes in tutorial-output/: a checkpoint, and figures or a prompt.
MAKES = {
    "prune_and_heal": ("prune-and-heal/healed/config.json", "prune-and-heal/scores.png", "prune-and-heal/loss.png"),
    "grow_and_train": ("grow-and-train/trained/config.json", "grow-and-train/loss.png"),
    "gist_a_prompt": ("gist-a-prompt/gisted/config.json", "gist-a-prompt/prompt/gist.json"),
}

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def small(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model's first five layers. Read-only."""
    model = tmp_path_factory.mktemp("small") / "SmolLM2-5L"
    surgeon.truncate(smollm2, layers=5).save(model)
    return model


def test_there_is_no_other_tutorial():
    assert {path.stem for path in TUTORIALS.glob("*.py")} == set(MAKES)


@pytest.mark.parametrize("name", MAKES)
def test_a_tutorial_runs_and_makes_what_it_says(name, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPS", "1")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(small)])

    names = runpy.run_path(str(TUTORIALS / f"{name}.py"), run_name="__main__")

    assert names["training"].steps == 1
    assert all((tmp_path / "tutorial-output" / file).stat().st_size > 0 for file in MAKES[name])
    assert len(capsys.readouterr().out) > 500
    for config in (tmp_path / "tutorial-output").rglob("config.json"):
        json.loads(config.read_text())
