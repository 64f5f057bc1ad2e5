"""Products of bfloat16 matrices left in float32, on CPUs that multiply bfloat16 (AVX512_BF16).

torch has none on a CPU: its bfloat16 product rounds the result to bfloat16, which for logits of 16 is an error of 0.03.
"""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from grpoforge_kernels.cpp import loader

__all__ = ["is_native", "multiply"]

SMALL = 2**22
"""Multiplications below which a second thread costs more than it saves."""

_library = loader.library()
_has_product = _library.grpoforge_has_bfloat16_product
_has_product.argtypes, _has_product.restype = (), c_int32
_product = _library.grpoforge_bfloat16_product
_product.argtypes = (c_void_p, c_int64, c_void_p, *(c_int64,) * 5, c_void_p, c_int64, c_int32, c_int32)
_product.restype = None


@cache
def is_native() -> bool:
    """Whether this processor has the instruction, the compiler knew it, and a product comes out right."""
    return bool(_has_product()) and _is_right()


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """``out = a @ b``, or ``out += a @ b``: bfloat16 matrices, float32 ``out``, products and sums in float32.

    ``a [M, K]`` and ``out [M, N]`` have contiguous rows; ``b [K, N]`` has contiguous rows or contiguous columns. Each
    number is summed in one order, whatever the number of threads and the rows beside it.
    """
    (num_rows, depth), num_columns = a.shape, b.shape[1]
    assert b.shape[0] == depth and out.shape == (num_rows, num_columns)
    assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
    assert a.device.type == b.device.type == out.device.type == "cpu"
    assert (a.stride(1) == 1 or depth == 1) and (out.stride(1) == 1 or num_columns == 1)
    threads = torch.get_num_threads() if num_rows * num_columns * depth >= SMALL else 1
    _product(
        a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), b.stride(1), num_rows, num_columns, depth,
        out.data_ptr(), out.stride(0), add, threads,
    )  # fmt: skip


def _is_right() -> bool:
    """Of every shape of tile, with b in both orders."""
    a = torch.arange(17 * 35, dtype=torch.float32).mul_(0.7).sin_().view(17, 35).bfloat16()
    b = torch.arange(35 * 50, dtype=torch.float32).mul_(0.3).cos_().view(35, 50).bfloat16()
    exact = a.double() @ b.double()
    for other in (b, b.t().contiguous().t()):
        out = torch.ones(17, 50)
        multiply(a, other, out, add=True)
        if not torch.allclose(out.double(), exact + 1, rtol=1e-5, atol=1e-5):
            return False
    return True
