"""Products of matrices whose bytes are the same on every machine: no sum in them depends on its order.

A matrix is split into two of whole numbers, so small that all their products and sums are exact in float64. Whatever
order and vector units a library adds in, the result is then the same, and so it is whatever rows are asked for.
Source: Ozaki et al. 2012 (Numerical Algorithms 59), the error-free splitting; here of two slices.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EXACT_BITS = 53  # of a whole number in float64

Matrix = NDArray[np.float64]


def mapped(value: Tensor, matrix: Tensor, dim: int, inner: int) -> Tensor:
    """Return `value` mapped along `dim`: in each stretch, block j is the sum over i of matrix[j, i] times block i.

    A block has `inner` positions; `matrix` is of shape (new, old). The result has the dtype of `value`, and an error
    below 2 ** -40 of the largest numbers of a sum, times its length.
    """
    new, old = matrix.shape
    before, after = value.shape[:dim], value.shape[dim + 1 :]
    blocks = value.reshape(*before, -1, old, inner, *after).movedim(len(before) + 1, 0)
    made = product(_numbers(matrix), _numbers(blocks.reshape(old, -1)))
    whole = torch.from_numpy(made).to(value.dtype).view(new, *blocks.shape[1:]).movedim(0, len(before) + 1)
    return whole.reshape(*before, -1, *after)


def product(left: Matrix, right: Matrix) -> Matrix:
    """Return left @ right, of shapes (n, k) and (k, m), to about 40 bits of the largest numbers of each row and column.

    Each sum of products is of whole numbers below 2 ** 53.
    """
    bits = (EXACT_BITS - (left.shape[1] - 1).bit_length()) // 2
    (high, low), rows = _slices(left, bits, axis=1)
    (upper, lower), columns = _slices(right, bits, axis=0)
    large, small = high @ upper, high @ lower + low @ upper  # both exact
    made: Matrix = np.ldexp(large + np.ldexp(small, -bits), rows + columns - 2 * bits)
    return made


def _slices(matrix: Matrix, bits: int, axis: int) -> tuple[tuple[Matrix, Matrix], NDArray[np.int32]]:
    """Return two matrices of whole numbers, the second in units of 2 ** -bits of the first's, and the exponents.

    Along `axis` all numbers share an exponent e: the first slice counts units of 2 ** (e - bits).
    """
    exponents = np.frexp(np.abs(matrix).max(axis=axis, keepdims=True, initial=0.0))[1]
    scaled = np.ldexp(matrix, bits - exponents)
    high = np.rint(scaled)
    return (high, np.rint(np.ldexp(scaled - high, bits))), exponents


def _numbers(value: Tensor) -> Matrix:
    return value.to(torch.float64).numpy()
