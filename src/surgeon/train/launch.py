"""Several processes of a run: starting the command again once per device, and the part of each process."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from surgeon.errors import PlanError, SurgeonError
from surgeon.starter import held_pipe

GRACE = 10.0  # seconds in which the first process may report an error before another reports its own
PATIENCE = 30.0  # seconds that a process has to end after another one failed
LONGEST_WAIT = timedelta(days=1)  # for a process that works for all; one that has died is seen at once
LOOK = 0.1  # seconds between two checks of the processes
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "NCCL", "remote process exited")


def is_launched() -> bool:
    """Return whether a launcher (torchrun, accelerate launch, `relaunch`) started this process as one of several."""
    return processes() > 1


def processes() -> int:
    """Return how many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process reports and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def check_meeting(connected: int) -> None:
    """Raise PlanError where the processes of the run do not know each other: each would train and write alone."""
    if connected != processes():
        raise PlanError(
            f"{processes()} processes were started, and accelerate connects {connected}: FSDP and DeepSpeed have no "
            "several processes on a CPU",
            hint="On a CPU: surgeon finetune ... --num-processes N, without a launcher.",
        )


def wait_for_all() -> None:
    """Wait for the other processes of the run, if there are any, however long one of them works alone.

    One tokenises, asks a teacher about every text, or writes and hashes a checkpoint, which may take hours. A group of
    GPUs ends the run after ten minutes, so the processes meet in a group of their CPUs that waits for a day.
    """
    import torch.distributed

    if torch.distributed.is_initialized() and processes() > 1:
        torch.distributed.barrier(group=_meeting_place())


Number = TypeVar("Number", int, float)


def totals(numbers: Sequence[Number]) -> list[Number]:
    """Return the sum of each number over the processes of the run. Asked of their CPUs: their GPUs go on computing."""
    import torch.distributed

    is_float = any(isinstance(number, float) for number in numbers)
    sums = torch.tensor(numbers, dtype=torch.float64 if is_float else torch.long)
    torch.distributed.all_reduce(sums, group=_meeting_place())
    found: list[Number] = sums.tolist()
    return found


def least(number: int) -> int:
    """Return the smallest of a number over the processes of the run."""
    import torch.distributed

    if not torch.distributed.is_initialized() or processes() == 1:
        return number
    found = torch.tensor(number)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN, group=_meeting_place())
    return int(found)


@cache
def _meeting_place() -> Any:
    from torch.distributed import new_group

    return new_group(backend="gloo", timeout=LONGEST_WAIT)


def is_loss(error: RuntimeError) -> bool:
    """Return whether torch raised the error because another process has ended."""
    from torch.distributed import DistError

    return is_launched() and (isinstance(error, DistError) or any(text in str(error) for text in LOST))


@contextmanager
def second_to_the_first() -> Iterator[None]:
    """Return a context in which a process other than the first ends at once at SIGTERM, and reports errors late.

    All processes meet most errors, and one report is enough: while the others wait, the launcher ends them.
    """
    if is_first():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would first wait for the other processes
    try:
        yield
    except SurgeonError:
        time.sleep(GRACE)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


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
