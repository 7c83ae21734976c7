"""States of rows on their way through a model: in memory, or in a file without a name where they are many."""

import tempfile
from collections.abc import Sequence
from copy import copy
from itertools import accumulate

import torch
from torch import Tensor

from surgeon.models.passage import Batch

IN_MEMORY = 4_000_000_000  # bytes of kept states; more go to a file


class Kept:
    """States at several places of a model, a batch each. A place holds nothing before it is put there."""

    def __init__(self, boundaries: int, batches: Sequence[Batch]) -> None:
        self._shapes = [batch.hidden.shape for batch in batches]
        self._device, dtype = batches[0].hidden.device, batches[0].hidden.dtype
        *self._starts, numbers = accumulate((shape.numel() for shape in self._shapes), initial=0)
        self.nbytes = numbers * dtype.itemsize  # of the states at one boundary
        self._allocate(boundaries, numbers, dtype)

    def _allocate(self, boundaries: int, numbers: int, dtype: torch.dtype) -> None:
        self._file = None
        if boundaries * self.nbytes <= IN_MEMORY:
            self._all = torch.empty(boundaries, numbers, dtype=dtype)
            return
        self._file = tempfile.NamedTemporaryFile(prefix="surgeon-states-")  # noqa: SIM115  # kept as long as self
        size = boundaries * numbers
        self._all = torch.from_file(self._file.name, shared=True, size=size, dtype=dtype).view(boundaries, numbers)

    @property
    def num_batches(self) -> int:
        """How many batches the rows are in."""
        return len(self._shapes)

    def copy(self) -> "Kept":
        """Return states of their own, kept in the same way."""
        same = copy(self)
        boundaries, numbers = self._all.shape
        same._allocate(boundaries, numbers, self._all.dtype)
        same._all.copy_(self._all)
        return same

    def put(self, boundary: int, states: Sequence[Tensor]) -> None:
        """Keep the states of all batches at a place."""
        for number, state in enumerate(states):
            self.put_one(boundary, number, state)

    def put_one(self, boundary: int, number: int, states: Tensor) -> None:
        """Keep the states of one batch at a place."""
        self._part(boundary, number).copy_(states.reshape(-1))

    def get(self, boundary: int) -> list[Tensor]:
        """Return the states of all batches at a place, on the device of the batches."""
        return [self.get_one(boundary, number) for number in range(len(self._shapes))]

    def get_one(self, boundary: int, number: int) -> Tensor:
        """Return the states of one batch at a place."""
        return self._part(boundary, number).view(self._shapes[number]).to(self._device)

    def _part(self, boundary: int, number: int) -> Tensor:
        start = self._starts[number]
        return self._all[boundary, start : start + self._shapes[number].numel()]
