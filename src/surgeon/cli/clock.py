"""How long a command takes: the whole process, and its parts by name."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_began = time.perf_counter()  # this file is among the first that a command imports
_parts: dict[str, float] = {}
_open: list[str] = []  # the parts that are running, the innermost last
_counted = _began  # up to when time has been given to a part


def restart() -> None:
    """Forget all parts and begin anew: for the next command of one process."""
    global _began, _counted
    _began = _counted = time.perf_counter()
    _parts.clear()
    _open.clear()


@contextmanager
def part(name: str) -> Iterator[None]:
    """Return a context whose time counts as this part of the command, and as no part around it."""
    _count()
    _open.append(name)
    try:
        yield
    finally:
        _count()
        _open.pop()


def _count() -> None:
    """Give the time since the last call to the innermost part that is running."""
    global _counted
    now = time.perf_counter()
    if _open:
        _parts[_open[-1]] = _parts.get(_open[-1], 0.0) + now - _counted
    _counted = now


def seconds() -> float:
    """Return the seconds since the process began."""
    return time.perf_counter() - _began


def timings() -> dict[str, Any]:
    """Return the seconds of the process and of its parts, as `--json` prints them; what is in no part is "other"."""
    _count()
    whole = seconds()
    parts = {**_parts, "other": whole - sum(_parts.values())} if _parts else {}
    told = {name: round(value, 3) for name, value in parts.items()}
    return {"seconds": round(whole, 3), **({"timings": told} if told else {})}
