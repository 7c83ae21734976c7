"""Recipes that are killed: a process that loads everything once, and forks a recipe again and again to kill it.

    python tests/killed_recipe.py RECIPE DIRECTORY KILLS

Prints one JSON object: how many were killed, how many of them while each step was at work, the steps that were begun
though the record had them as done (there must be none), and the SHA-256 of the files of each end and of a run that
nobody killed. The last run is repeated until it ends, so that every kill lies before some end.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from recipe_runs import InProcess, run

import surgeon.evals.perplexity
import surgeon.train.runner  # noqa: F401  # with all that it imports, so that a fork begins at once


class Logged(InProcess):
    """Commands that write the output of each step that begins to a file."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log

    def _note(self, command: str, words: Sequence[str]) -> None:
        output = next((word for word in words if word.startswith("--output=")), words[0])
        with self.log.open("a") as file:
            file.write(f"{command} {output}\n")

    def run(self, command: str, words: Sequence[str]) -> dict[str, Any]:
        self._note(command, words)
        return super().run(command, words)

    def write(self, command: str, words: Sequence[str], surgery: Any) -> dict[str, Any]:
        self._note(command, words)
        return super().write(command, words, surgery)


def forked(recipe: Path, output: Path, seconds: float | None) -> bool:
    """Run a recipe in a fork, and return whether it was killed after so many seconds."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(f"{output}.out", "a")  # noqa: SIM115, PTH123
        try:
            run(recipe, output, Logged(Path(f"{output}.log")))
        except BaseException as error:  # noqa: BLE001  # whatever it is, the parent shows it
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert status == 0, Path(f"{output}.out").read_text()
    return False


def done_in(output: Path) -> dict[str, str]:
    """Return the steps that the record of a directory has as done, with what their commands were given first."""
    file = output / "recipe.json"
    if not file.exists():
        return {}
    steps = json.loads(file.read_text())["steps"].items()
    return {name: f"{step['command']} {step['words'][0]}" for name, step in steps if step["status"] == "done"}


def digest(output: Path) -> str:
    """Return the hash of all weights and configs of a recipe's outputs."""
    found = hashlib.sha256()
    for path in sorted(output.glob("*/*")):
        if path.name in ("model.safetensors", "config.json") and not path.parent.name.endswith(".run"):
            found.update(path.relative_to(output).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def main(recipe: Path, directory: Path, kills: int) -> dict[str, object]:
    chance = random.Random(0)
    began = time.monotonic()
    forked(recipe, directory / "whole", None)
    whole = time.monotonic() - began
    at_work: Counter[str] = Counter()
    digests: list[str] = []
    again: list[str] = []
    killed, runs = 0, 0
    output = directory / "run-0"
    while killed < kills or len(digests) <= runs:
        done = done_in(output)
        log = Path(f"{output}.log")
        before = log.stat().st_size if log.exists() else 0
        was_killed = forked(recipe, output, None if killed >= kills else chance.uniform(0.02, 0.5) * whole)
        begun = log.read_text()[before:].splitlines() if log.exists() else []
        again += [line for line in begun if line in done.values()]
        if was_killed:
            killed += 1
            at_work[begun[-1].partition(" ")[0] if begun else "none"] += 1
            continue
        digests.append(digest(output))
        if killed < kills:
            runs += 1
            output = directory / f"run-{runs}"
    return {
        "killed": killed,
        "at_work": dict(at_work),
        "again": again,
        "whole": digest(directory / "whole"),
        "digests": digests,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
