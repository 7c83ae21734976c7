"""Stored numbers as arrays of float32, the step between neighbours of a dtype, and rounding to a dtype."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import CheckpointError

Array = NDArray[Any]

STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1", "I32": "<i4"}
# The exponent of the step at 1, and the smallest exponent that a step has.
_STEPS = {"F64": (-52, -1074), "F32": (-23, -149), "BF16": (-7, -133), "F16": (-10, -24)}
WORDS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def decoded(raw: bytes | bytearray, dtype: str) -> Array:
    """Return stored numbers, flat: floats as float32, codes as int32. Raises CheckpointError for another dtype."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in STORED:
        raise CheckpointError(
            f"weights that are stored as {dtype} cannot be compared", hint="Give a checkpoint that is not quantized."
        )
    numbers = np.frombuffer(raw, STORED[dtype])
    return numbers.astype(np.float32 if dtype.startswith("F") else np.int32)


def step(values: Array, dtype: str) -> Array:
    """Return the distance from each value to its neighbour in a floating dtype (its ulp), float32."""
    at_one, least = _STEPS.get(dtype, _STEPS["F32"])
    exponent = np.frexp(np.abs(values))[1] - 1  # floor(log2 |value|); -1 for zero, which has the least step of all
    exponent = np.where(values == 0, least, np.maximum(exponent + at_one, least))
    return np.ldexp(np.float32(1), exponent.astype(np.int32)).astype(np.float32)


def rounded(values: Array, dtype: str) -> Array:
    """Return float32 values rounded to the nearest of a dtype, ties to even, again as float32."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return ((bits + up) & np.uint32(0xFFFF0000)).view(np.float32)
    return values
