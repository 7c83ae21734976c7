"""The device and the precision to compute in, and how many rows fit its memory at once."""

import logging
import math
import os
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.checkpoint.source import Source
from surgeon.errors import NOISY, MeasureError
from surgeon.processes import own_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

for _name in NOISY:  # here, for every file that runs models imports this one, and transformers imports what is noisy
    logging.getLogger(_name).setLevel(logging.ERROR)

DEVICES = ("auto", "cpu", "cuda", "mps")
STATES_BYTES = 2_000_000_000  # the states of a group of rows take no more memory
LOGITS_BYTES = 64 << 20  # of a chunk, in float32, on a CPU: half makes a step 3 % slower, twice makes none faster
LOGITS_BYTES_GPU = 1 << 30  # every chunk reads and writes the gradient of the whole head: few chunks, large products
LOGITS_SHARE = 32  # a smaller card holds at most this part of its memory in a chunk
HEAD_TOKENS, HEAD_TOKENS_GPU = 512, 2048  # of a head: 0.3 and 1.2 GB of logits for a vocabulary of 150,000
PASS_BYTES = 4096  # for each token: no more passes are paused at once than some hundreds


def resolve_device(device: str) -> str:
    """Return the device that `device` names; "auto" is CUDA, then MPS, then the CPU.

    Of processes that measure together each has the GPU of its own number. Raises MeasureError for a device that this
    machine does not have.
    """
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return own_device("cuda" if cuda else "mps" if mps else "cpu")
    kind, _, number = device.partition(":")
    if kind not in DEVICES or (number and not number.isdigit()):
        raise MeasureError(f"unknown device {device!r}", hint=f"One of: {', '.join(DEVICES)}, cuda:1.")
    available = {"cpu": True, "cuda": cuda and int(number or 0) < torch.cuda.device_count(), "mps": mps}
    if not available[kind]:
        raise MeasureError(f"there is no device {device!r} here", hint="Use --device auto, or cpu.")
    return own_device(device)


def computes_bfloat16(device: str) -> bool:
    """Return whether a device multiplies matrices of bfloat16 itself: CUDA from the A100 on.

    Older cards (T4, V100) emulate it, slower than float32, and without the fast kernels of attention.
    """
    import torch

    if not device.startswith("cuda"):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def compute_dtype(source: Source, device: str) -> "torch.dtype":
    """Return the dtype to compute in: float32, but on CUDA the 16-bit dtype of the stored weights.

    On a card that only emulates bfloat16, such weights are computed in float32: float16 has no room for some of them.
    """
    import torch

    stored = {item.spec.dtype for item in source.tensors.values()}
    if device.startswith("cuda"):
        if stored == {"F16"}:
            return torch.float16
        if stored <= {"BF16", "F16"} and computes_bfloat16(device):
            return torch.bfloat16
    return torch.float32


def wide(numbers: "Tensor") -> "Tensor":
    """Return numbers in float64, on their device, or on the CPU when it has no float64 (MPS)."""
    return (numbers.cpu() if numbers.device.type == "mps" else numbers).double()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast, also on a device that knows none (meta)."""
    import torch

    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def logits_bytes(device: str, models: int = 1) -> int:
    """Return how many bytes of one model's logits, counted in float32, a loss holds at once on a device.

    On a GPU two `models` share them, because a distillation keeps seven tensors of that size.
    """
    import torch

    if not device.startswith("cuda"):
        return LOGITS_BYTES
    memory = int(torch.cuda.get_device_properties(device).total_memory)
    return max(LOGITS_BYTES, min(LOGITS_BYTES_GPU, memory // LOGITS_SHARE) // models)


def available_memory(device: str) -> int:
    """Return how many bytes are free on a device; on the CPU as far as the system and this process's limits allow."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    if os.name == "posix":
        import resource

        limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
        used = psutil.Process().memory_info().vms
        free = min([free, *(max(0, limit - used) for limit in limits if limit != resource.RLIM_INFINITY)])
    return int(min(free, _free_in_container()))


CGROUPS = (  # of a container: the most bytes, those in use, and of these the files that the system may drop
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes", ""),
)


def _free_in_container() -> float:
    """Return how many bytes the limit of a container leaves, infinity where there is none (cgroups, v2 and v1)."""
    for most, used, stat in CGROUPS:
        try:
            limit, taken = (int(Path(file).read_text()) for file in (most, used))
            lines = Path(stat).read_text().splitlines() if stat else []
        except (OSError, ValueError):  # there is no such file, or it says max
            continue
        dropped = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        return max(0, limit - taken + dropped)
    return math.inf


def head_tokens(device: "torch.device") -> int:
    """Return how many tokens' logits exist at once where a text is measured on a device."""
    return HEAD_TOKENS_GPU if device.type == "cuda" else HEAD_TOKENS


def states_bytes(device: str) -> int:
    """Return how many bytes of states a group of rows takes: STATES_BYTES, on a GPU a quarter of what is free, or more.

    Every group reads the whole model again.
    """
    return max(STATES_BYTES, available_memory(device) // 4) if device.startswith("cuda") else STATES_BYTES


def groups(rows: int, bytes_per_row: int, budget: int) -> list[tuple[int, int]]:
    """Return ranges of rows whose states fit in memory together, as equal as they can be; a row is never split."""
    most = max(1, budget // bytes_per_row)
    count = math.ceil(rows / most)
    edges = [rows * i // count for i in range(count + 1)] if rows else []
    return list(pairwise(edges))


def row_bytes(length: int, numbers: int) -> int:
    """Return the bytes that a row of tokens takes, of which so many numbers each are held."""
    return length * max(4 * numbers, PASS_BYTES)
