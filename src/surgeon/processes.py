"""Several processes of one command: who speaks and writes for all, how they wait, and how they share rows and sums."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from surgeon.errors import MeasureError, PlanError, SurgeonError

if TYPE_CHECKING:
    from torch import Tensor

GRACE = 10.0  # seconds in which the first process may report an error before another reports its own
LONGEST_WAIT = timedelta(days=1)  # for a process that works for all; one that has died is seen at once
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "NCCL", "remote process exited")
_SHARES: ContextVar[bool] = ContextVar("shares", default=False)  # whether the processes share what is measured


def is_launched() -> bool:
    """Return whether a launcher (torchrun, accelerate launch) started this process as one of several."""
    return processes() > 1


def processes() -> int:
    """Return how many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process reports and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def check_meeting(connected: int) -> None:
    """Raise PlanError where the processes of the run do not know each other: each would work and write alone."""
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
    if not is_launched():
        return
    import torch.distributed

    if torch.distributed.is_initialized():
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
    if not is_launched():
        return number
    import torch.distributed

    if not torch.distributed.is_initialized():
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


# --- measuring together -------------------------------------------------------------------------------------------


@contextmanager
def together(device: str) -> Iterator[None]:
    """Return a context in which the processes that a launcher started measure one text together; alone it is none.

    Each takes rows of its own (`own_rows`), and sums are those of all (`summed`), so that all know the same numbers and
    make the same choice. The first process writes and speaks (`speaks`). `device` is what the user asked for.
    """
    if not is_launched():
        yield
        return
    import torch
    from accelerate import PartialState

    uses_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    check_meeting(PartialState(cpu=uses_cpu).num_processes)
    token = _SHARES.set(True)
    try:
        with second_to_the_first():
            wait_for_all()
            yield
            wait_for_all()
    finally:
        _SHARES.reset(token)


def own_device(device: str) -> str:
    """Return the device of this process: where several measure together on "cuda", the GPU of its own number."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if _SHARES.get() and device == "cuda" else device


def speaks() -> bool:
    """Return whether this process prints and writes: the first of those that measure together, or the only one."""
    return is_first() or not _SHARES.get()


def own_rows(rows: int) -> slice:
    """Return which of so many rows this process measures: all where it works alone, else as many as the others."""
    if not _SHARES.get():
        return slice(0, rows)
    rank, count = int(os.environ.get("RANK", "0")), processes()
    return slice(rows * rank // count, rows * (rank + 1) // count)


def shared_rows(rows: int) -> slice:
    """Return which of so many rows this process measures. Raises MeasureError where it would have none."""
    own = own_rows(rows)
    if own.start == own.stop:
        raise MeasureError(
            f"{rows} rows of text cannot be shared by more processes than that",
            hint="Start fewer processes, or measure on more: --samples.",
        )
    return own


def summed(sums: "Tensor") -> "Tensor":
    """Return the sum of a tensor over the processes that measure together, on its own device."""
    if not _SHARES.get():
        return sums
    import torch.distributed

    total = sums.cpu().clone()
    torch.distributed.all_reduce(total, group=_meeting_place())
    return total.to(sums.device)


def told_by_the_first(content: bytes | None) -> bytes | None:
    """Return the first process's content, whatever this one has: the others may not see its files, or its clock."""
    if not _SHARES.get():
        return content
    import torch

    size = int(of_the_first(torch.tensor(-1 if content is None else len(content))))
    if size < 0:
        return None
    own = (content or b"")[:size].ljust(size, b"\0")
    same = of_the_first(torch.frombuffer(bytearray(own or b"\0"), dtype=torch.uint8))
    return bytes(same.tolist())[:size]


def of_the_first(tensor: "Tensor") -> "Tensor":
    """Return the first process's tensor, of one shape in all: what is drawn at random differs between devices."""
    if not _SHARES.get():
        return tensor
    import torch.distributed

    same = tensor.cpu().clone()
    torch.distributed.broadcast(same, 0, group=_meeting_place())
    return same.to(tensor.device)
