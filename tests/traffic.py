"""What a computation moves and holds, kernel by kernel: counted on the meta device, where nothing is computed."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They read or write some numbers of each row, and not the whole tensor.
SPARSE = ("gather", "scatter_add_", "embedding", "index_select")
# They take a tensor's shape, and do not read it.
SHAPED = ("new_full", "new_zeros", "new_ones", "zeros_like", "ones_like", "full_like")
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Traffic(TorchDispatchMode):
    """A mode that counts the bytes of every kernel's inputs and outputs: `moved` by name, and `peak` at once.

    A sum in place reads and writes what it adds to. Views move nothing. `peak` counts what is made inside the mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, int] = {}
        self.kernels = self.peak = self._now = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(result)
        read, written = _storages(given), _storages(made)
        for key in written.keys() - read.keys() - self._held.keys():
            self._hold(written[key].untyped_storage(), key)
        name = func.__name__.split(".")[0]
        is_view = bool(written) and written.keys() <= read.keys() and not func._schema.is_mutable
        if is_view or name in FREE:
            return result
        if name in SHAPED:
            read = {}
        if name in SPARSE:
            least = min(tensor.nbytes for tensor in [*given, *made])
            self._count(name, 3 * least)
        else:
            self._count(name, sum(tensor.nbytes for tensor in [*read.values(), *written.values()]))
        return result

    @property
    def total(self) -> int:
        """The bytes of all kernels."""
        return sum(self.moved.values())

    def _count(self, name: str, nbytes: int) -> None:
        self.kernels += 1
        self.moved[name] = self.moved.get(name, 0) + nbytes

    def _hold(self, storage: Any, key: int) -> None:
        nbytes = self._held[key] = storage.nbytes()
        self._now += nbytes
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._freed, key, nbytes)

    def _freed(self, key: int, nbytes: int) -> None:
        self._now -= nbytes
        self._held.pop(key, None)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _storages(tensors: list[Tensor]) -> dict[int, Tensor]:
    """Return a tensor of each storage: the largest of its views."""
    largest: dict[int, Tensor] = {}
    for tensor in tensors:
        key = tensor.untyped_storage()._cdata
        if key not in largest or tensor.nbytes > largest[key].nbytes:
            largest[key] = tensor
    return largest
