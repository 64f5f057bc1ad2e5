"""Estimators times the differentiable ratio to the policy that sampled: right as value and as gradient, off-policy too.

``x = log pi(token) - log pi_ref(token)``, ``r = pi(token) / mu(token)``, ``mu`` the policy that sampled. Because
``E_mu[r f] = E_pi[f]`` and ``r`` is differentiated, the gradient of the estimate is an estimate of the gradient of
``E_pi[f]``: that of the reverse KL, since ``f`` is unbiased (DeepSeek-V3.2, 2512.02556; 2506.09477). Off-policy
the variance is that of ``r``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor

from grpoforge.declarations import declares

Behavior = Annotated[
    Literal["sampling", "old"],
    "whose log-probs stand for the policy that sampled: the sampler's report, or those recomputed before the update",
]


@declares(unbiased=True, right_in_reward=True)
def k1_corrected(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    *,
    behavior: Behavior = "sampling",
) -> Tensor:
    """``r x``: unbiased, and its expected gradient is that of the reverse KL exactly, on- and off-policy.

    At ``r = 1`` the weight of a token's gradient is ``x + 1``; the 1 has zero mean and adds variance, so
    ``k3_corrected`` is the calmer one. open-instruct's estimator 3 (there with x clamped to 40).
    """
    behavior_logprobs = sampling_logprobs if behavior == "sampling" else old_logprobs
    return (logprobs - behavior_logprobs).exp() * (logprobs - ref_logprobs)


@declares(unbiased=True)
def k3_corrected(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    *,
    behavior: Behavior = "sampling",
) -> Tensor:
    """``r (exp(-x) + x - 1)``: unbiased, non-negative; its expected gradient is that of the reverse KL, off-policy too.

    DeepSeek-V3.2 (2512.02556). At ``r = 1`` the weight of a token's gradient is ``x``, as in ``k2``. The exact ratio is
    the one to the sampler's own log-probs (the default); TRL (``use_bias_correction_kl``) and slime
    (``--use-unbiased-kl``, which also bounds the result by 10) take ``behavior: old``, exact where trainer and sampler
    agree.
    """
    behavior_logprobs = sampling_logprobs if behavior == "sampling" else old_logprobs
    difference = logprobs - ref_logprobs
    ratio = (logprobs - behavior_logprobs).exp()
    estimate = (ratio * ((-difference).expm1() + difference)).detach()
    # r exp(-x) = pi_ref / mu is constant. Differentiated as a product it leaves two terms of the size of exp(-x) that
    # cancel, in float32 not below x = -15: so the gradient is taken of what is left, r (x - 1), and is r x exactly.
    differentiable = ratio * (difference - 1.0)
    return estimate + (differentiable - differentiable.detach())
