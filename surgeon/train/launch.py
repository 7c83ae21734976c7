"""The same command again in several processes, one for each device, and how one process of several behaves."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from surgeon.errors import SurgeonError

GRACE = 10.0  # seconds in which the first process may tell an error before another tells its own
PATIENCE = 30.0  # seconds that a process has to end after another has failed
LOOK = 0.1  # seconds between two looks at the processes
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "NCCL", "remote process exited")


def is_launched() -> bool:
    """Return whether a launcher (torchrun, accelerate launch, `relaunch`) started this process as one of several."""
    return processes() > 1


def processes() -> int:
    """Return how many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process speaks and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def is_loss(error: RuntimeError) -> bool:
    """Return whether the error is what torch raises in the others when one process of several has ended."""
    from torch.distributed import DistError

    return is_launched() and (isinstance(error, DistError) or any(text in str(error) for text in LOST))


@contextmanager
def second_to_the_first() -> Iterator[None]:
    """Return a context in which a process that is not the first one dies at once when told to, and fails late.

    Most errors are met by all processes, and one report is enough: while the others wait, the launcher ends them.
    """
    if is_first():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of Python would wait for the others first
    try:
        yield
    except SurgeonError:
        time.sleep(GRACE)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def relaunch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `surgeon ARGUMENTS` in several processes of this machine; return the status of the first that failed, or 0.

    torch's launcher would turn every status into 1, and add its own traceback to every error. SIGTERM to this process
    is passed on to all of them.
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
    try:
        for rank in map(str, range(processes)):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank}
            children.append(subprocess.Popen(command, env=own))  # noqa: S603
        return _watched(children)
    except KeyboardInterrupt:  # the terminal has told them too
        _ended(children, signal.SIGINT, patience=GRACE)
        return 130
    finally:
        _ended(children, signal.SIGKILL)
        signal.signal(signal.SIGTERM, before)


def _watched(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; when one fails end the others. Return the status of the first that failed, or 0."""
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
    """Send a signal to those that have not ended by themselves after so many seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end and any(child.poll() is None for child in children):
        time.sleep(LOOK)
    for child in children:
        if child.poll() is None:
            child.send_signal(signum)


def _free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
