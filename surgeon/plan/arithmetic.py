"""The arithmetic of a plan, in torch. Only plans that make new numbers import this.

Every expression is computed in float32 or wider and rounded to its own dtype at once, so that a fused plan makes the
same bytes as its steps one by one.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch  # noqa: TID253  (this module is the ring that computes; it is imported where a plan needs it)

from surgeon.checkpoint.source import StoredTensor
from surgeon.plan.expressions import Cast, Constant, Expr, Normal, Read, Scale

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DRAW = 1 << 22  # numbers drawn at a time: bounds the memory of a draw in float64 to 32 MB


def make(expr: Expr, tensors: Mapping[str, StoredTensor], paths: Mapping[str, Path]) -> Iterator[memoryview]:
    """Yield the bytes of the tensor that `expr` makes. `paths` says where each file of the source lies."""
    value = evaluate(expr, tensors, paths)
    yield value.contiguous().flatten().view(torch.uint8).numpy().data


def evaluate(expr: Expr, tensors: Mapping[str, StoredTensor], paths: Mapping[str, Path]) -> torch.Tensor:
    """Return the tensor that `expr` makes, in the dtype that the plan says."""
    match expr:
        case Read(name):
            return read(tensors[name], paths[tensors[name].file])
        case Scale(source, dim, runs):
            value = evaluate(source, tensors, paths)
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            factors = torch.cat([torch.full((count,), factor, dtype=wide.dtype) for count, factor in runs])
            return (wide * factors.view([-1] + [1] * (value.dim() - 1 - dim))).to(value.dtype)
        case Cast(source, dtype):
            return evaluate(source, tensors, paths).to(TORCH_DTYPES[dtype])
        case Constant(spec, value):
            return torch.full(spec.shape, value, dtype=TORCH_DTYPES[spec.dtype])
        case Normal(spec, std, seed, stream):
            return _draw(spec.shape, std, seed, stream).to(TORCH_DTYPES[spec.dtype])


def read(stored: StoredTensor, path: Path) -> torch.Tensor:
    """Return a stored tensor of a floating dtype."""
    data = bytearray(stored.end - stored.start)
    with path.open("rb") as file:
        file.seek(stored.start)
        count = file.readinto(data)
    if count != len(data):
        raise OSError(f"{path} ended {len(data) - count} bytes early")
    if not data:
        return torch.empty(stored.spec.shape, dtype=TORCH_DTYPES[stored.spec.dtype])
    return torch.frombuffer(data, dtype=TORCH_DTYPES[stored.spec.dtype]).view(stored.spec.shape)


def _draw(shape: tuple[int, ...], std: float, seed: int, stream: str) -> torch.Tensor:
    """Return normal numbers in float32, the same for the same seed and stream on every machine and thread count.

    Drawn in float64, where torch has one scalar routine; its float32 one differs between vector units.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little")
    generator = torch.Generator().manual_seed(key & (2**63 - 1))
    value = torch.empty(shape, dtype=torch.float32)
    flat = value.view(-1)
    for start in range(0, flat.numel(), DRAW):
        chunk = flat[start : start + DRAW]
        chunk.copy_(torch.randn(chunk.numel(), generator=generator, dtype=torch.float64) * std)
    return value
