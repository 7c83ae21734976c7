"""A run that is killed again and again ends with the weights of one that nobody killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import talkers

KILLS = 20


def test_twenty_kills_while_training_and_saving_change_no_byte_of_the_result(tmp_path: Path) -> None:
    """A checkpoint is written after every step, and every second kill comes while one is being written."""
    model = talkers.talker(tmp_path / "model")
    data = talkers.written(tmp_path / "text.txt", talkers.TEXT * 4)
    script = Path(__file__).with_name("killed.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(model), data, str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == KILLS
    assert found["saving"] >= KILLS // 2
    assert found["digests"]
    assert set(found["digests"]) == {found["whole"]}
    for run in tmp_path.glob("*.run"):
        assert not list(run.glob(".checkpoint-*")), "what a killed run left is removed by the next one"
