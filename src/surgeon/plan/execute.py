"""Carry out a plan: lay the result out in weight files, fetch the tensors that it reads, and stream each file to disk.

A weight file: the header first, then each tensor at its offset. A tensor that is only moved is a byte range, copied by
the kernel, or shared block by block where the file system can. torch is imported only if the plan makes new numbers.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple

from surgeon.checkpoint.header import (
    DTYPE_BITS,
    CheckpointSpec,
    FilePart,
    FileRange,
    TensorSpec,
    format_header,
    read_header,
)
from surgeon.checkpoint.output import (
    PAGE,
    CountBytes,
    copy_range,
    share_range,
    shareable,
    shared_block,
)
from surgeon.checkpoint.source import INDEX, WEIGHTS, Ranges, Source, StoredTensor, ranges_by_file
from surgeon.errors import OutputError
from surgeon.plan.expressions import Constant, Expr, Mapped, Read, Regress
from surgeon.plan.plan import Plan, children, infer, reads

if TYPE_CHECKING:
    from surgeon.plan.making import Part

# Measured peaks of a whole process that only moves bytes, and of one that has imported torch, in bytes.
MOVING_MEMORY = 45_000_000
TORCH_MEMORY = 260_000_000
MOST_THREADS = 8  # more write no faster


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file of a result, with its tensors in the order in which they are written.

    `block`: modulo which size most copied tensors keep their place.
    """

    file: str
    tensors: Mapping[str, TensorSpec]
    block: int = PAGE


@dataclass(frozen=True, slots=True)
class _ComputedTensor:
    """A tensor that is computed when it is written."""

    expr: Expr
    tensors: Mapping[str, StoredTensor]
    parts: Mapping[str, FilePart]

    def __call__(self) -> "Sequence[Part]":
        from surgeon.plan.arithmetic import Arithmetic

        return Arithmetic(self.tensors, self.parts).parts(self.expr)


def lay_out(plan: Plan, result: CheckpointSpec, source: Source, *, max_shard_bytes: int) -> list[Shard]:
    """Return the weight files of `result`, the spec that the plan makes: one if it fits, else as many as needed.

    Wider dtypes come first, as safetensors requires for alignment. Then tensors follow the order of the source's bytes,
    so that the disk reads forward. A tensor larger than a shard has a shard of its own.
    """
    order = sorted(plan.tensors, key=lambda name: _place(plan.tensors[name], result.tensors[name], source.tensors))
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name in order:
        spec = result.tensors[name]
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += spec.nbytes
    if len(groups) == 1:
        return [Shard(WEIGHTS, groups[0])]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def _place(expr: Expr, spec: TensorSpec, tensors: Mapping[str, StoredTensor]) -> tuple[int, int, str, int]:
    """Return the sort key of a tensor: wide dtypes first, then the place of its first source tensor."""
    names = reads(expr)
    if not names:
        return (-DTYPE_BITS[spec.dtype], 1, "", 0)
    first = tensors[names[0]]
    return (-DTYPE_BITS[spec.dtype], 0, first.file, first.start)


def shareable_files(plan: Plan, source: Source, target: Path) -> dict[str, int]:
    """Return the source's files whose blocks an output `target` can share, each with the size of a block.

    Only files on this machine whose tensors are moved are looked at. Nothing is written that stays.
    """
    moved = {source.tensors[expr.name].file for expr in plan.tensors.values() if isinstance(expr, Read)}
    parts = {file: FilePart(path) for file in sorted(moved) if (path := source.at_hand(file)) is not None}
    return shareable(parts, target) if parts else {}


class Written(NamedTuple):
    """The bytes that were written, and how many of them share their blocks with the source."""

    size: int
    shared: int


def execute(
    plan: Plan,
    source: Source,
    directory: Path,
    *,
    shards: Sequence[Shard],
    progress: CountBytes | None = None,
    threads: int | None = None,
) -> Written:
    """Return what was written: the weights of the result and their index, into an existing directory.

    `threads` make new numbers: None, as many as this process has cores. The bytes are the same for any number.
    """
    tensors = source.tensors
    parts = source.parts(ranges_read(plan, source))
    size, shared = 0, 0
    if not all(isinstance(expr, Read) or _is_zero(expr) for expr in plan.tensors.values()):
        Thread(target=_import_arithmetic).start()  # meanwhile the kernel copies
    for shard in shards:
        writes = [
            TensorWrite(name, spec, _content(plan.tensors[name], tensors, parts))
            for name, spec in shard.tensors.items()
        ]
        written = write_safetensors(
            directory / shard.file,
            writes,
            progress=progress,
            block=shard.block,
            threads=threads,
            metadata=plan.metadata,
        )
        size, shared = size + written.size, shared + written.shared
    if len(shards) > 1:
        text = _index(shards)
        (directory / INDEX).write_text(text, encoding="utf-8")
        size += len(text.encode())
    return Written(size, shared)


