"""The fused loss in plain PyTorch: value, counts and gradient of each token by the equations of `grpo_loss`.

The gradient is written out, not left to autograd, so that it is what the other backends compute: split at ties as
``torch.minimum`` and ``torch.clamp`` split it, and 0 wherever a clip binds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from grpoforge_kernels.reference.selective_log_softmax import row_gradient, row_stats
from grpoforge_kernels.rows import RowStats, finish

if TYPE_CHECKING:
    from grpoforge_kernels.loss_options import ClipOptions, KLForm

__all__ = ["forward_backward", "from_logits", "scale_"]


class _Term(NamedTuple):
    """A term of the loss at each token, and its derivative by the log-prob."""

    value: Tensor
    slope: Tensor


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
    """Sums in the order of `GrpoLoss`, ``[7]`` float64, and the gradient by ``logprobs``, contiguous.

    Args:
        logprobs: float32 or float64, any shape; ``old_logprobs``, ``ref_logprobs`` and ``advantages`` alike.
        mask: bool; what stands elsewhere is replaced before it meets an exp.
        weights: float64.
        gradient: False returns None for it.
    """
    zero = logprobs.new_zeros(())
    advantages = torch.where(mask, advantages, zero)
    ratio = torch.where(mask, logprobs - old_logprobs, zero).exp()
    policy = _clip_term(ratio, advantages, clip)
    difference = zero if ref_logprobs is None else torch.where(mask, logprobs - ref_logprobs, zero)
    penalty = _kl_term(difference, kl)
    used = mask & (weights > 0)
    low = (ratio < 1 - clip.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + clip.epsilon_high) & (advantages > 0)
    sums = (
        torch.where(used, (policy.value + beta * penalty.value).double() * weights, 0.0).sum(),
        penalty.value.double().sum(),
        low.sum().double(),
        high.sum().double(),
        ((advantages < 0) & (ratio > clip.bound)).sum().double(),
        _largest(ratio - 1),
        _largest(penalty.value),
    )
    slope = policy.slope + beta * penalty.slope
    dlogprobs = torch.where(used, slope * weights.to(slope.dtype), zero).contiguous() if gradient else None
    return torch.stack(sums), dlogprobs


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
    """`forward_backward` of the log-probs of ``ids [N]`` under ``logits [N, V]``.

    Returns:
        The sums ``[7]``, the statistics of the rows, and the gradient by the logits ``[N, V]`` in their dtype, in
        ``out`` when given, which may be ``logits``; None when ``gradient`` is False.
    """
    stats = row_stats(logits, ids, inv_temperature, mask=mask, softcap=softcap, scale=scale)
    logprobs = finish(stats, inv_temperature).logprobs
    tokens = (logprobs, old_logprobs, ref_logprobs, advantages, mask, weights)
    sums, g = forward_backward(*tokens, clip=clip, kl=kl, beta=beta, gradient=gradient)
    if g is None:
        return sums, stats, None
    no = torch.zeros_like(g)
    dlogits = row_gradient(
        logits, ids, inv_temperature, stats, g, no, no, mask=mask, softcap=softcap, scale=scale, out=out
    )
    return sums, stats, dlogits


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """``gradient`` times the scalar ``factor``, in place; on the CPU a factor of 1 costs nothing."""
    if factor.device.type == "cpu" and factor.item() == 1:
        return gradient
    return gradient.mul_(factor)


def _clip_term(ratio: Tensor, advantages: Tensor, clip: ClipOptions) -> _Term:
    low, high = 1 - clip.epsilon_low, 1 + clip.epsilon_high
    free, held = ratio * advantages, ratio.clamp(low, high) * advantages
    # A tie gives a half of the gradient to each branch, and the clipped one passes its half on inside the range.
    share = torch.where(free == held, 0.5, (free < held).to(ratio.dtype))
    inside = ((ratio >= low) & (ratio <= high)).to(ratio.dtype)
    stopped = (advantages < 0) & (ratio > clip.bound)
    factor = torch.where(stopped, 0.0, share + (1 - share) * inside)
    value = -torch.where(stopped, clip.bound * advantages, torch.minimum(free, held))
    slope = torch.where(factor == 0, torch.zeros_like(ratio), -factor * advantages * ratio)
    return _Term(value, torch.where(value.isnan(), value, slope))


def _kl_term(difference: Tensor, kl: KLForm | None) -> _Term:
    """``k1``, ``k2`` or ``k3`` of ``difference = logprobs - ref_logprobs``; 0 for None."""
    if kl == "k1":
        return _Term(difference, torch.ones_like(difference))
    if kl == "k2":
        return _Term(0.5 * difference.square(), difference)
    if kl == "k3":
        excess = (-difference).expm1()
        return _Term(excess + difference, -excess)
    assert kl is None
    return _Term(torch.zeros_like(difference), torch.zeros_like(difference))


def _largest(values: Tensor) -> Tensor:
    """Largest absolute value, float64; 0 of nothing."""
    return values.abs().max().double() if values.numel() else values.new_zeros((), dtype=torch.float64)
