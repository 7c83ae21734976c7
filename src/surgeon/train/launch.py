"""Start the command again, once for each process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from surgeon.processes import GRACE
from surgeon.starter import held_pipe

PATIENCE = 30.0  # seconds that a process has to end after another one failed
LOOK = 0.1  # seconds between two checks of the processes


def relaunch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `surgeon ARGUMENTS` in several processes on this machine; return the status of the first that failed, or 0.

    torch's launcher would turn every status into 1, and add its own traceback to every error. SIGTERM to this process
    is passed on to all of them. They end with this process, also where it is killed: `surgeon.starter`.
    """
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    shared = {"OMP_NUM_THREADS": threads, **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "surgeon", *arguments]
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int, frame: object) -> None:
        for child in children:
            child.send_signal(signum)

    before = signal.signal(signal.SIGTERM, pass_on)
    with held_pipe() as (pipe, told):
        try:
            for rank in map(str, range(processes)):
                own = shared | told | {"RANK": rank, "LOCAL_RANK": rank}
                children.append(subprocess.Popen(command, env=own, pass_fds=(pipe,)))  # noqa: S603
            return _watched(children)
        except KeyboardInterrupt:  # the terminal has sent it to them too
            _ended(children, signal.SIGINT, patience=GRACE)
            return 130
        finally:
            _ended(children, signal.SIGKILL)
            signal.signal(signal.SIGTERM, before)


def _watched(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes; when one fails, end the others. Return the status of the first that failed, or 0."""
    while True:
        statuses = [child.poll() for child in children]
        if failed := next((status for status in statuses if status), 0):
            _ended(children, signal.SIGTERM, patience=LOOK)
            _ended(children, signal.SIGKILL, patience=PATIENCE)
            return 128 - failed if failed < 0 else failed
        if None not in statuses:
            return 0
        time.sleep(LOOK)


def _ended(children: Sequence[subprocess.Popen[bytes]], signum: int, *, patience: float = 0.0) -> None:
    """Send a signal to the processes that have not ended by themselves after so many seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end and any(child.poll() is None for child in children):
        time.sleep(LOOK)
    for child in children:
        if child.poll() is None:
            child.send_signal(signum)


def _free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
