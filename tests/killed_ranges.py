"""Cuts of a model on the Hub that are killed while they download, and what they leave in the range store."""

import json
import os
import random
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path

from hub_server import HubServer


def started(server: HubServer, home: Path, out: Path, *, layers: int = 4) -> "subprocess.Popen[str]":
    """Return a process that cuts the model org/deep, with its cache in `home`."""
    hub = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "surgeon", "truncate", "org/deep", "--layers", str(layers)]
    return subprocess.Popen(
        [*command, "-o", str(out), "--overwrite", "--json"],
        env=os.environ | hub,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(server: HubServer, home: Path, out: Path, chance: random.Random) -> bool:
    """Return whether a cut was killed, at a random moment of its download."""
    before = len(server.ranges)
    process = started(server, home, out)
    while len(server.ranges) == before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 2.0))
    process.kill()
    process.communicate()
    return process.returncode < 0


def check_store(home: Path) -> int:
    """Return the number of blocks in the maps of a store, after comparing each with its bytes on the disk."""
    count = 0
    for path in home.glob("assets/surgeon/*/*/ranges/*.map.json"):
        content = json.loads(path.read_text())
        with (path.parent / content["data"]).open("rb") as data:
            for start, end, digest in content["present"]:
                data.seek(start)
                assert blake2b(data.read(end - start), digest_size=16).hexdigest() == digest
                count += 1
    return count