def _import_arithmetic() -> None:
    with suppress(ImportError):  # the one who needs it says so
        import surgeon.plan.arithmetic  # noqa: F401


def check_written(directory: Path, shards: Sequence[Shard]) -> None:
    """Read every written header back. Raises OutputError when one differs from the plan."""
    for shard in shards:
        written = {name: entry.spec for name, entry in read_header(directory / shard.file).items()}
        if written != dict(shard.tensors):
            raise OutputError(
                f"{shard.file} does not hold what was written to it; the disk may be failing",
                hint="Write to another disk with -o.",
            )


def ranges_read(plan: Plan, source: Source, *, also: Iterable[str] = ()) -> Ranges:
    """Return the byte ranges that carrying out the plan reads, by file, and those of the tensors in `also`."""
    return ranges_by_file(source.tensors, {name for expr in plan.tensors.values() for name in reads(expr)}.union(also))


def _content(
    expr: Expr, tensors: Mapping[str, StoredTensor], parts: Mapping[str, FilePart]
) -> FileRange | _ComputedTensor | None:
    if isinstance(expr, Read):
        stored = tensors[expr.name]
        return parts[stored.file].range(stored.start, stored.end)
    return None if _is_zero(expr) else _ComputedTensor(expr, tensors, parts)


def _is_zero(expr: Expr) -> bool:
    """Return whether all bytes of a tensor are zero: those of a new file are."""
    return isinstance(expr, Constant) and expr.value == 0 and math.copysign(1, expr.value) > 0


def _index(shards: Sequence[Shard]) -> str:
    specs = [spec for shard in shards for spec in shard.tensors.values()]
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    metadata = {
        "total_parameters": sum(spec.num_parameters for spec in specs),
        "total_size": sum(spec.nbytes for spec in specs),
    }
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def peak_memory(plan: Plan, result: CheckpointSpec, source: CheckpointSpec) -> int:
    """Return the estimated peak memory of carrying out the plan, in bytes: a constant, and what its threads hold.

    A thread holds a few blocks of rows, and of the source what is small enough to be kept. Maps of rows hold all.
    """
    computed = {name: expr for name, expr in plan.tensors.items() if not isinstance(expr, Read) and not _is_zero(expr)}
    if not computed:
        return MOVING_MEMORY
    from surgeon.plan.making import BLOCK_MEMORY, BLOCK_NUMBERS, KEPT

    kept = block = solved = whole = 0
    for name, expr in computed.items():
        if isinstance(expr, Regress):
            solved = max(solved, _solving(expr, source.tensors))
            continue
        read = [source.tensors[other] for other in reads(expr)]
        kept = max(kept, sum(spec.nbytes for spec in read if spec.nbytes <= KEPT))
        rows = (math.prod(spec.shape[1:]) for spec in (*read, result.tensors[name]))
        block = max(block, *rows)
        whole = max(whole, _held_whole(expr, source.tensors))
    return TORCH_MEMORY + 2 * kept + solved + 2 * whole + num_threads() * BLOCK_MEMORY * max(BLOCK_NUMBERS, block)


def _solving(expr: Regress, tensors: Mapping[str, TensorSpec]) -> int:
    """Return how many bytes it takes to solve a map: Gram matrices, their sum, a factor, and blocks of all models."""
    from surgeon.plan.making import BLOCK_NUMBERS

    *experts, rows, columns = infer(expr.maps[0], tensors).shape
    inputs = (rows if expr.is_transposed else columns) + bool(expr.biases)
    block = rows * columns if experts or expr.is_transposed else max(BLOCK_NUMBERS, inputs)
    once, each = 8 * inputs**2 * (2 * len(expr.maps) + 4), 8 * block * (2 * len(expr.maps) + 6)
    return num_threads() * (once + each) if experts else once + num_threads() * each


def _held_whole(expr: Expr, tensors: Mapping[str, TensorSpec]) -> int:
    """Return how many bytes an expression holds of tensors that are mapped along their rows: all of them, wide."""
    own = 0
    if isinstance(expr, Mapped):
        shapes = (infer(part, tensors).shape for part in (expr.source, expr) if not expr.dim)
        own = 8 * sum(map(math.prod, shapes))
    return own + sum(_held_whole(child, tensors) for child in children(expr))


def num_threads() -> int:
    """Return how many threads make new numbers: one for each core of this process, or as OMP_NUM_THREADS says."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, MOST_THREADS, int(wanted) if wanted.isdecimal() else cores))


# One weight file


@dataclass(frozen=True, slots=True)
class TensorWrite:
    """A tensor to write: bytes of a file, a function that makes them, or None: zeros.

    The function gives the bytes, or parts that make them later.
    """

    name: str
    spec: TensorSpec
    content: FileRange | Callable[[], "Iterable[memoryview] | Sequence[Part]"] | None


@dataclass(frozen=True, slots=True)
class CopyRun:
    """Tensors that follow each other both in a source file and in the result: one copy.

    `target` is the offset in the result, counted from the start of its data.
    """

    source: FileRange
    target: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a run. `target` is the offset in the result, from the start of the file. Whole blocks can be shared."""

    source: FileRange
    target: int
    is_whole_blocks: bool


