"""The arithmetic of a plan, in torch. Only plans that make new numbers import this.

Everything is computed in float32 or wider and rounded to the expression's dtype once at its end, and once where a
step ends inside it, so that a fused plan makes the same bytes as its steps one by one.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch  # noqa: TID253  (this module is the ring that computes; it is imported where a plan needs it)
from torch import Tensor  # noqa: TID253

from surgeon.checkpoint.header import DOWNLOAD_HINT
from surgeon.checkpoint.source import StoredTensor
from surgeon.checkpoint.spec import TensorSpec
from surgeon.errors import CheckpointError
from surgeon.plan.expressions import Add, Affine, Cast, Constant, Expr, Gather, Normal, Read, Rounded, Uniform, infer

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DRAW = 1 << 22  # numbers drawn at a time: bounds the memory of a draw in float64 to 32 MB


class Arithmetic:
    """Makes tensors from a source whose files lie at `paths`."""

    def __init__(self, tensors: Mapping[str, StoredTensor], paths: Mapping[str, Path]) -> None:
        self._tensors = tensors
        self._paths = paths
        self._specs: Mapping[str, TensorSpec] = {name: stored.spec for name, stored in tensors.items()}

    def make(self, expr: Expr) -> Iterator[memoryview]:
        """Yield the bytes of the tensor that `expr` makes."""
        yield self.tensor(expr).contiguous().flatten().view(torch.uint8).numpy().data

    def tensor(self, expr: Expr) -> Tensor:
        """Return the tensor that `expr` makes, in the dtype that the plan says."""
        inner = expr.source if isinstance(expr, Cast | Rounded) else expr
        return self._wide(inner).to(TORCH_DTYPES[infer(expr, self._specs).dtype])

    def _wide(self, expr: Expr) -> Tensor:
        """Return the tensor that `expr` makes in float32, or float64 where that is what it is made of."""
        match expr:
            case Read(name):
                return _at_least_float32(read(self._tensors[name], self._paths[self._tensors[name].file]))
            case Gather():
                return _gather(self._wide(expr.source), expr)
            case Affine(source, factor, offset):
                return self._wide(source).mul(factor).add_(offset)
            case Add(parts):
                first, *rest = parts
                total = self._wide(first).clone()
                for part in rest:
                    total += self._wide(part)
                return total
            case Cast() | Rounded():
                return _at_least_float32(self.tensor(expr))
            case Uniform(shape, like, ratio, seed, stream):
                width = ratio * math.sqrt(12) * self._wide(like).std(correction=0).item()
                return draw_uniform(shape, seed, stream).sub_(0.5).mul_(width).to(self._wide_dtype(like))
            case Normal(spec, std, seed, stream):
                return _draw_normal(spec.shape, std, seed, stream)
            case Constant(spec, value):
                return torch.full(spec.shape, value, dtype=torch.float32)

    def _wide_dtype(self, expr: Expr) -> torch.dtype:
        return torch.float64 if infer(expr, self._specs).dtype == "F64" else torch.float32


def read(stored: StoredTensor, path: Path) -> Tensor:
    """Return a stored tensor of a floating dtype."""
    data = bytearray(stored.end - stored.start)
    with path.open("rb") as file:
        file.seek(stored.start)
        count = file.readinto(data)
    if count != len(data):
        raise CheckpointError(f"{path} has become shorter while it was read", hint=DOWNLOAD_HINT)
    if not data:
        return torch.empty(stored.spec.shape, dtype=TORCH_DTYPES[stored.spec.dtype])
    return torch.frombuffer(data, dtype=TORCH_DTYPES[stored.spec.dtype]).view(stored.spec.shape)


def draw_uniform(shape: tuple[int, ...], seed: int, stream: str) -> Tensor:
    """Return numbers in [0, 1) in float32: 24 random bits each, the same on every machine."""
    return torch.rand(shape, generator=_generator(seed, stream), dtype=torch.float32)


def _draw_normal(shape: tuple[int, ...], std: float, seed: int, stream: str) -> Tensor:
    """Return normal numbers in float32, the same for the same seed and stream whatever the number of threads.

    Drawn in float64, where torch has one scalar routine; its float32 one differs between vector units.
    """
    generator = _generator(seed, stream)
    value = torch.empty(shape, dtype=torch.float32)
    flat = value.view(-1)
    for start in range(0, flat.numel(), DRAW):
        chunk = flat[start : start + DRAW]
        chunk.copy_(torch.randn(chunk.numel(), generator=generator, dtype=torch.float64) * std)
    return value


def _generator(seed: int, stream: str) -> torch.Generator:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(key & (2**63 - 1))


def _gather(value: Tensor, expr: Gather) -> Tensor:
    index = torch.tensor(expr.index)
    new = index < 0
    made = value.index_select(expr.dim, index.clamp(min=0)) if value.shape[expr.dim] else value
    along = [1] * value.dim()
    along[expr.dim] = -1
    if any(factor != 1.0 for factor in expr.scale):
        made.mul_(torch.tensor(expr.scale, dtype=made.dtype).view(along))
    if new.any():
        fill = torch.full((1,) * value.dim(), expr.fill, dtype=made.dtype)
        if expr.mean:
            fill = fill + expr.mean * value.mean(expr.dim, keepdim=True)
        made.masked_fill_(new.view(along), 0.0)
        made += fill * new.view(along)
    return made


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
