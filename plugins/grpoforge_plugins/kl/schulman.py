"""Schulman's three estimators ("Approximating KL divergence", 2020).

Throughout, ``x = log pi(token) - log pi_ref(token)`` and ``KL = E_pi[x]``. What an estimator is worth as a *value* and
what its gradient does as a *loss* are different questions (2506.09477); both stand below.
"""

from __future__ import annotations

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``x``: unbiased; its expected gradient as a loss is 0, so it cannot hold a policy near the reference."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``x^2 / 2``: biased value, non-negative; on-policy its expected gradient is that of the reverse KL, exactly."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """``exp(-x) + x - 1``: unbiased, non-negative; on-policy its gradient is that of the *forward* KL(ref || policy).

    The estimator of GRPO (2402.03300, equation 4).
    """
    difference = logprobs - ref_logprobs
    return (-difference).expm1() + difference
