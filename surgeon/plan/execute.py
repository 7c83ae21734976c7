"""Carry out a plan: lay the result out in shards, fetch the tensors that it reads, and stream the result to disk.

A tensor that is only moved is a byte range, copied by the kernel. torch is imported only if the plan makes new numbers.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.checkpoint.header import DTYPE_BITS, CheckpointSpec, FilePart, FileRange, TensorSpec
from surgeon.checkpoint.output import CountBytes, TensorWrite, write_safetensors
from surgeon.checkpoint.source import (
    INDEX,
    WEIGHTS,
    Ranges,
    Source,
    StoredTensor,
    ranges_by_file,
)
from surgeon.plan.plan import Expr, Plan, Read, reads

# Measured peaks of a whole process that only moves bytes, and of one that has imported torch, in bytes.
MOVING_MEMORY = 45_000_000
TORCH_MEMORY = 260_000_000


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file of a result, with its tensors in the order in which they are written."""

    file: str
    tensors: Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class _ComputedTensor:
    """A tensor that is computed when it is written."""

    expr: Expr
    tensors: Mapping[str, StoredTensor]
    parts: Mapping[str, FilePart]

    def __call__(self) -> Iterable[memoryview]:
        from surgeon.plan.arithmetic import Arithmetic

        return Arithmetic(self.tensors, self.parts).make(self.expr)


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


def execute(
    plan: Plan, source: Source, directory: Path, *, shards: Sequence[Shard], progress: CountBytes | None = None
) -> int:
    """Return the number of bytes after writing the weights of the result and their index into an existing directory."""
    tensors = source.tensors
    parts = source.parts(ranges_read(plan, source))
    written = 0
    for shard in shards:
        writes = [
            TensorWrite(name, spec, _content(plan.tensors[name], tensors, parts))
            for name, spec in shard.tensors.items()
        ]
        written += write_safetensors(directory / shard.file, writes, progress=progress)
    if len(shards) > 1:
        text = _index(shards)
        (directory / INDEX).write_text(text, encoding="utf-8")
        written += len(text.encode())
    return written


def ranges_read(plan: Plan, source: Source, *, also: Iterable[str] = ()) -> Ranges:
    """Return the byte ranges that carrying out the plan reads, by file, and those of the tensors in `also`."""
    return ranges_by_file(source.tensors, {name for expr in plan.tensors.values() for name in reads(expr)}.union(also))


def _content(
    expr: Expr, tensors: Mapping[str, StoredTensor], parts: Mapping[str, FilePart]
) -> FileRange | _ComputedTensor:
    if isinstance(expr, Read):
        stored = tensors[expr.name]
        return parts[stored.file].range(stored.start, stored.end)
    return _ComputedTensor(expr, tensors, parts)


def _index(shards: Sequence[Shard]) -> str:
    specs = [spec for shard in shards for spec in shard.tensors.values()]
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    metadata = {
        "total_parameters": sum(spec.num_parameters for spec in specs),
        "total_size": sum(spec.nbytes for spec in specs),
    }
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def peak_memory(plan: Plan, result: CheckpointSpec, source: CheckpointSpec) -> int:
    """Return the estimated peak memory of carrying out the plan, in bytes: a constant, or one tensor's arithmetic."""
    if plan.moves_only:
        return MOVING_MEMORY
    sizes = (
        sum(source.tensors[read].nbytes for read in reads(expr)) + 8 * result.tensors[name].num_parameters
        for name, expr in plan.tensors.items()
        if not isinstance(expr, Read)
    )
    return TORCH_MEMORY + max(sizes)
