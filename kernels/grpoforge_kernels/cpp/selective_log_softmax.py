"""Statistics of rows of logits and their gradient in C++, on the CPU, for float32, bfloat16 and float16.

The forward pass reads the logits once; the gradient pass reads them once and writes once, over them if told to. Rows
are shared out among ``torch.get_num_threads()`` threads, each row to one: results do not depend on how many there are.
"""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from grpoforge_kernels.cpp import loader
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.reference import selective_log_softmax as reference
from grpoforge_kernels.rows import RowStats, TokenStats

__all__ = ["finish", "row_gradient", "row_stats"]

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SMALL = 2**16
"""Elements below which a second thread costs more than it saves."""

_library = loader.library("losses")
_LOGITS = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_float, c_float)
_row_stats = _library.grpoforge_row_stats
_row_stats.argtypes, _row_stats.restype = (*_LOGITS, *(c_void_p,) * 4, c_int32), None
_finish = _library.grpoforge_finish
_finish.argtypes, _finish.restype = (*(c_void_p,) * 5, c_int64, *(c_void_p,) * 3), None
_row_gradient = _library.grpoforge_row_gradient
_row_gradient.argtypes, _row_gradient.restype = (*_LOGITS, *(c_void_p,) * 7, c_int64, c_int32), None


def row_stats(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    *,
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
    first_id: int = 0,
    entropy: bool = True,
) -> RowStats:
    """As `grpoforge_kernels.reference.selective_log_softmax.row_stats`; ``weighted`` is always made, at no cost."""
    num_rows, num_tokens = logits.shape
    ids, inv_temperature, mask = _dense(logits, ids, inv_temperature, mask)
    stats = RowStats(*(inv_temperature.new_empty(num_rows) for _ in range(4)))
    _row_stats(
        logits.data_ptr(), logits.stride(0) * logits.element_size(), num_rows, num_tokens, ids.data_ptr(), first_id,
        inv_temperature.data_ptr(), None if mask is None else mask.data_ptr(), FORMATS[logits.dtype], softcap or 0.0,
        scale, *(values.data_ptr() for values in stats), _num_threads(logits),
    )  # fmt: skip
    return stats


def finish(stats: RowStats, inv_temperature: Tensor) -> TokenStats:
    """As `grpoforge_kernels.rows.finish`, each number rounded once."""
    results = TokenStats(*(torch.empty_like(stats.total) for _ in range(3)))
    read = [values.contiguous() for values in (*stats, inv_temperature)]  # copies live until C++ is done
    _finish(*(values.data_ptr() for values in read), len(stats.total), *(values.data_ptr() for values in results))
    return results


def row_gradient(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    stats: RowStats,
    g: Tensor,
    h: Tensor,
    l: Tensor,  # noqa: E741  (the letters of the equation)
    *,
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
    first_id: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """As `grpoforge_kernels.reference.selective_log_softmax.row_gradient`."""
    num_rows, num_tokens = logits.shape
    ids, inv_temperature, mask = _dense(logits, ids, inv_temperature, mask)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    assert out.shape == logits.shape and out.dtype == logits.dtype and (out.stride(1) == 1 or num_tokens == 1)
    rows = [values.contiguous() for values in (*stats[:3], g, h, l)]
    assert all(values.shape == (num_rows,) and values.dtype == torch.float32 for values in rows)
    _row_gradient(
        logits.data_ptr(), logits.stride(0) * logits.element_size(), num_rows, num_tokens, ids.data_ptr(), first_id,
        inv_temperature.data_ptr(), None if mask is None else mask.data_ptr(), FORMATS[logits.dtype], softcap or 0.0,
        scale, *(values.data_ptr() for values in rows), out.data_ptr(), out.stride(0) * out.element_size(),
        _num_threads(logits),
    )  # fmt: skip
    return out


def _dense(
    logits: Tensor, ids: Tensor, inv_temperature: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What C++ reads by address must be exactly what it takes it for."""
    num_rows, num_tokens = logits.shape
    assert logits.device.type == "cpu" and (logits.stride(1) == 1 or num_tokens == 1)
    assert ids.shape == (num_rows,) and ids.dtype == torch.int64
    assert inv_temperature.shape == (num_rows,) and inv_temperature.dtype == torch.float32
    assert mask is None or (mask.shape == (num_rows,) and mask.dtype == torch.bool)
    return ids.contiguous(), inv_temperature.contiguous(), None if mask is None else mask.contiguous()


def _num_threads(logits: Tensor) -> int:
    return torch.get_num_threads() if logits.numel() >= SMALL else 1


def _check() -> None:
    """Reject a library (built with ``-ffast-math``, say) that has not three rows of 100 tokens as the reference has."""
    logits = (torch.arange(300, dtype=torch.float32) * 0.7).sin().mul_(6).view(3, 100)
    logits[1, ::3] = -torch.inf
    ids, s = torch.tensor([0, 50, 99]), torch.tensor([1.0, 0.5, 2.0])
    one, options = torch.ones(3), {"mask": None, "softcap": None, "scale": 1.0}
    stats = row_stats(logits, ids, s, **options)  # type: ignore[arg-type]
    ours = row_gradient(logits, ids, s, stats, one, one, one, **options)  # type: ignore[arg-type]
    wide = logits.double(), ids, s.double()
    exact = reference.row_stats(*wide, **options)  # type: ignore[arg-type]
    ones = (one.double(),) * 3
    gradient = reference.row_gradient(*wide, exact, *ones, **options)  # type: ignore[arg-type]
    pairs = zip((*finish(stats, s), ours), (*reference.finish(exact, s.double()), gradient), strict=True)
    if not all(torch.allclose(mine.double(), true, rtol=1e-5, atol=1e-6) for mine, true in pairs):
        hint = "set CXX to a compiler without -ffast-math and its like"
        raise loader.reject("losses", KernelError("the C++ kernels do not compute what they should", hint))


_check()
