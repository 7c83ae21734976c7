"""The same command again in several processes, one for each device, by torch's own launcher."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence


def is_launched() -> bool:
    """Return whether a launcher (torchrun, accelerate launch) started this process as one of several."""
    return processes() > 1


def processes() -> int:
    """Return how many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process speaks and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def relaunch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `surgeon ARGUMENTS` in several processes of this machine, and return the exit status of the whole.

    torch's launcher turns every failure into status 1; a SIGTERM to this process is passed on to all of them.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ}
    child = subprocess.Popen([*launcher, "-m", "surgeon", *arguments], env=environment)  # noqa: S603

    def pass_on(signum: int, frame: object) -> None:
        child.send_signal(signum)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.wait()  # the terminal has told it too
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
