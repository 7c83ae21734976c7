"""The arithmetic of a plan, in torch. Only plans that make new numbers import this.

Everything is computed in float32 or wider. It is rounded to the expression's dtype once at its end, and once at each
step's end inside it, so that a fused plan makes the same bytes as its steps one by one.

An expression becomes a function that makes any range of rows, and a tensor is made block by block: a block stays in the
cache through all operations, and several threads make blocks at once. Memory holds no large tensor whole, neither one
that is made nor one that is read.

The bytes are the same on every machine, whatever its vector units and threads, and whatever the size of a block: random
numbers come from a place in their stream, and sums are made of elementwise additions in an order that is fixed here.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from surgeon.anatomy.axes import Index, Run, runs_of
from surgeon.checkpoint.header import FilePart, TensorSpec
from surgeon.checkpoint.source import StoredTensor
from surgeon.plan.expressions import (
    Add,
    Affine,
    Cast,
    Constant,
    Dequantized,
    Expr,
    Gather,
    Joined,
    Mapped,
    Mix,
    Normal,
    Quantized,
    Read,
    Regress,
    Rounded,
    Uniform,
    Weighted,
)
from surgeon.plan.making import BLOCK_NUMBERS, KEPT, Part
from surgeon.plan.mixing import mixed
from surgeon.plan.plan import children, infer
from surgeon.plan.products import mapped
from surgeon.plan.quantizing import dequantized, quantized
from surgeon.plan.regressing import regressed
from surgeon.plan.summing import SUMMED, MakeRows, key_of, row_ranges, to_float64, total_of

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STORED = TORCH_DTYPES | {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}  # with the codes of a weight
BLOCK = BLOCK_NUMBERS
PART = 1 << 21  # numbers that one thread makes before it takes the next part
NEAR = 4  # times the rows that are wanted: so many are read for those that lie among them
SHORT = 16  # positions: if runs are shorter on average, a Gather uses an index
# These decide bytes: of a large tensor the standard deviation is that of so many numbers, and each block of a normal
# draw has a seed of its own.
SAMPLE = 1 << 20
DRAWN = 1 << 20


class _Specs(Mapping[str, TensorSpec]):
    """The specs of stored tensors, looked up one at a time: a mixture of experts has many thousands of tensors."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorSpec:
        return self._tensors[name].spec

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Arithmetic:
    """Makes tensors from a source, of whose files `parts` are there. A scalar counts as one row."""

    def __init__(self, tensors: Mapping[str, StoredTensor], parts: Mapping[str, FilePart]) -> None:
        self._tensors = tensors
        self._parts = parts
        self._specs = _Specs(tensors)
        self._kept: dict[StoredTensor, Tensor] = {}
        self._stds: dict[Expr, float] = {}
        self._wholes: dict[Expr, Tensor] = {}  # what is mapped along its rows, which needs them all

    def parts(self, expr: Expr) -> list[Part]:
        """Return the parts of the tensor that `expr` makes, in order. Any thread can make any part."""
        dtype = STORED[infer(expr, self._specs).dtype]
        rows, shape = self._rows(expr.source if isinstance(expr, Cast | Rounded) else expr), self._shape(expr)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize

        def make(first: int, last: int) -> Iterator[memoryview]:
            for start, stop in row_ranges((last - first, *shape[1:]), BLOCK):
                block = rows(first + start, first + stop).to(dtype).flatten().contiguous()
                yield block.view(torch.uint8).numpy().data

        ranges = row_ranges(shape, PART)
        return [Part((stop - start) * row_bytes, partial(make, start, stop)) for start, stop in ranges]

    def tensor(self, expr: Expr) -> Tensor:
        """Return the tensor that `expr` makes, in the dtype that the plan says."""
        spec = infer(expr, self._specs)
        with single_threaded():
            content = b"".join(block for part in self.parts(expr) for block in part.make())
        whole = torch.empty(math.prod(spec.shape), dtype=STORED[spec.dtype])
        whole.view(torch.uint8).numpy()[:] = np.frombuffer(content, np.uint8)
        return whole.view(spec.shape)

    def _rows(self, expr: Expr) -> MakeRows:  # noqa: C901  # one case a kind
        """Return the function that makes rows of `expr`, in float64 if its sources are, else in float32."""
        match expr:
            case Read(name):
                return self._read_rows(self._tensors[name])
            case Gather():
                return self._gather(expr)
            case Affine(source, factor, offset):
                rows = self._rows(source)
                return lambda start, stop: rows(start, stop).mul(factor).add_(offset)
            case Add():
                return self._add(expr)
            case Joined():
                return self._joined(expr)
            case Cast() | Rounded():
                rows, dtype = self._rows(expr.source), TORCH_DTYPES[infer(expr, self._specs).dtype]
                return lambda start, stop: _at_least_float32(rows(start, stop).to(dtype))
            case Mix():
                return self._mix(expr)
            case Regress():
                return self._regress(expr)
            case Uniform():
                return self._uniform(expr)
            case Normal(spec, std, seed, stream):
                return _normal_rows(spec.shape or (1,), std, seed, stream)
            case Constant(_, value):
                rest = self._shape(expr)[1:]
                return lambda start, stop: torch.full((stop - start, *rest), value, dtype=torch.float32)
            case Mapped():
                return self._mapped(expr)
            case Quantized() | Dequantized():
                return self._coded(expr)
            case Weighted(parts, weights, row):
                factors = self._rows(weights)(row, row + 1)[0].tolist()
                return self._add(Add(tuple(Affine(part, factor) for part, factor in zip(parts, factors, strict=True))))

    def _coded(self, expr: Quantized | Dequantized) -> MakeRows:
        """Return the function that makes rows of the codes of a weight, or of the weight that they stand for."""
        if isinstance(expr, Dequantized):
            dtype = TORCH_DTYPES[infer(expr, self._specs).dtype]
            return dequantized(expr.scheme, self._rows(expr.codes), self._rows(expr.scale), dtype)
        spec = infer(expr.source, self._specs)
        return quantized(expr, self._rows(expr.source), spec.shape, TORCH_DTYPES[spec.dtype])

    def _mapped(self, expr: Mapped) -> MakeRows:
        matrix, rows = self._whole(expr.matrix), self._rows(expr.source)
        if expr.dim:
            return lambda start, stop: mapped(rows(start, stop), matrix, expr.dim, expr.inner)
        if expr not in self._wholes:
            self._wholes[expr] = mapped(self._whole(expr.source), matrix, 0, expr.inner)
        whole = self._wholes[expr]
        return lambda start, stop: whole[start:stop]

    def _whole(self, expr: Expr) -> Tensor:
        """Return all rows of `expr`, wide."""
        return self._rows(expr)(0, self._shape(expr)[0])

    def _add(self, expr: Add) -> MakeRows:
        first, *rest = expr.parts
        rows_of_first, additions = self._rows(first), [self._addition(part) for part in rest]
        is_fresh = isinstance(first, Affine) or (isinstance(first, Gather) and first.dim > 0)

        def rows(start: int, stop: int) -> Tensor:
            total = rows_of_first(start, stop) if is_fresh else rows_of_first(start, stop).clone()
            for add_to in additions:
                add_to(total, start, stop)
            return total

        return rows

    def _joined(self, expr: Joined) -> MakeRows:
        parts = [self._rows(part) for part in expr.parts]
        if expr.dim:
            return lambda start, stop: torch.cat([rows(start, stop) for rows in parts], expr.dim)
        ends = list(accumulate(self._shape(part)[0] for part in expr.parts))
        begins = [0, *ends[:-1]]

        def rows(start: int, stop: int) -> Tensor:
            spans = [
                (max(start, begin) - begin, min(stop, end) - begin) for begin, end in zip(begins, ends, strict=True)
            ]
            pieces = [part(first, last) for part, (first, last) in zip(parts, spans, strict=True) if first < last]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        return rows

    def _addition(self, part: Expr) -> Callable[[Tensor, int, int], object]:
        """Return the function that adds rows of `part` to a block; columns that only move are added in place."""
        if not isinstance(part, Gather) or not part.dim or part.fill or part.mean or _is_scattered(part):
            rows = self._rows(part)
            return lambda total, start, stop: total.add_(rows(start, stop))
        source, dim = self._rows(part.source), part.dim
        runs = [run for run in _runs(part) if run.first >= 0]

        def add_to(total: Tensor, start: int, stop: int) -> None:
            value = source(start, stop)
            for run in runs:
                old = value.narrow(dim, run.first, run.length)
                into = total.narrow(dim, run.at, run.length)
                if abs(run.scale) == 1.0:  # machines differ in how often they round with any other alpha
                    into.add_(old, alpha=run.scale)
                else:
                    into.add_(old * run.scale)

        return add_to

    def _mix(self, expr: Mix) -> MakeRows:
        """Return the function that makes rows of several models' tensors, in float64 unless all have 16 bits."""
        stored = {infer(part, self._specs).dtype for part in children(expr)}
        base = None if expr.base is None else self._rows(expr.base)
        return mixed(expr, [self._rows(part) for part in expr.parts], base, self._shape(expr), stored)

    def _regress(self, expr: Regress) -> MakeRows:
        biases: list[MakeRows | None] = [self._rows(bias) for bias in expr.biases]
        biases = biases or [None for _ in expr.maps]
        grams = [None if gram is None else self._rows(gram) for gram in expr.grams]
        maps = list(zip([self._rows(each) for each in expr.maps], biases, strict=True))
        return regressed(expr, maps, grams, self._shape(expr.maps[0]))

    def _gather(self, expr: Gather) -> MakeRows:
        if _is_scattered(expr):
            return self._gather_by_index(expr)
        return self._gather_rows(expr) if expr.dim == 0 else self._gather_columns(expr)

    def _gather_columns(self, expr: Gather) -> MakeRows:
        runs = _runs(expr)
        source, new, dim = self._rows(expr.source), self._new_positions(expr), expr.dim
        rest = self._shape(expr)[1:]

        def rows(start: int, stop: int) -> Tensor:
            value = source(start, stop)
            block = torch.empty((stop - start, *rest), dtype=value.dtype)
            for run in runs:
                into = block.narrow(dim, run.at, run.length)
                if run.first < 0:
                    into.copy_(new(value).expand_as(into))
                else:
                    torch.mul(value.narrow(dim, run.first, run.length), run.scale, out=into)
            return block

        return rows

    def _gather_rows(self, expr: Gather) -> MakeRows:
        runs = _runs(expr)
        source, new = self._rows(expr.source), self._new_positions(expr)
        starts = [run.at for run in runs]
        rest, dtype = self._shape(expr)[1:], self._wide_dtype(expr)

        def rows(start: int, stop: int) -> Tensor:
            pieces = []
            for run in runs[bisect_right(starts, start) - 1 : bisect_right(starts, stop - 1)]:
                skipped = max(0, start - run.at)
                length = min(run.at + run.length, stop) - run.at - skipped
                if run.first < 0:
                    pieces.append(new(torch.empty(0, dtype=dtype)).expand(length, *rest))
                else:
                    old = source(run.first + skipped, run.first + skipped + length)
                    pieces.append(old if run.scale == 1.0 else old * run.scale)
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        return rows

    def _gather_by_index(self, expr: Gather) -> MakeRows:
        source, new, dim = self._rows(expr.source), self._new_positions(expr), expr.dim
        along = [-1 if k == dim else 1 for k in range(len(self._shape(expr)))]
        dtype = self._wide_dtype(expr)
        index, scale = torch.tensor(tuple(expr.index)), torch.tensor(tuple(expr.scale), dtype=dtype).view(along)
        is_new = (index < 0).view(along)

        def rows(start: int, stop: int) -> Tensor:
            if dim:
                value = source(start, stop)
                moved = value.index_select(dim, index.clamp(min=0)).mul_(scale)
                return torch.where(is_new, new(value), moved)
            positions = index[start:stop]
            old = sorted({i for i in positions.tolist() if i >= 0})
            low, high = (old[0], old[-1] + 1) if old else (0, 1)
            if high - low <= NEAR * (stop - start):
                value, places = source(low, high), (positions - low).clamp(min=0)
            else:  # far apart: each run by itself, and not all that lies between
                value = torch.cat([source(first, first + length) for first, length in Index.of(old).runs])
                places = torch.searchsorted(torch.tensor(old), positions.clamp(min=low))
            moved = value.index_select(0, places).mul_(scale[start:stop])
            return torch.where(is_new[start:stop], new(value), moved)

        return rows

    def _new_positions(self, expr: Gather) -> Callable[[Tensor], Tensor]:
        """Return the function from a block of the source to the value of new positions: one number, or one per mean."""
        size = self._shape(expr.source)[expr.dim]
        if not expr.mean or not size or not expr.index.has_new:
            return lambda block: torch.tensor(expr.fill, dtype=block.dtype)
        if expr.dim:
            return lambda block: (total_of(to_float64(block), expr.dim) / size * expr.mean + expr.fill).to(block.dtype)
        mean = self._mean_row(expr.source)
        return lambda block: (mean * expr.mean + expr.fill).to(block.dtype)

    def _mean_row(self, expr: Expr) -> Tensor:
        """Return the mean of all rows, as one row in float64."""
        shape, rows = self._shape(expr), self._rows(expr)
        sums = [total_of(to_float64(rows(start, stop)), 0) for start, stop in row_ranges(shape, SUMMED)]
        return total_of(torch.cat(sums), 0) / shape[0]

    def _std(self, expr: Expr) -> float:
        """Return the standard deviation of the tensor that `expr` makes, of a large one by every n-th block of rows.

        It is computed once. Where the sample is constant, as in a layer of zeros, all rows are looked at.
        """
        if expr not in self._stds:
            step = max(1, math.prod(self._shape(expr)) // SAMPLE)
            self._stds[expr] = self._std_of_sample(expr, step) or self._std_of_sample(expr, 1)
        return self._stds[expr]

    def _std_of_sample(self, expr: Expr, step: int) -> float:
        shape, rows = self._shape(expr), self._rows(expr)
        ranges = list(row_ranges(shape, SUMMED // min(step, 16)))[::step]
        count = max(1, sum(stop - start for start, stop in ranges) * math.prod(shape[1:]))
        sums, squares = torch.zeros(2, min(SUMMED, count), dtype=torch.float64)
        for start, stop in ranges:
            for piece in torch.split(rows(start, stop).flatten(), SUMMED):
                numbers = to_float64(piece)
                sums[: len(numbers)] += numbers
                squares[: len(numbers)] += numbers.mul_(numbers)
        mean, square = total_of(sums, 0).item() / count, total_of(squares, 0).item() / count
        return math.sqrt(max(0.0, square - mean * mean))

    def _uniform(self, expr: Uniform) -> MakeRows:
        """Return the function that draws rows of uniform numbers: 16 random bits each, from any place of the stream."""
        shape = self._shape(expr)
        columns = math.prod(shape[1:])
        width = expr.ratio * math.sqrt(12) * (self._std(expr.like) or expr.fallback)
        dtype, scale, key = self._wide_dtype(expr.like), width / 2**16, key_of(expr.seed, expr.stream)

        def rows(start: int, stop: int) -> Tensor:
            first, last = start * columns, stop * columns
            word = first // 4  # of 64 bits: four numbers
            drawn = np.random.PCG64(key).advance(word).random_raw(-(-last // 4) - word).view(np.int16)
            numbers = torch.from_numpy(drawn)[first % 4 :][: last - first]
            return numbers.to(dtype).mul_(scale).view(stop - start, *shape[1:])

        return rows

    def _read_rows(self, stored: StoredTensor) -> MakeRows:
        """Return the function that reads rows of a stored tensor; a small one is read once and kept."""
        part, shape, dtype = self._parts[stored.file], stored.spec.shape or (1,), STORED[stored.spec.dtype]
        if stored.spec.nbytes <= KEPT:
            if stored not in self._kept:
                self._kept[stored] = read(stored, part).view(shape)
            kept = self._kept[stored]
            return lambda start, stop: _at_least_float32(kept[start:stop])
        row_bytes = stored.spec.nbytes // shape[0]

        def rows(start: int, stop: int) -> Tensor:
            at = stored.start + start * row_bytes
            data = _read_bytes(part, at, (stop - start) * row_bytes)
            return _at_least_float32(data.view(dtype).view(stop - start, *shape[1:]))

        return rows

    def _shape(self, expr: Expr) -> tuple[int, ...]:
        return infer(expr, self._specs).shape or (1,)

    def _wide_dtype(self, expr: Expr) -> torch.dtype:
        return torch.float64 if infer(expr, self._specs).dtype == "F64" else torch.float32


def read(stored: StoredTensor, part: FilePart) -> Tensor:
    """Return a stored tensor, of a floating dtype or of codes."""
    data = _read_bytes(part, stored.start, stored.end - stored.start)
    return data.view(STORED[stored.spec.dtype]).view(stored.spec.shape)


def _read_bytes(part: FilePart, start: int, count: int) -> Tensor:
    data = torch.empty(count, dtype=torch.uint8)
    with part.opened() as file:
        file.read_into(data.numpy().data, start)
    return data


@contextmanager
def single_threaded() -> Iterator[None]:
    """Return a context in which torch does not share one operation between threads: a block is too small for that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # also of the threads that begin from now on
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _runs(expr: Gather) -> tuple[Run, ...]:
    """Return the runs of a Gather, in order."""
    return tuple(runs_of(expr.index, expr.scale))


def _is_scattered(expr: Gather) -> bool:
    return expr.index.highest >= 0 and len(_runs(expr)) * SHORT > len(expr.index)


def _normal_rows(shape: tuple[int, ...], std: float, seed: int, stream: str) -> MakeRows:
    """Return the function that draws rows of normal numbers in float32, from any place of the stream.

    Drawn in float64, for which torch has one scalar routine; its float32 routine depends on the vector unit.
    """
    columns = math.prod(shape[1:])

    @lru_cache(maxsize=4)  # rows do not end where a block of the stream ends
    def block(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(key_of(seed, f"{stream}/{number}"))
        return (torch.randn(DRAWN, generator=generator, dtype=torch.float64) * std).to(torch.float32)

    def rows(start: int, stop: int) -> Tensor:
        first, last = start * columns, stop * columns
        numbers = range(first // DRAWN, -(-last // DRAWN))
        pieces = [block(k)[max(0, first - k * DRAWN) : last - k * DRAWN] for k in numbers]
        return torch.cat([torch.empty(0), *pieces]).view(stop - start, *shape[1:])

    return rows


def _at_least_float32(value: Tensor) -> Tensor:
    """Return numbers in float32 or wider; codes are none, and stay."""
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value
