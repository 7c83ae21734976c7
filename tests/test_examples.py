"""Every public name has an example in its docstring, and every example runs, on toys under the names that it uses."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import talkers

import surgeon

ROOT = Path(__file__).parents[1]
# lm-evaluation-harness, and its tasks from the Hub.
NEED = {"evaluate_tasks": "lm_eval", "TaskEvaluation": "lm_eval"}
QUESTIONS = [{"prompt": f"What is {a} + {a}?", "completion": f" {2 * a}"} for a in range(1, 9)]
INSTRUCTIONS = [{"instruction": "Say it again.", "input": f"cat {a}", "output": f"cat {a}"} for a in range(1, 9)]


def example_of(name: str) -> str:
    """Return the code at the end of the docstring of a public name; "" where there is none."""
    lines = str(inspect.getdoc(getattr(surgeon, name))).partition("\n\nOptions:")[0].rstrip().splitlines()
    code: list[str] = []
    for line in reversed(lines):
        if line and not line.startswith("    "):
            break
        code.insert(0, line)
    return inspect.cleandoc("\n".join(code))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with what the examples name: models, texts, records, runs. Read-only."""
    import torch

    here = tmp_path_factory.mktemp("world")
    text = talkers.written(here / "text.txt", talkers.TEXT * 6)
    talkers.jsonl(here / "questions.jsonl", *QUESTIONS)
    talkers.jsonl(here / "instructions.jsonl", *INSTRUCTIONS)
    sizes = {"n_positions": 1024}
    talkers.talker(here / "gpt2", "gpt2", n_layer=12, **sizes)
    talkers.talker(here / "gpt2-large", "gpt2", n_layer=36, **sizes)
    talkers.talker(here / "SmolLM2-135M", "llama", max_position_embeddings=2048)
    surgeon.prune(here / "gpt2-large", score="last", layers=30, evaluate=False).save(here / "gpt2-large-30")
    surgeon.truncate(here / "SmolLM2-135M", layers=4).save(here / "SmolLM2-24L")
    surgeon.add_gist(here / "SmolLM2-135M", tokens=4).save(here / "SmolLM2-gist")
    shutil.copytree(here / "gpt2", here / "old-gpt2")
    for copy in ("finetune-a", "finetune-b", "gemma-3-270m"):
        shutil.copytree(here / "SmolLM2-135M", here / copy)
    shutil.copy(text, here / "english.txt")
    weights = here / "old-gpt2/model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), here / "old-gpt2/pytorch_model.bin")
    weights.unlink()
    for name in ("first", "second"):
        (here / f"{name}.run").mkdir()
        record = {"step": 1, "tokens": 64, "loss": 2.0, "learning_rate": 1e-4}
        (here / f"{name}.run/metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert Path(text).exists()
    return here


@pytest.mark.slow
@pytest.mark.parametrize("name", surgeon.__all__)
def test_the_example_of_every_public_name_runs(name, world, tmp_path, monkeypatch, one_thread):
    if find_spec(NEED.get(name, "surgeon")) is None:
        pytest.skip(f"pip install {NEED[name]}, and a network for its tasks")
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    example = example_of(name)
    assert f"surgeon.{name}" in example or not inspect.isfunction(getattr(surgeon, name)), "it shows something else"

    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(example, name, "exec"), {"surgeon": surgeon})


def test_an_example_of_an_error_provokes_that_error():
    for name in (name for name in surgeon.__all__ if name.endswith("Error")):
        assert f"except surgeon.{name} as error:" in example_of(name)


def test_the_version_is_that_of_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text()

    assert f'\nversion = "{surgeon.__version__}"\n' in pyproject
    assert "__version__" in dir(surgeon)
