"""A recipe that is killed again and again ends with the bytes of one that nobody killed, and repeats no step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import talkers
from recipe_runs import write

KILLS = 20
RECIPE = """
    steps:
      - {name: short, truncate: {model: MODEL, layers: 3}}
      - {name: deep, grow: {model: short, layers: 5}}
      - name: healed
        finetune: {model: deep, data: DATA, max-steps: 4, batch-size: 2, sequence-length: 32, lr: 1e-2, save-every: 1}
      - {name: cut, prune: {model: healed, layers: 4, data: DATA, samples: 2, sequence-length: 32}}
      - {name: gist, gist: {model: cut, tokens: 2}}
      - name: again
        finetune: {model: gist, data: DATA, max-steps: 3, batch-size: 2, sequence-length: 32, lr: 1e-2, save-every: 1}
      - {name: judged, evaluate: {model: again, data: DATA, samples: 2, sequence-length: 32}}
    """


def test_twenty_kills_change_no_byte_of_a_recipe_and_nothing_finished_is_done_again(tmp_path: Path) -> None:
    model = talkers.talker(tmp_path / "model")
    data = talkers.written(tmp_path / "text.txt", talkers.TEXT * 4)
    recipe = write(tmp_path / "r.yaml", RECIPE.replace("MODEL", str(model)).replace("DATA", data))
    script = Path(__file__).with_name("killed_recipe.py")
    command = [sys.executable, str(script), str(recipe), str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == KILLS
    assert len(found["at_work"]) >= 2, "the kills hit more than one step"
    assert found["again"] == []
    assert set(found["digests"]) == {found["whole"]}
