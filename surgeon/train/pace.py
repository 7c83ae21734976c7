"""How fast a run is: tokens a second, the floating-point operations of a token, and their share of a device's peak.

The share (MFU, model FLOPs utilisation) counts what the model needs, not what is computed twice to save memory.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

WINDOW = 30  # steps that the current speed is the mean of


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast it goes now."""

    tokens_per_second: float | None
    mfu: float | None  # 0 to 1
    seconds_left: float | None
    memory: int | None  # bytes, the most so far


class _Stamp(NamedTuple):
    """What was done by a time: the seconds of work, pauses left out, and the whole run's steps and tokens."""

    seconds: float
    step: int
    tokens: int


class Meter:
    """Measures the pace of a run that is told of each step; what happens in `paused` counts for the time left only."""

    def __init__(
        self,
        total_steps: int,
        *,
        done: int = 0,
        tokens: int = 0,
        flops_per_token: float | None = None,
        peak: float | None = None,
        memory: Callable[[], int | None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`peak` is that of all devices together; `done` steps and `tokens` were before, in a time not known here."""
        self._total = total_steps
        self._flops, self._peak = flops_per_token, peak
        self._memory, self._clock = memory, clock
        self._paused = 0.0
        self._begin = _Stamp(clock(), done, tokens)
        self._first: _Stamp | None = None  # the end of the first step
        self._window = deque([self._begin], maxlen=WINDOW + 1)

    def step(self, step: int, tokens: int) -> Pace:
        """Know that `step` steps are done and `tokens` were read, of the whole run on all devices; return the pace."""
        now = _Stamp(self._clock() - self._paused, step, tokens)
        if self._first is None:
            self._first = now
        elif self._window[0] is self._begin:
            self._window.popleft()  # the first step compiles, allocates and reads; the others show the pace
        self._window.append(now)
        return self.pace()

    def pace(self) -> Pace:
        """Return the pace of the last steps."""
        speed = _rate(self._window[0], self._window[-1])
        return Pace(
            tokens_per_second=speed,
            mfu=speed * self._flops / self._peak if speed and self._flops and self._peak else None,
            seconds_left=self._seconds_left(speed),
            memory=self._memory(),
        )

    @property
    def average(self) -> float | None:
        """The tokens a second of all steps but the first, or of that one where it was the only one."""
        last = self._window[-1]
        return (self._first and _rate(self._first, last)) or _rate(self._begin, last)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context whose time is not that of steps: evaluating, saving."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def _seconds_left(self, speed: float | None) -> float | None:
        """Return the time that the steps to come need at this speed, with as many pauses as there were until now."""
        first, last = self._window[0], self._window[-1]
        if not speed:
            return None
        a_step = (last.seconds - first.seconds) / (last.step - first.step)
        pauses = self._paused / (last.step - self._begin.step)
        return max(0, self._total - last.step) * (a_step + pauses)


def peak_memory(device_type: str) -> int | None:
    """Return the most bytes that were in use at once: of a GPU by tensors, else of this process, as the system says."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    if device_type == "mps":
        import torch

        return torch.mps.driver_allocated_memory()  # of now: there is no record of the most
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _rate(first: _Stamp, last: _Stamp) -> float | None:
    seconds, tokens = last.seconds - first.seconds, last.tokens - first.tokens
    return tokens / seconds if seconds > 0 and tokens > 0 else None
