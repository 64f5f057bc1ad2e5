"""The fused loss as a Triton kernel: `grpoforge_kernels.grpo_loss` has the equations.

One launch makes the loss, everything counted about it, and its gradient by the log-probs; straight from logits the same
launch reads statistics of rows instead of log-probs. Bytes for each token: ``4 (logprobs) + 4 (old) [+ 4 (ref)] +
4 (advantages) + 1 (mask) + 8 (weights)``, and ``4`` for the gradient; from logits ``16`` for three statistics and the
inverse temperature in place of the log-probs. Tokens are few beside logits, so exponentials are taken in float64 and
cost nothing that can be measured; what is float32 in the plain path is rounded to float32 here, decisions included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpoforge_kernels.rows import RowStats
from grpoforge_kernels.triton import configs
from grpoforge_kernels.triton.selective_log_softmax import row_gradient, row_stats

if TYPE_CHECKING:
    from grpoforge_kernels.grpo_loss import ClipOptions, KLForm

__all__ = ["forward_backward", "from_logits", "scale_"]

KL_CODES = {None: 0, "k1": 1, "k2": 2, "k3": 3}
NUM_SUMS = 7
NUM_MAXIMA = 2
"""The last of the sums are maxima."""
SCALE_BLOCK = 2048


@triton.jit
def clip_term(ratio, advantage, low, high, bound):
    """Loss of the policy, its derivative by the log-prob, and whether ``bound`` stops the token; ties are halved."""
    free = ratio * advantage
    held = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    share = tl.where(free == held, 0.5, tl.where(free < held, 1.0, 0.0))
    inside = tl.where((ratio >= low) & (ratio <= high), 1.0, 0.0)
    stopped = (advantage < 0) & (ratio > bound)
    factor = tl.where(stopped, 0.0, share + (1.0 - share) * inside)
    inner = tl.where(stopped, bound * advantage, tl.where(held < free, held, free))
    inner = tl.where((free != free) | (held != held), float("nan"), inner)
    slope = tl.where(factor == 0, 0.0, -factor * advantage * ratio)
    return -inner, tl.where(inner != inner, inner, slope), stopped


@triton.jit
def kl_term(x, KL: tl.constexpr):
    """``k1``, ``k2`` or ``k3`` of the float32 ``x = logprobs - ref_logprobs``, and its derivative."""
    value = tl.zeros(x.shape, tl.float32)
    slope = tl.zeros(x.shape, tl.float32)
    if KL == 1:
        value = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    if KL == 2:
        value = 0.5 * x * x
        slope = x
    if KL == 3:
        excess = tl.exp(-x.to(tl.float64)) - 1.0
        value = (excess + x).to(tl.float32)
        slope = -excess.to(tl.float32)
    return value, slope


@triton.jit
def largest(values):
    """Largest absolute value; NaN if there is one."""
    undefined = tl.max((values != values).to(tl.int32), 0) > 0
    return tl.where(undefined, float("nan"), tl.max(tl.abs(values), 0)).to(tl.float64)


@triton.jit(do_not_specialize=["num_tokens", "num_columns", "advantage_row", "advantage_column", "inv_stride"])
def token_kernel(
    logprobs,
    inv_temperature,
    old_logprobs,
    ref_logprobs,
    advantages,
    mask,
    weights,
    sums,
    gradient,
    num_tokens,
    num_columns,
    advantage_row,
    advantage_column,
    inv_stride,
    low,
    high,
    bound,
    beta,
    FROM_STATS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sums [7, programs]`` and ``gradient``; with ``FROM_STATS``, ``logprobs`` is ``[4, N]`` statistics of rows."""
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_tokens
    used = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    if FROM_STATS:
        s = tl.load(inv_temperature + at * inv_stride, mask=used, other=1.0)
        maximum = tl.load(logprobs + at, mask=used, other=0.0)
        total = tl.load(logprobs + num_tokens + at, mask=used, other=1.0)
        chosen = tl.load(logprobs + 3 * num_tokens.to(tl.int64) + at, mask=used, other=0.0)
        logprob = s * (chosen - maximum) - tl.log(total)
    else:
        logprob = tl.load(logprobs + at, mask=used, other=0.0)
    advantage_at = at // num_columns * advantage_row + at % num_columns * advantage_column
    advantage = tl.load(advantages + advantage_at, mask=used, other=0.0)
    log_ratio = logprob - tl.load(old_logprobs + at, mask=used, other=0.0)
    ratio = tl.exp(tl.where(used, log_ratio, 0.0).to(tl.float64)).to(tl.float32)
    policy, policy_slope, stopped = clip_term(ratio, advantage, low, high, bound)
    x = tl.zeros((BLOCK,), tl.float32)
    if KL > 0:
        x = tl.where(used, logprob - tl.load(ref_logprobs + at, mask=used, other=0.0), 0.0)
    penalty, penalty_slope = kl_term(x, KL)

    weight = tl.load(weights + at, mask=used, other=0.0)
    counts = used & (weight > 0)
    loss = tl.where(counts, (policy + beta * penalty).to(tl.float64) * weight, 0.0)
    below = ((ratio < low) & (advantage < 0)).to(tl.int32)
    above = ((ratio > high) & (advantage > 0)).to(tl.int32)
    to = sums + program
    programs = tl.num_programs(0)
    tl.store(to, tl.sum(loss, 0))
    tl.store(to + programs, tl.sum(penalty.to(tl.float64), 0))
    tl.store(to + 2 * programs, tl.sum(below, 0).to(tl.float64))
    tl.store(to + 3 * programs, tl.sum(above, 0).to(tl.float64))
    tl.store(to + 4 * programs, tl.sum(stopped.to(tl.int32), 0).to(tl.float64))
    tl.store(to + 5 * programs, largest(ratio - 1.0))
    tl.store(to + 6 * programs, largest(penalty))
    if HAS_GRADIENT:
        slope = (policy_slope + beta * penalty_slope) * weight.to(tl.float32)
        tl.store(gradient + at, tl.where(counts, slope, 0.0), mask=inside)


