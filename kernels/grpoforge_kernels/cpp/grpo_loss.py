"""The fused loss in C++, on the CPU, for float32 log-probs and for float32, bfloat16 and float16 logits.

Sums and gradient come from one pass over the tokens; from logits, each row is read once from memory and its gradient
made while it is still in a cache. Blocks of tokens or rows of logits are shared out among ``torch.get_num_threads()``
threads; no result depends on how many there are.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpoforge_kernels.cpp import loader
from grpoforge_kernels.cpp.selective_log_softmax import FORMATS, SMALL
from grpoforge_kernels.reference.grpo_loss import scale_
from grpoforge_kernels.rows import RowStats

if TYPE_CHECKING:
    from grpoforge_kernels.loss_options import ClipOptions, KLForm

__all__ = ["forward_backward", "from_logits", "scale_"]

BLOCK = 512
"""Tokens that leave sums of their own: ``BLOCK`` of rows.h."""
NUM_SUMS = 7
KL_CODES = {None: 0, "k1": 1, "k2": 2, "k3": 3}


class _Options(Structure):
    _fields_ = (*((name, c_float) for name in ("low", "high", "bound", "beta")), ("kl", c_int32))


_POINTERS = ("logprobs", "old", "ref", "advantages", "mask", "weights")
_STRIDES = ("logprobs_row", "old_row", "ref_row", "advantages_row", "advantages_column", "mask_row", "weights_row")


class _Tokens(Structure):
    _fields_ = (
        *((name, c_void_p) for name in _POINTERS),
        *((name, c_int64) for name in (*_STRIDES, "num_rows", "num_columns")),
    )


_library = loader.library("losses")
_loss = _library.grpoforge_grpo_loss
_loss.argtypes, _loss.restype = (*(c_void_p,) * 5, c_int32), None
_from_logits = _library.grpoforge_grpo_loss_from_logits
_from_logits.argtypes, _from_logits.restype = (
    (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_float, c_float, *(c_void_p,) * 7, c_int64, c_int32),
    None,
)


def forward_backward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    clip: ClipOptions,
    kl: KLForm | None,
    beta: float,
    gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """As `grpoforge_kernels.reference.grpo_loss.forward_backward`, for ``[b, T]``."""
    tokens, _held = _tokens(logprobs, old_logprobs, ref_logprobs, advantages, mask, weights)
    out = torch.empty_like(logprobs, memory_format=torch.contiguous_format) if gradient else None
    sums, parts = _room(logprobs.numel())
    _loss(
        byref(tokens), byref(_options(clip, kl, beta)), sums.data_ptr(), parts.data_ptr(),
        None if out is None else out.data_ptr(), _num_threads(logprobs),
    )  # fmt: skip
    return sums, out


def from_logits(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    clip: ClipOptions,
    kl: KLForm | None,
    beta: float,
    softcap: float | None = None,
    scale: float = 1.0,
    gradient: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, RowStats, Tensor | None]:
    """As `grpoforge_kernels.reference.grpo_loss.from_logits`."""
    num_rows, num_tokens = logits.shape
    assert logits.device.type == "cpu" and (logits.stride(1) == 1 or num_tokens == 1)
    assert ids.shape == inv_temperature.shape == (num_rows,)
    assert ids.dtype == torch.int64 and inv_temperature.dtype == torch.float32
    ids, inv_temperature = ids.contiguous(), inv_temperature.contiguous()
    if gradient and out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    assert out is None or (out.shape == logits.shape and out.dtype == logits.dtype)
    assert out is None or out.stride(1) == 1 or num_tokens == 1
    logprobs, stats = inv_temperature.new_empty(num_rows), inv_temperature.new_empty(4, num_rows)
    tokens, _held = _tokens(
        logprobs[None], old_logprobs[None], None if ref_logprobs is None else ref_logprobs[None], advantages[None],
        mask[None], weights[None],
    )  # fmt: skip
    sums, parts = _room(num_rows)
    _from_logits(
        logits.data_ptr(), logits.stride(0) * logits.element_size(), num_tokens, ids.data_ptr(),
        inv_temperature.data_ptr(), FORMATS[logits.dtype], softcap or 0.0, scale, byref(tokens),
        byref(_options(clip, kl, beta)), logprobs.data_ptr(), stats.data_ptr(), sums.data_ptr(), parts.data_ptr(),
        None if out is None else out.data_ptr(), 0 if out is None else out.stride(0) * out.element_size(),
        _num_threads(logits),
    )  # fmt: skip
    return sums, RowStats(*stats), out


def _tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
) -> tuple[_Tokens, tuple[Tensor, ...]]:
    """The ``[b, T]`` tensors as C++ reads them by address, and what must live as long as it does.

    Only what has no neighbors in a row is copied; one advantage may stand for all of its row.
    """
    shape = logprobs.shape
    logprobs = _checked(logprobs, torch.float32, shape)
    old_logprobs = _checked(old_logprobs, torch.float32, shape)
    reference = None if ref_logprobs is None else _checked(ref_logprobs, torch.float32, shape)
    is_expanded = advantages.stride(1) == 0
    advantages = _checked(advantages, torch.float32, shape, copy=not is_expanded)
    mask, weights = _checked(mask, torch.bool, shape), _checked(weights, torch.float64, shape)
    tokens = _Tokens(
        logprobs.data_ptr(), old_logprobs.data_ptr(), None if reference is None else reference.data_ptr(),
        advantages.data_ptr(), mask.data_ptr(), weights.data_ptr(),
        logprobs.stride(0), old_logprobs.stride(0), 0 if reference is None else reference.stride(0),
        advantages.stride(0), 0 if is_expanded else 1, mask.stride(0), weights.stride(0), *shape,
    )  # fmt: skip
    return tokens, (logprobs, old_logprobs, advantages, mask, weights, *(() if reference is None else (reference,)))


def _checked(tensor: Tensor, dtype: torch.dtype, shape: torch.Size, *, copy: bool = True) -> Tensor:
    assert tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu
    return tensor.contiguous() if copy and tensor.stride(1) != 1 else tensor


def _options(clip: ClipOptions, kl: KLForm | None, beta: float) -> _Options:
    return _Options(1 - clip.epsilon_low, 1 + clip.epsilon_high, clip.bound, beta, KL_CODES[kl])


def _room(num_tokens: int) -> tuple[Tensor, Tensor]:
    """Room for the sums, and for those of each block."""
    num_blocks = -(-num_tokens // BLOCK)
    return torch.empty(NUM_SUMS, dtype=torch.float64), torch.empty(NUM_SUMS * num_blocks, dtype=torch.float64)


def _num_threads(work: Tensor) -> int:
    return torch.get_num_threads() if work.numel() >= SMALL else 1
