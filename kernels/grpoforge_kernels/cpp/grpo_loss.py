"""The fused loss in C++, on the CPU, for float32 log-probs and for float32, bfloat16 and float16 logits.

Sums and gradient come from one pass over the tokens; from logits, each row is read once from memory and its gradient
made while it is still in a cache. Blocks of tokens or rows of logits are shared out among ``torch.get_num_threads()``
threads; no result depends on how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from struct import Struct
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from grpoforge_kernels.cpp import loader
from grpoforge_kernels.cpp.selective_log_softmax import FORMATS, SMALL
from grpoforge_kernels.reference.grpo_loss import scale_
from grpoforge_kernels.rows import RowStats

if TYPE_CHECKING:
    from grpoforge_kernels.loss_options import ClipOptions, KLForm

__all__ = ["forward_backward", "from_logits", "scale_"]

NUM_SUMS = 7
KL_CODES = {None: 0, "k1": 1, "k2": 2, "k3": 3}
_STEPS = (*((1,),) * 3, (0, 1), *((1,),) * 2)
"""Column strides that C++ takes as they are, of each tensor of a loss: the advantages may be one for a row."""
_TOKENS = Struct("6P9q4fi0P")
"""``GrpoTokens`` of grpo_loss.cpp: six addresses, seven strides and the shape, four options and the KL. Packed, and no
`ctypes.Structure`: that takes as long as a quarter of the pass over 65,536 tokens."""

_library = loader.library("losses")
_loss = _library.grpoforge_grpo_loss
_loss.argtypes, _loss.restype = (c_char_p, *(c_void_p,) * 2, c_int32), None
_LOGITS = (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_float, c_float)
_from_logits = _library.grpoforge_grpo_loss_from_logits
_from_logits.argtypes, _from_logits.restype = (
    (*_LOGITS, c_char_p, *(c_void_p,) * 4, c_int64, c_int32),
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
    tensors = logprobs, old_logprobs, ref_logprobs, advantages, mask, weights
    tokens, _held = _tokens(tensors, clip, kl, beta)
    out = torch.empty_like(logprobs, memory_format=torch.contiguous_format) if gradient else None
    sums = torch.empty(NUM_SUMS, dtype=torch.float64, device="cpu")
    _loss(tokens, sums.data_ptr(), None if out is None else out.data_ptr(), _num_threads(logprobs))
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
    given = logprobs, old_logprobs, ref_logprobs, advantages, mask, weights
    tokens, _held = _tokens([None if one is None else one[None] for one in given], clip, kl, beta)
    sums = torch.empty(NUM_SUMS, dtype=torch.float64, device="cpu")
    _from_logits(
        logits.data_ptr(), logits.stride(0) * logits.element_size(), num_tokens, ids.data_ptr(),
        inv_temperature.data_ptr(), FORMATS[logits.dtype], softcap or 0.0, scale, tokens, logprobs.data_ptr(),
        stats.data_ptr(), sums.data_ptr(), None if out is None else out.data_ptr(),
        0 if out is None else out.stride(0) * out.element_size(), _num_threads(logits),
    )  # fmt: skip
    return sums, RowStats(*stats), out


def _tokens(
    tensors: Sequence[Tensor | None], clip: ClipOptions, kl: KLForm | None, beta: float
) -> tuple[bytes, Sequence[Tensor | None]]:
    """The ``[b, T]`` tensors as C++ reads them by address, with the options, and what must live as long as that.

    Only what has no neighbors in a row is copied; one advantage may stand for all of its row.
    """
    held = [one if one is None or one.stride(1) in _STEPS[at] else one.contiguous() for at, one in enumerate(tensors)]
    logprobs, old, ref, advantages, mask, weights = cast("list[Tensor]", held)
    packed = _TOKENS.pack(
        logprobs.data_ptr(), old.data_ptr(), 0 if ref is None else ref.data_ptr(), advantages.data_ptr(),
        mask.data_ptr(), weights.data_ptr(), logprobs.stride(0), old.stride(0), 0 if ref is None else ref.stride(0),
        *advantages.stride(), mask.stride(0), weights.stride(0), *logprobs.shape,
        1 - clip.epsilon_low, 1 + clip.epsilon_high, clip.bound, beta, KL_CODES[kl],
    )  # fmt: skip
    return packed, held


def _num_threads(work: Tensor) -> int:
    return torch.get_num_threads() if work.numel() >= SMALL else 1
