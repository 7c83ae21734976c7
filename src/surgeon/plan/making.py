"""Make the tensors of a weight file in several threads, each part of one written to its own place."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from surgeon.checkpoint.output import STEP, CountBytes, start_writeback

KEPT = 1 << 25  # bytes: a tensor up to this size is read once and kept while it is needed, a larger one row by row
BLOCK_NUMBERS, BLOCK_MEMORY = 1 << 18, 32  # numbers of a block, and the bytes that a thread holds for each


class Part(NamedTuple):
    """A part of a tensor's bytes, so many, and the function that makes them, in any thread."""

    nbytes: int
    make: Callable[[], Iterable[memoryview]]


class ToMake(NamedTuple):
    """A tensor to make: where it begins in the file, its size, and the function that makes its bytes or its parts."""

    name: str
    offset: int
    nbytes: int
    content: Callable[[], Iterable[memoryview] | Sequence[Part]]


def write_made(target: int, tensors: Iterable[ToMake], count_bytes: CountBytes, *, threads: int) -> None:
    """Write tensors to their offsets in an open file. `threads` make their parts, the caller's own writes the rest."""
    pool = ThreadPoolExecutor(threads)
    try:
        _Making(target, pool, count_bytes, most=3 * threads).run(tensors)
    finally:  # after Ctrl-C too: what has not begun is left
        pool.shutdown(cancel_futures=True)


class _Making:
    """Gives the parts of tensors to a pool, some ahead, and takes them back in their order."""

    def __init__(self, target: int, pool: Executor, count_bytes: CountBytes, *, most: int) -> None:
        self._target, self._pool, self._count_bytes, self._most = target, pool, count_bytes, most
        self._parts: deque[tuple[Future[int], int]] = deque()
        self._unsent = 0, 0  # bytes that are written, and whose way to the disk the kernel has not begun

    def run(self, tensors: Iterable[ToMake]) -> None:
        """Write all tensors: while the parts of one are made, the next is prepared."""
        ahead: deque[tuple[ToMake, Future[Any]]] = deque()
        for tensor in tensors:
            ahead.append((tensor, self._pool.submit(tensor.content)))
            if len(ahead) > 1:
                self._make(*ahead.popleft())
        for item in ahead:
            self._make(*item)
        while self._parts:
            self._take_back()
        self._send(*self._unsent)

    def _make(self, tensor: ToMake, prepared: Future[Any]) -> None:
        offset, end = tensor.offset, tensor.offset + tensor.nbytes
        for part in prepared.result():
            if len(self._parts) >= self._most:
                self._take_back()
            if isinstance(part, Part):
                self._parts.append((self._pool.submit(_write_part, self._target, part, offset), offset))
                offset += part.nbytes
            else:
                view = memoryview(part)
                done = _write_at(self._target, view.cast("B") if view.nbytes else b"", offset)  # empty: no cast
                self._count(offset, done)
                offset += done
        assert offset == end, f"{tensor.name} was planned {tensor.nbytes} bytes long, made {offset - end:+d}"

    def _take_back(self) -> None:
        future, offset = self._parts.popleft()
        self._count(offset, future.result())

    def _count(self, offset: int, done: int) -> None:
        self._count_bytes(done)
        start, end = self._unsent
        if offset != end or end - start >= STEP:
            self._send(start, end)
            start = offset
        self._unsent = start, offset + done

    def _send(self, start: int, end: int) -> None:
        if end > start:
            start_writeback(self._target, start, end - start)


def _write_part(target: int, part: Part, offset: int) -> int:
    """Return how many bytes were written: all of a part."""
    done = 0
    for block in part.make():
        done += _write_at(target, block, offset + done)
    assert done == part.nbytes, f"a part of {part.nbytes} bytes has {done}"
    return done


def _write_at(target: int, content: memoryview | bytes, offset: int) -> int:
    """Return how many bytes were written: all of `content`."""
    done = 0
    while done < len(content):
        done += os.pwrite(target, content[done : done + STEP], offset + done)
    return done
