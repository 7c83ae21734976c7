"""The codes of a weight, made by the library that reads them again, and the weight that they stand for.

Rows are quantized alone, so that a block of them has the codes that the whole weight has. torchao: symmetric int8, a
scale for each row. compressed-tensors: symmetric codes in groups along the inputs, packed into words of 32 bits. Both
round to the nearest code, with the largest magnitude of a row or group at the end of the scale.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgeon.errors import NOISY, PlanError, reason
from surgeon.plan.making import BLOCK_NUMBERS
from surgeon.plan.schemes import INSTALL, TORCHAO, Scheme, check_installed
from surgeon.plan.summing import MakeRows, row_ranges

if TYPE_CHECKING:
    from surgeon.plan.expressions import Quantized

Make = Callable[[Tensor], Mapping[str, Tensor]]


def quantized(expr: "Quantized", rows: MakeRows, shape: tuple[int, ...], dtype: torch.dtype) -> MakeRows:
    """Return the function that makes rows of a part of a weight of this shape, whose `rows` are rounded to `dtype`."""
    if expr.part == "shape":
        whole = torch.tensor(shape)
        return lambda start, stop: whole[start:stop]
    make, part = maker(expr.scheme), expr.part

    def made(start: int, stop: int) -> Tensor:
        ranges = row_ranges((stop - start, *shape[1:]), BLOCK_NUMBERS)  # a row of scales is of a long row of numbers
        return torch.cat([make(rows(start + first, start + last).to(dtype))[part] for first, last in ranges])

    return made


def dequantized(scheme: Scheme, codes: MakeRows, scale: MakeRows, dtype: torch.dtype) -> MakeRows:
    """Return the function that makes rows of a weight of its codes and scales, rounded to `dtype` as it is when run."""

    def rows(start: int, stop: int) -> Tensor:
        stored, factors = codes(start, stop), scale(start, stop)
        if scheme.method != TORCHAO:
            stored = _unpacked(stored, scheme)
        numbers = stored.to(torch.float32).view(len(stored), factors.shape[1], -1)
        weight: Tensor = (numbers * factors[..., None]).flatten(1).to(dtype).to(torch.float32)
        return weight

    return rows


def _unpacked(words: Tensor, scheme: Scheme) -> Tensor:
    """Return the codes in words of 32 bits."""
    library(scheme.method)
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape = torch.Size((words.shape[0], words.shape[1] * scheme.codes_per_word))
    codes: Tensor = unpack_from_int32(words, scheme.bits, shape)
    return codes


def maker(scheme: Scheme) -> Make:
    """Return the function from rows of a weight to their codes and scales."""
    library(scheme.method)
    return _by_torchao() if scheme.method == TORCHAO else _by_compressed_tensors(scheme)


def _by_torchao() -> Make:
    from torchao.quantization import Int8Tensor, PerRow

    def make(rows: Tensor) -> Mapping[str, Tensor]:
        made = Int8Tensor.from_hp(rows, PerRow())
        return {"codes": made.qdata, "scale": made.scale}

    return make


def _by_compressed_tensors(scheme: Scheme) -> Make:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    known = QuantizationScheme.model_validate(scheme.config(())["config_groups"]["group_0"])

    def make(rows: Tensor) -> Mapping[str, Tensor]:
        groups = rows.view(len(rows), -1, scheme.group_size or rows.shape[1])
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), known.weights)
        state = {"weight": rows, "weight_scale": scale, "weight_zero_point": zero}
        made = PackedQuantizationCompressor.compress(state, known)
        return {"codes": made["weight_packed"], "scale": made["weight_scale"], "shape": made["weight_shape"]}

    return make


def unpacked_by_library(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return a weight after compressed-tensors has made codes of it, and a weight of those."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    known = QuantizationScheme.model_validate(scheme.config(())["config_groups"]["group_0"])
    made = maker(scheme)(weight)
    state = {"weight_packed": made["codes"], "weight_scale": made["scale"], "weight_shape": made["shape"]}
    back: Tensor = PackedQuantizationCompressor.decompress(state, known)["weight"]
    return back


# --- the libraries ------------------------------------------------------------------------------------------------

_MODULES = {
    "torchao": ("torchao.quantization",),
    "compressed-tensors": ("compressed_tensors.quantization", "compressed_tensors.compressors.pack_quantized.base"),
}


def library(method: str) -> None:
    """Import the library of a method. Raises PlanError where it is not there, or is not whole, with what it lacks."""
    check_installed(method)
    try:
        with quiet_import():
            for module in _MODULES[method]:
                import_module(module)
    except Exception as error:  # a library that does not fit its neighbours fails in any way
        cause = error
        while cause.__cause__ is not None:  # the first one says what is missing, those above it that it cannot be
            cause = cause.__cause__  # type: ignore[assignment]
        raise PlanError(f"{method} cannot be imported: {reason(cause)}", hint=f"Install it again: {INSTALL}") from error


@contextmanager
def quiet_import() -> Iterator[None]:
    """Return a context in which libraries warn of nothing that a user could act on."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
