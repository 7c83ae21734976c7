"""States of rows on their way through a model: in memory, or in a file without a name where they are many."""

import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from surgeon.models.passage import Batch

IN_MEMORY = 4_000_000_000  # bytes of kept states; more go to a file


class Kept:
    """States at several places of a model, a batch each. A place holds nothing before it is put there."""

    def __init__(self, boundaries: int, batches: Sequence[Batch]) -> None:
        self._shapes = [batch.hidden.shape for batch in batches]
        self._device, dtype = batches[0].hidden.device, batches[0].hidden.dtype
        numbers = sum(shape.numel() for shape in self._shapes)
        self.nbytes = numbers * dtype.itemsize  # of the states at one boundary
        self._file = None
        if boundaries * self.nbytes > IN_MEMORY:
            self._file = tempfile.NamedTemporaryFile(prefix="surgeon-states-")  # noqa: SIM115  # kept as long as self
            self._all = torch.from_file(self._file.name, shared=True, size=boundaries * numbers, dtype=dtype).view(
                boundaries, numbers
            )
        else:
            self._all = torch.empty(boundaries, numbers, dtype=dtype)

    def put(self, boundary: int, states: Sequence[Tensor]) -> None:
        torch.cat([state.reshape(-1).cpu() for state in states], out=self._all[boundary])

    def get(self, boundary: int) -> list[Tensor]:
        parts = torch.split(self._all[boundary], [shape.numel() for shape in self._shapes])
        return [part.view(shape).to(self._device) for part, shape in zip(parts, self._shapes, strict=True)]
