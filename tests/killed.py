"""Runs that are killed: a process that loads everything once, and forks a run again and again to kill it with SIGKILL.

    python tests/killed.py MODEL DATA DIRECTORY KILLS

Prints one JSON object: how many runs were killed, how many of them while a checkpoint was being written, how often a
run came to its end all the same, and the SHA-256 of the weights of each of those and of a run that nobody killed.
The last run is resumed until it ends, so that every kill lies before some end.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import surgeon
import surgeon.train.runner  # with all that it imports, so that a fork begins at once

OPTIONS = {"max_steps": 16, "batch_size": 2, "sequence_length": 32, "save_every": 1, "eval_every": 8, "lr": "1e-2"}
OPTIONS |= {"gradient_accumulation": 2, "eval_rows": 2}
EVENTS = 90  # of two saves


def run(model: str, data: str, output: Path) -> None:
    surgeon.finetune(model, data=[data], output=output, resume=True, **OPTIONS)


def stages(output: Path) -> set[tuple[str, int]]:
    """Return what there is of checkpoints that are being written, or were when a run was killed, and since when."""
    found = set()
    for path in Path(f"{output}.run").glob(".checkpoint-*.partial"):
        with suppress(FileNotFoundError):  # it became a checkpoint
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def die_while_saving(events: int) -> None:
    """Kill this process by SIGKILL just before so many things were done to the files of a checkpoint being written.

    Python reports each opening, renaming and removing of a file before it is done (PEP 578). So a kill comes between
    two of them however slow the machine is.
    """
    seen, began = 0, False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen, began
        if event.partition(".")[0] not in ("open", "os", "shutil"):
            return
        if not any(isinstance(each, (str, os.PathLike)) and ".partial" in str(each) for each in arguments):
            return
        if event == "os.mkdir":
            began = True  # what came before removed the leftovers of the last life
        elif began:
            seen += 1
            if seen == events:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def forked(
    model: str, data: str, output: Path, *, seconds: float | None = None, events: int | None = None
) -> tuple[bool, bool]:
    """Return whether a run was killed, and whether it was writing a checkpoint then.

    It is killed after so many `seconds`, wherever it is, or at one of the `events` of its saving.
    """
    left = stages(output)
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(f"{output}.log", "a")  # noqa: SIM115, PTH123
        if events is not None:
            die_while_saving(events)
        try:
            run(model, data, output)
        except surgeon.SurgeonError as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        assert status == 0, Path(f"{output}.log").read_text()
        return False, False
    return True, bool(stages(output) - left)


def digest(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def main(model: str, data: str, directory: Path, kills: int) -> dict[str, object]:
    chance = random.Random(0)
    began = time.monotonic()
    forked(model, data, directory / "whole")
    whole = time.monotonic() - began
    killed = saving = lives = 0
    digests: list[str] = []
    output = directory / "run-0"
    while killed < kills or not (output / "config.json").is_file():
        how: dict[str, Any] = {}
        if killed < kills and killed % 2:
            how = {"seconds": chance.uniform(0.05, 0.4) * whole}
        elif killed < kills:
            how = {"events": chance.randint(1, EVENTS)}
        was_killed, was_saving = forked(model, data, output, **how)
        lives += 1
        if (output / "config.json").is_file():  # it had come to its end, whether or not it was killed since
            digests.append(digest(output))
            if killed < kills:
                output = directory / f"run-{lives}"
        else:
            killed, saving = killed + was_killed, saving + was_saving
    return {"killed": killed, "saving": saving, "whole": digest(directory / "whole"), "digests": digests}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
