"""Blocks of rows, sums whose order is fixed, and the keys of random streams: what decides the bytes of any machine."""

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

SUMMED = 1 << 18  # numbers of a block: sums go block by block, so that this decides bytes

MakeRows = Callable[[int, int], Tensor]  # returns rows [start, stop) of a tensor; do not write to them


def row_ranges(shape: tuple[int, ...], size: int) -> Iterator[tuple[int, int]]:
    """Return the ranges of rows, each with at most `size` numbers or one row."""
    step = max(1, size // max(1, math.prod(shape[1:])))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def total_of(value: Tensor, dim: int) -> Tensor:
    """Return the sum along `dim`, kept with size 1. Overwrites `value`.

    Adds one half to the other until size 1 is left: unlike in torch, the order is the same on every machine.
    """
    while (size := value.shape[dim]) > 1:
        half = size // 2
        total = value.narrow(dim, 0, half).add_(value.narrow(dim, half, half))
        if size % 2:
            total.narrow(dim, 0, 1).add_(value.narrow(dim, size - 1, 1))
        value = total
    return value


def key_of(seed: int, stream: str) -> int:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little")
    return key & (2**63 - 1)


def to_float64(value: Tensor) -> Tensor:
    return value.to(torch.float64, copy=True)
