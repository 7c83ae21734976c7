"""Stored tensors in the precision that is computed in, read block by block into memory of their own.

Such memory goes back to the system the moment a layer is let go of. What malloc hands out for a layer of 300 MB does
not: freed in another order than it came, it leaves holes, and a model of 60 layers ends with a gigabyte of them.
"""

import mmap
from io import FileIO
from pathlib import Path

import torch  # noqa: TID253
from torch import Tensor  # noqa: TID253

from surgeon.checkpoint.header import DOWNLOAD_HINT
from surgeon.checkpoint.source import StoredTensor
from surgeon.errors import CheckpointError
from surgeon.plan.arithmetic import TORCH_DTYPES

# Not shared with child processes, which is what Python asks for by default, where the system makes a difference.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
BLOCK = 1 << 22  # bytes that are in memory in both precisions


def read_as(stored: StoredTensor, path: Path, dtype: torch.dtype) -> Tensor:
    """Return a stored tensor of a floating dtype as `dtype`.

    Raises CheckpointError when the file has become shorter.
    """
    have = TORCH_DTYPES[stored.spec.dtype]
    count = stored.spec.num_parameters
    found = _own_memory(count * dtype.itemsize).view(dtype)
    block = _own_memory(min(BLOCK, count * have.itemsize))
    at = 0
    with path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        while at < count:
            wanted = min(len(block), (count - at) * have.itemsize)
            _fill(file, block[:wanted], path)
            numbers = block[:wanted].view(have)
            found[at : at + len(numbers)].copy_(numbers)
            at += len(numbers)
    return found.view(stored.spec.shape)


def read_rows_as(stored: StoredTensor, path: Path, rows: list[int], dtype: torch.dtype) -> Tensor:
    """Return some rows of a stored tensor of a floating dtype as `dtype`; the others are not read."""
    size = (stored.end - stored.start) // stored.spec.shape[0]
    block = torch.empty((len(rows), size), dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        for place, row in enumerate(rows):
            file.seek(stored.start + row * size)
            _fill(file, block[place], path)
    numbers = block.view(TORCH_DTYPES[stored.spec.dtype])
    return numbers.view(len(rows), *stored.spec.shape[1:]).to(dtype)


def _own_memory(nbytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, max(1, nbytes), **_PRIVATE), dtype=torch.uint8)[:nbytes]


def _fill(file: FileIO, block: Tensor, path: Path) -> None:
    view = block.numpy().data
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{path} has become shorter while it was read", hint=DOWNLOAD_HINT)
        done += count
