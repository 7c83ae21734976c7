"""What is known of a checkpoint before a byte of weights is read: its config, and each tensor's dtype and shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

# Bits per element of every dtype that safetensors 0.8 knows, by its name in the header.
DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's dtype (by its safetensors name) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """The config and the tensors of a checkpoint, without their numbers. All that a plan needs to be decided."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_parameters for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())
