"""The pace of a run: tokens per second, and the share of the devices' peak operations that it uses.

The share (MFU, model FLOPs utilisation) counts the operations of the model, without those that checkpointing repeats.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

WINDOW = 30  # the current speed is the mean over so many steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The pace of the last steps."""

    tokens_per_second: float | None
    mfu: float | None  # 0 to 1
    seconds_left: float | None
    memory: int | None  # bytes, the most so far


class _Stamp(NamedTuple):
    """The steps and tokens of the whole run at a time: in seconds of work, without pauses."""

    seconds: float
    step: int
    tokens: int


class PaceMeter:
    """Measures the pace of a run from its steps. Time in `paused` counts only for the time left."""

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
        """`peak` is that of all devices together; earlier processes did `done` steps with `tokens`."""
        self._total = total_steps
        self._flops, self._peak = flops_per_token, peak
        self._memory, self._clock = memory, clock
        self._paused = 0.0
        self._begin = _Stamp(clock(), done, tokens)
        self._first: _Stamp | None = None  # the end of the first step
        self._window = deque([self._begin], maxlen=WINDOW + 1)

    def step(self, step: int, tokens: int) -> Pace:
        """Record that the whole run has done `step` steps and read `tokens` on all devices, and return the pace."""
        now = _Stamp(self._clock() - self._paused, step, tokens)
        if self._first is None:
            self._first = now
        elif self._window[0] is self._begin:
            self._window.popleft()  # the first step also compiles, allocates and reads
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
        """The tokens per second of all steps but the first, or of the first where it was the only one."""
        last = self._window[-1]
        return (self._first and _rate(self._first, last)) or _rate(self._begin, last)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context whose time does not count as steps: evaluating, saving."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def _seconds_left(self, speed: float | None) -> float | None:
        """Return the time that the remaining steps need at this speed, with as many pauses as before."""
        first, last = self._window[0], self._window[-1]
        if not speed:
            return None
        per_step = (last.seconds - first.seconds) / (last.step - first.step)
        pauses = self._paused / (last.step - self._begin.step)
        return max(0, self._total - last.step) * (per_step + pauses)


def most_memory_used(device: str) -> int | None:
    """Return the peak memory in bytes: of a GPU's tensors, else of this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    if device == "mps":
        import torch

        return torch.mps.driver_allocated_memory()  # the current memory: torch does not record the peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _rate(first: _Stamp, last: _Stamp) -> float | None:
    seconds, tokens = last.seconds - first.seconds, last.tokens - first.tokens
    return tokens / seconds if seconds > 0 and tokens > 0 else None
