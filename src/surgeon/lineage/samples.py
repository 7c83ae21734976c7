"""Rows of a checkpoint's tensors, read by byte ranges: each range once, and counted.

A tensor of more than two dimensions is seen as a matrix of all but the last, one of one dimension as one row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

import numpy as np

from surgeon.anatomy.anatomy import Anatomy, read_anatomy
from surgeon.checkpoint.header import DTYPE_BITS, FilePart
from surgeon.checkpoint.source import Source, StoredTensor
from surgeon.errors import CheckpointError
from surgeon.lineage.coded import Coded, plain_spec
from surgeon.lineage.numbers import Array, decoded

JOINED = 32_768  # bytes between two rows that cost less to read than a request

Wanted = tuple[str, Array]  # a tensor's name, and the numbers of its rows


@dataclass(eq=False)
class Samples:
    """What has been read of one checkpoint so far. Rows come back in float32, dequantized where they are codes."""

    source: Source
    anatomy: Anatomy
    coded: dict[str, Coded]
    bytes_read: int = 0
    requests: int = 0  # ranges that lie apart
    _blocks: dict[str, list[tuple[int, int, Array]]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> "Samples":
        """Return nothing read yet. Raises CheckpointError for a checkpoint whose tensors have no table."""
        spec, coded = plain_spec(source)
        anatomy = read_anatomy(spec)
        if anatomy.whole_family is None:
            raise CheckpointError(
                f"model type {anatomy.model_type!r} has no table of all its tensors, so they cannot be compared",
                hint="docs/models.md lists the model types with a table.",
            )
        return cls(source, anatomy, dict(coded))

    @property
    def label(self) -> str:
        """The checkpoint as the user named it."""
        return self.source.label

    def shape(self, name: str) -> tuple[int, int]:
        """Return the shape of a tensor as a matrix."""
        *outer, width = self.anatomy.spec.tensors[name].shape or (1,)
        return prod(outer), width

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as it is stored, F32 where it is codes."""
        return self.anatomy.spec.tensors[name].dtype

    def row_bytes(self, name: str) -> int:
        """Return the bytes of one row."""
        return self.shape(name)[1] * DTYPE_BITS[self.dtype(name)] // 8

    def load(self, wanted: Iterable[Wanted]) -> None:
        """Read rows of many tensors at once, those that were not read yet."""
        todo: dict[str, list[tuple[int, int]]] = {}
        for name, rows in wanted:
            gap = JOINED // max(1, self.row_bytes(name))
            for start, end in _spans(np.unique(rows), gap):
                known = any(a <= start and end <= b for a, b, _ in self._blocks.get(name, ()))
                if not known and (start, end) not in todo.setdefault(name, []):
                    todo[name].append((start, end))
        stored = self.source.tensors
        ranges: dict[str, list[tuple[int, int]]] = {}
        for name, spans in todo.items():
            for part in self._parts(name):
                item = stored[part]
                ranges.setdefault(item.file, []).extend(_bytes_of(item, *span) for span in spans)
        if not ranges:
            return
        files = self.source.parts(ranges)
        self.bytes_read += sum(end - start for spans in ranges.values() for start, end in spans)
        self.requests += sum(map(_apart, ranges.values()))
        for name, spans in todo.items():
            self._blocks.setdefault(name, []).extend((*span, self._block(name, *span, files)) for span in spans)

    def _block(self, name: str, start: int, end: int, files: Mapping[str, FilePart]) -> Array:
        """Return rows [start, end) of a tensor, out of files that hold them."""
        pieces = []
        for part in self._parts(name):
            item = self.source.tensors[part]
            first, last = _bytes_of(item, start, end)
            raw = bytearray(last - first)
            with files[item.file].opened() as file:
                file.read_into(raw, first)
            pieces.append(decoded(raw, item.spec.dtype).reshape(end - start, -1))
        return self.coded[name].numbers(pieces) if name in self.coded else pieces[0]

    def rows(self, name: str, rows: Array) -> Array:
        """Return rows of a tensor, shape (rows, width), in the order in which they are asked for."""
        self.load([(name, rows)])
        found: Array = np.empty((len(rows), self.shape(name)[1]), np.float32)
        for start, end, block in self._blocks[name]:
            inside = (rows >= start) & (rows < end)
            found[inside] = block[rows[inside] - start]
        return found

    def vector(self, name: str) -> Array:
        """Return a tensor of one dimension."""
        whole: Array = self.rows(name, np.arange(1))[0]
        return whole

    def _parts(self, name: str) -> Sequence[str]:
        return self.coded[name].parts if name in self.coded else (name,)


def _bytes_of(item: StoredTensor, start: int, end: int) -> tuple[int, int]:
    """Return where rows [start, end) of a tensor lie in its file."""
    rows, size = prod(item.spec.shape[:-1]) if item.spec.shape else 1, item.end - item.start
    return item.start + size * start // rows, item.start + size * end // rows


def _spans(rows: Array, gap: int) -> list[tuple[int, int]]:
    """Return the spans that hold sorted rows; gaps of at most `gap` rows are read with them."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) > gap + 1)
    starts, ends = np.append(0, cuts + 1), np.append(cuts, len(rows) - 1)
    return [(int(rows[a]), int(rows[b]) + 1) for a, b in zip(starts, ends, strict=True)]


def _apart(spans: Sequence[tuple[int, int]]) -> int:
    """Return how many requests spans of one file take: those that touch are one."""
    ordered = sorted(spans)
    return 1 + sum(after[0] > before[1] for before, after in pairwise(ordered))