@triton.jit(do_not_specialize=["num_elements"])
def scale_kernel(values, factor, num_elements, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """``values *= factor``. Bytes: ``2 * itemsize`` for each element, and none when the factor is 1."""
    by = tl.load(factor).to(tl.float32)
    if by == 1:
        return
    if EVEN:
        num_elements = num_elements // 16 * 16
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    scaled = tl.load(values + at, mask=inside, other=0.0).to(tl.float32) * by
    tl.store(values + at, scaled.to(values.dtype.element_ty), mask=inside)


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
    """As `grpoforge_kernels.reference.grpo_loss.forward_backward`, for float32 log-probs."""
    tokens = (logprobs, old_logprobs, ref_logprobs, advantages, mask, weights)
    return _launch(tokens, None, clip=clip, kl=kl, beta=beta, gradient=gradient)


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
    """Sums, statistics and the gradient by the logits: three launches, each logit read twice and written once."""
    stats = row_stats(logits, ids, inv_temperature, mask=mask, softcap=softcap, scale=scale)
    together = stats.maximum.as_strided((4, len(ids)), (len(ids), 1))
    tokens = (together, old_logprobs, ref_logprobs, advantages, mask, weights)
    sums, g = _launch(tokens, inv_temperature, clip=clip, kl=kl, beta=beta, gradient=gradient)
    if g is None:
        return sums, stats, None
    no = torch.zeros_like(g)
    dlogits = row_gradient(
        logits, ids, inv_temperature, stats, g, no, no, mask=mask, softcap=softcap, scale=scale, out=out
    )
    return sums, stats, dlogits


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient`` times the scalar ``factor``, in place. The device looks at the factor, so nobody waits for it."""
    num_elements = gradient.numel()
    # Rows with gaps between them belong to somebody else's storage.
    if not num_elements or not gradient.is_contiguous():
        return gradient.mul_(factor)
    scale_kernel[(triton.cdiv(num_elements, SCALE_BLOCK),)](
        gradient,
        factor.detach().reshape(1),
        num_elements,
        EVEN=num_elements % 16 == 0,
        BLOCK=SCALE_BLOCK,
        num_warps=configs.TOKEN_WARPS,
    )
    return gradient


Tokens = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]


def _launch(
    tokens: Tokens,
    inv_temperature: Tensor | None,
    *,
    clip: ClipOptions,
    kl: KLForm | None,
    beta: float,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """``tokens`` hold log-probs, or statistics ``[4, N]`` when there is an ``inv_temperature [N]``."""
    logprobs, old_logprobs, ref_logprobs, advantages, mask, weights = tokens
    shape, device = mask.shape, mask.device
    if not mask.numel():
        empty = torch.zeros(shape, dtype=torch.float32, device=device) if gradient else None
        return torch.zeros(NUM_SUMS, dtype=torch.float64, device=device), empty
    num_programs = triton.cdiv(mask.numel(), configs.TOKEN_BLOCK)
    sums = torch.empty((NUM_SUMS, num_programs), dtype=torch.float64, device=device)
    dlogprobs = torch.empty(shape, dtype=torch.float32, device=device) if gradient else None
    strides = advantages.stride() if advantages.ndim == 2 else (0, *advantages.stride())
    token_kernel[(num_programs,)](
        logprobs.contiguous(),
        inv_temperature,
        old_logprobs.contiguous(),
        None if ref_logprobs is None else ref_logprobs.contiguous(),
        advantages,
        mask.contiguous(),
        weights.contiguous(),
        sums,
        dlogprobs,
        mask.numel(),
        shape[-1],
        *strides,
        0 if inv_temperature is None else inv_temperature.stride(0),
        1 - clip.epsilon_low,
        1 + clip.epsilon_high,
        float(clip.bound),
        float(beta),
        FROM_STATS=inv_temperature is not None,
        HAS_GRADIENT=gradient,
        KL=KL_CODES[kl],
        BLOCK=configs.TOKEN_BLOCK,
        num_warps=configs.TOKEN_WARPS,
    )
    num_added = NUM_SUMS - NUM_MAXIMA
    return torch.cat([sums[:num_added].sum(dim=1), sums[num_added:].amax(dim=1)]), dlogprobs
