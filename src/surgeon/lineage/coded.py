"""Checkpoints whose weights are stored as integer codes with scales, seen as the checkpoint that they stand for.

Two forms are read: that of torchao's int8 tensors (`_weight_qdata`, `_weight_scale`, `_weight_zero_point`), and the
"pack-quantized" one of compressed-tensors (`weight_packed`, `weight_scale`), which vLLM reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.anatomy.config import text_config, unquantized
from surgeon.checkpoint.header import QUANTIZATION_KEYS, CheckpointSpec, TensorSpec, is_quantized
from surgeon.checkpoint.source import Source, spec_of
from surgeon.errors import CheckpointError
from surgeon.lineage.grids import Grid
from surgeon.lineage.numbers import Array

_HINT = "Trace the checkpoint that it was quantized from, or a dequantized copy."


@dataclass(frozen=True)
class Coded:
    """A matrix in codes: the tensors that hold it, row by row, and what makes numbers of their rows."""

    parts: tuple[str, ...]
    grid: Grid
    numbers: Callable[[Sequence[Array]], Array]


def plain_spec(source: Source) -> tuple[CheckpointSpec, Mapping[str, Coded]]:
    """Return the config and tensors that a checkpoint stands for, and those of them that are stored as codes.

    Raises CheckpointError for codes of a form that is not read.
    """
    spec = spec_of(source)
    if not is_quantized(spec.config):
        return spec, {}
    rules = _rules(spec.config)
    read = {"torchao": _torchao, "compressed-tensors": _packed}.get(str(rules.get("quant_method")))
    if read is None:
        method = rules.get("quant_method", "an unnamed method")
        raise CheckpointError(f"{source.label} is quantized by {method}, whose codes are not read", hint=_HINT)
    coded, shapes = read(spec.tensors, rules, source.label)
    stored = {part for each in coded.values() for part in each.parts}
    extra = ("_weight_zero_point", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
    plain = {name: item for name, item in spec.tensors.items() if name not in stored and not name.endswith(extra)}
    if odd := next((name for name, item in plain.items() if not item.dtype.startswith(("F", "BF"))), None):
        raise CheckpointError(f"{source.label} stores {odd!r} as codes of a form that is not read", hint=_HINT)
    plain |= {name: TensorSpec("F32", shape) for name, shape in shapes.items()}
    return CheckpointSpec(unquantized(spec.config), plain), coded


def _rules(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for part in (config, text_config(config)):
        for key in QUANTIZATION_KEYS:
            if isinstance(part.get(key), Mapping):
                found: Mapping[str, Any] = part[key]
                return found
    return {}


_Found = tuple[dict[str, Coded], dict[str, tuple[int, ...]]]


def _torchao(tensors: Mapping[str, TensorSpec], rules: Mapping[str, Any], label: str) -> _Found:
    """Return the matrices of torchao's int8 tensors: scale times (code minus zero point)."""
    coded: dict[str, Coded] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in tensors.items():
        if not name.endswith("._weight_qdata"):
            continue
        module = name.removesuffix("._weight_qdata")
        scale, zero = tensors.get(f"{module}._weight_scale"), tensors.get(f"{module}._weight_zero_point")
        if scale is None or spec.dtype != "I8" or len(spec.shape) != 2 or scale.shape[0] != spec.shape[0]:
            raise CheckpointError(f"{label} stores {module!r} in a form of torchao that is not read", hint=_HINT)
        parts = [name, f"{module}._weight_scale"]
        if zero is not None and zero.shape == scale.shape:
            parts.append(f"{module}._weight_zero_point")

        def numbers(rows: Sequence[Array]) -> Array:
            codes, scales = rows[0].astype(np.float32), rows[1].astype(np.float32)
            zeros = rows[2].astype(np.float32) if len(rows) > 2 else np.zeros_like(scales)
            times = codes.shape[1] // scales.shape[1]
            wide: Array = (codes - np.repeat(zeros, times, 1)) * np.repeat(scales, times, 1)
            return wide

        group = spec.shape[1] // scale.shape[1] if scale.shape[1] > 1 else None
        coded[f"{module}.weight"] = Coded(tuple(parts), Grid(8, group), numbers)
        shapes[f"{module}.weight"] = spec.shape
    return coded, shapes


def _packed(tensors: Mapping[str, TensorSpec], rules: Mapping[str, Any], label: str) -> _Found:
    """Return the matrices of compressed-tensors: codes of a few bits packed into int32, from the lowest bit on."""
    groups = rules.get("config_groups")
    weights = [each.get("weights") or {} for each in groups.values()] if isinstance(groups, Mapping) else []
    bits = {each.get("num_bits") for each in weights if isinstance(each, Mapping)}
    number = next(iter(bits), None)
    if len(bits) != 1 or number not in (2, 4, 8):
        raise CheckpointError(f"{label} is quantized in a way that is not read", hint=_HINT)
    coded: dict[str, Coded] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in tensors.items():
        if not name.endswith(".weight_packed"):
            continue
        module = name.removesuffix(".weight_packed")
        scale = tensors.get(f"{module}.weight_scale")
        is_read = spec.dtype == "I32" and len(spec.shape) == 2 and scale is not None
        if not is_read or scale is None or f"{module}.weight_zero_point" in tensors:
            raise CheckpointError(f"{label} stores {module!r} in a form that is not read", hint=_HINT)
        each = 32 // number
        width = spec.shape[1] * each

        def numbers(rows: Sequence[Array], each: int = each, width: int = width) -> Array:
            packed, scales = rows[0].astype(np.int64) & 0xFFFFFFFF, rows[1].astype(np.float32)
            shifts = number * np.arange(each)
            codes = ((packed[:, :, None] >> shifts) & (2**number - 1)).reshape(len(packed), width) - 2 ** (number - 1)
            wide: Array = codes.astype(np.float32) * np.repeat(scales, width // scales.shape[1], 1)
            return wide

        group = width // scale.shape[1] if scale.shape[1] > 1 else None
        coded[f"{module}.weight"] = Coded((name, f"{module}.weight_scale"), Grid(int(number), group), numbers)
        shapes[f"{module}.weight"] = (spec.shape[0], width)
    return coded, shapes
