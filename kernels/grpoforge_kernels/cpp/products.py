"""Products of bfloat16 matrices with float32 sums, on CPUs that multiply bfloat16 (AMX, AVX512_BF16).

torch has none on a CPU: its bfloat16 product rounds the result to bfloat16, which for logits of 16 is an error of 0.03.
"""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from grpoforge_kernels.cpp import loader

__all__ = ["KINDS", "is_native", "kind", "multiply"]

KINDS = ("none", "avx512", "amx")
SMALL = 2**22
"""Multiplications below which a second thread costs more than it saves."""

_library = loader.library("losses")
_kind = _library.grpoforge_bfloat16_product_kind
_kind.argtypes, _kind.restype = (), c_int32
_depth = _library.grpoforge_bfloat16_product_depth
_depth.argtypes, _depth.restype = (), c_int64
_product = _library.grpoforge_bfloat16_product
_product.argtypes = (
    *(c_int32, c_void_p, c_int32, c_int64, c_int64, c_void_p), *(c_int64,) * 5,
    *(c_void_p, c_int32, c_int64, c_int32, c_int32),
)  # fmt: skip
_product.restype = None


@cache
def kind() -> int:
    """What multiplies here, as an index of `KINDS`: the fastest that this processor has and whose results are right."""
    return next((one for one in range(_kind(), 0, -1) if _is_right(one)), 0)


def is_native() -> bool:
    """Whether this processor has an instruction for it, the compiler knew it, and products come out right."""
    return kind() > 0


def rounds_once(depth: int) -> bool:
    """Whether a product of this depth can leave its result in bfloat16, rounded once."""
    return depth <= int(_depth())


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool, by: int | None = None) -> None:
    """``out = a @ b``, or ``out += a @ b``, with bfloat16 products and float32 sums.

    ``a [M, K]`` is bfloat16, or float32 and rounded to bfloat16 here; ``b [K, N]`` is bfloat16; one whose rows and
    columns all lie apart is copied. ``out [M, N]`` has contiguous rows and is float32, or bfloat16 (then without
    ``add``, and only where `rounds_once` holds). Each number is summed in one order, whatever the number of threads and
    the rows beside it.
    """
    (num_rows, depth), num_columns = a.shape, b.shape[1]
    assert b.shape[0] == depth and out.shape == (num_rows, num_columns)
    assert b.dtype == torch.bfloat16 and {a.dtype, out.dtype} <= {torch.bfloat16, torch.float32}
    assert a.device.type == b.device.type == out.device.type == "cpu"
    assert out.stride(1) == 1 or num_columns == 1
    a, b = (one if 1 in (*one.stride(), *one.shape) else one.contiguous() for one in (a, b))
    assert out.dtype == torch.float32 or (not add and rounds_once(depth))
    if depth == 0 and not add:
        out.zero_()
    _product(
        kind() if by is None else by,
        a.data_ptr(), a.dtype == torch.float32, *_strides(a), b.data_ptr(), *_strides(b), num_rows, num_columns, depth,
        out.data_ptr(), out.dtype == torch.float32, out.stride(0), add,
        num_threads(num_rows * num_columns * depth),
    )  # fmt: skip


def num_threads(multiplications: int) -> int:
    """How many threads share a product."""
    return torch.get_num_threads() if multiplications >= SMALL else 1


def _strides(matrix: Tensor) -> tuple[int, int]:
    """Those of a matrix, where the one of a single row or column is free to say anything."""
    rows, columns = matrix.stride()
    if rows == 1 or columns == 1:
        return rows, columns
    return (rows, 1) if matrix.shape[1] == 1 else (1, columns)


def _is_right(by: int) -> bool:
    """Of whole tiles and of edges, with both in both orders, and rounded."""
    a = torch.arange(35 * 67, dtype=torch.float32).mul_(0.7).sin_().view(35, 67)
    b = torch.arange(67 * 50, dtype=torch.float32).mul_(0.3).cos_().view(67, 50).bfloat16()
    exact = a.bfloat16().double() @ b.double()
    for left in (a, a.bfloat16(), a.t().contiguous().t(), a.bfloat16().t().contiguous().t()):
        for right in (b, b.t().contiguous().t()):
            out = torch.ones(35, 50)
            multiply(left, right, out, add=True, by=by)
            if not torch.allclose(out.double(), exact + 1, rtol=1e-5, atol=1e-5):
                return False
    rounded = torch.empty(35, 50, dtype=torch.bfloat16)
    multiply(a, b, rounded, add=False, by=by)
    return torch.allclose(rounded.double(), exact, rtol=2**-8, atol=1e-5)