def write_safetensors(
    path: Path,
    writes: Sequence[TensorWrite],
    *,
    progress: CountBytes | None = None,
    block: int = PAGE,
    threads: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Return what was written to the new file `path`: `writes`, in their order, and synced.

    Most copied bytes keep their place modulo `block`. What can be shared is found out here, file by file.
    """
    count_bytes = progress or (lambda count: None)
    runs = copy_runs(writes)
    specs, align = {write.name: write.spec for write in writes}, best_alignment(runs, block)
    header = format_header(specs, align=align, block=block, metadata=metadata)
    size = len(header) + sum(write.spec.nbytes for write in writes)
    shared = 0
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        files = {run.source.path: run.source.file for run in runs}
        blocks = {path: shared_block(file, target) for path, file in files.items()}
        pieces = [piece for run in runs for piece in in_pieces(run, len(header), blocks[run.source.path])]
        _allocate(target, size, [piece for piece in pieces if piece.is_whole_blocks])
        os.pwrite(target, header, 0)
        for piece in pieces:
            source, offset = piece.source, piece.target
            if piece.is_whole_blocks:
                done = share_range(source, target, offset, count_bytes)
                shared, offset = shared + done, offset + done
                source = source.between(source.start + done, source.end)
            copy_range(source, target, offset, count_bytes)
        _write_rest(target, writes, len(header), count_bytes, threads or num_threads())
        os.fsync(target)
    finally:
        os.close(target)
    return Written(size, shared)


def copy_runs(writes: Sequence[TensorWrite]) -> list[CopyRun]:
    """Return the copies that these tensors, in this order, need."""
    runs: list[CopyRun] = []
    target = 0
    for write in writes:
        if isinstance(source := write.content, FileRange) and source.size:
            last = runs[-1] if runs else None
            if (
                last
                and last.source.path == source.path
                and last.source.end == source.start
                and last.target + last.source.size == target
            ):
                runs[-1] = CopyRun(last.source.between(last.source.start, source.end), last.target)
            else:
                runs.append(CopyRun(source, target))
        target += write.spec.nbytes
    return runs


def best_alignment(runs: Sequence[CopyRun], block: int) -> int:
    """Return where, modulo a block, the data should begin so that most bytes keep their place within a block."""
    votes: Counter[int] = Counter()
    for run in runs:
        votes[(run.source.start - run.target) % block] += run.source.size
    return next((phase for phase, _ in votes.most_common() if phase % 8 == 0), 0)


def _allocate(target: int, size: int, shared: Sequence[Piece]) -> None:
    """Give an open file its size, and its blocks where the system can: a full disk is then known at once.

    What will be shared gets none: they would be needed until then, and btrfs would keep them as long as the file.
    """
    if not hasattr(os, "posix_fallocate") or shared:
        os.ftruncate(target, size)
    if hasattr(os, "posix_fallocate"):
        starts = [0, *(piece.target + piece.source.size for piece in shared)]
        for start, end in zip(starts, [*(piece.target for piece in shared), size], strict=True):
            if end > start:
                os.posix_fallocate(target, start, end - start)


def _write_rest(target: int, writes: Sequence[TensorWrite], start: int, count_bytes: CountBytes, threads: int) -> None:
    """Write the tensors that are no bytes of a file; those of zeros are there already."""
    offsets = accumulate((write.spec.nbytes for write in writes), initial=start)
    placed = list(zip(writes, offsets, strict=False))
    if zeros := sum(write.spec.nbytes for write in writes if write.content is None):
        count_bytes(zeros)
    if not any(callable(write.content) for write in writes):
        return
    from surgeon.plan.making import ToMake, write_made

    tensors = (
        ToMake(write.name, at, write.spec.nbytes, write.content) for write, at in placed if callable(write.content)
    )
    computes = any(isinstance(write.content, _ComputedTensor) for write in writes)
    with _one_thread_each() if computes else nullcontext():
        write_made(target, tensors, count_bytes, threads=threads)


def _one_thread_each() -> AbstractContextManager[None]:
    from surgeon.plan.arithmetic import single_threaded

    return single_threaded()


def in_pieces(run: CopyRun, data_start: int, block: int) -> Iterator[Piece]:
    """Yield a run of a file whose data begins at `data_start` in pieces: its whole blocks, and what is around them.

    `block` is the size of the blocks that can be shared; 0: none can.
    """
    source, shift = run.source, data_start + run.target - run.source.start
    cuts = [source.start, source.end]
    if block and shift % block == 0:
        first, last = -(-source.start // block) * block, source.end // block * block
        cuts[1:1] = [first, last] if first < last else []
    for number, (start, end) in enumerate(pairwise(cuts)):
        if start < end:
            yield Piece(source.between(start, end), start + shift, len(cuts) > 2 and number == 1)
