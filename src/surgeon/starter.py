"""Processes that end with the one that started them, however that one ends: a kill leaves none that works on unseen."""

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STARTER = "SURGEON_STARTER"  # the environment variable with the number of the pipe that ends with the starting process


@contextmanager
def held_pipe() -> Iterator[tuple[int, dict[str, str]]]:
    """Yield a pipe to pass on to processes that are started, and the environment that tells them of it.

    Nothing is written to it. The system closes it when this process is gone, and they see that: `ends_with_starter`.
    """
    ends, held = os.pipe()
    try:
        yield ends, {STARTER: str(ends)}
    finally:
        os.close(ends)
        os.close(held)


def ends_with_starter() -> None:
    """Let this process be killed when the one that started it with a `held_pipe` is gone, in whatever way that ended.

    A process without a starter would train on unseen, hold the device, and keep a resumed run out of its directory.
    """
    pipe = os.environ.pop(STARTER, "")
    if pipe.isdecimal() and _is_pipe(int(pipe)):
        threading.Thread(target=_killed_at_the_end_of, args=(int(pipe),), daemon=True).start()


def _is_pipe(number: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(number).st_mode)
    except OSError:
        return False


def _killed_at_the_end_of(pipe: int) -> None:
    with suppress(OSError):
        os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGKILL)
