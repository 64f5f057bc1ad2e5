"""Straight-through estimators: the value of one, the gradient of k2 (verl's names with a ``+``).

What is shown is an unbiased KL, what is differentiated is ``x^2 / 2``, whose expected gradient on-policy is that of the
reverse KL exactly (2506.09477).
"""

from __future__ import annotations

from torch import Tensor

from grpoforge.declarations import declares
from grpoforge_plugins.kl.schulman import Clamp, k1, k2, k3


@declares(unbiased=True, right_in_reward=True)
def k1_plus(logprobs: Tensor, ref_logprobs: Tensor, *, clamp: Clamp = None) -> Tensor:
    """Value of k1, gradient of k2: on-policy the reverse KL in both. ``clamp`` bounds the value, never the gradient.

    Off-policy both are biased: see ``k1_corrected``.
    """
    return _straight_through(k1(logprobs, ref_logprobs, clamp=clamp), k2(logprobs, ref_logprobs))


@declares(unbiased=True)
def k3_plus(logprobs: Tensor, ref_logprobs: Tensor, *, clamp: Clamp = None) -> Tensor:
    """Value of k3, gradient of k2: on-policy the reverse KL in both. ``clamp`` bounds the value, never the gradient.

    verl's ``k3+`` is ``clamp: [20, 10]``. Off-policy the gradient is biased: see ``k3_corrected``.
    """
    return _straight_through(k3(logprobs, ref_logprobs, clamp=clamp), k2(logprobs, ref_logprobs))


def _straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    # The gradient's term is exactly 0 (a - a), so the value keeps its digits.
    return value.detach() + (gradient - gradient.detach())
