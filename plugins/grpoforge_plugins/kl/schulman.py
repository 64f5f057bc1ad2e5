"""Schulman's estimators ("Approximating KL divergence", 2020), from the log-probs of the sampled token.

Throughout, ``x = log pi(token) - log pi_ref(token)`` and ``KL = E_pi[x]``. What an estimator is worth as a *value* and
what its gradient does as a *loss* are different questions (2506.09477); both stand below. They are about the KL at one
state: no estimate that is put into the loss token by token says how a token changes the KL of the tokens after it.

``clamp`` is ``(largest |x|, largest |value|)``. Beyond a bound the gradient is 0: what runs away is no longer held.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from torch import Tensor

from grpoforge.declarations import declares


def _positive(clamp: tuple[float, float] | None) -> tuple[float, float] | None:
    if clamp is not None and not min(clamp) > 0:
        raise ValueError("both bounds must be greater than 0")
    return clamp


Clamp = Annotated[
    tuple[float, float] | None,
    AfterValidator(_positive),
    "largest |x| before and largest |value| after the estimator; .inf for no bound",
]


@declares(unbiased=True, right_in_reward=True, kernel_form="k1")
def k1(logprobs: Tensor, ref_logprobs: Tensor, *, clamp: Clamp = None) -> Tensor:
    """``x``: unbiased, of either sign; as a loss its expected gradient on-policy is 0 (2506.09477), off-policy noise.

    It cannot hold a policy near the reference in the loss. In the reward (``kl.placement: reward``) it is the right
    choice: there the policy gradient makes the exact gradient of the reverse KL of it, the later tokens included.
    verl's ``kl`` does not clamp; OpenRLHF bounds every estimator by 10 (``clamp: [.inf, 10]``).
    """
    return _bounded(_difference(logprobs, ref_logprobs, clamp), clamp)


@declares(kernel_form="k2")
def k2(logprobs: Tensor, ref_logprobs: Tensor, *, clamp: Clamp = None) -> Tensor:
    """``x^2 / 2``: biased value, non-negative; on-policy its expected gradient is that of the reverse KL, exactly.

    The gradient that k1 seems to promise (2506.09477), at the price of a value that is the KL to second order only.
    verl's ``mse`` does not clamp.
    """
    return _bounded(0.5 * _difference(logprobs, ref_logprobs, clamp).square(), clamp)


@declares(unbiased=True, kernel_form="k3")
def k3(logprobs: Tensor, ref_logprobs: Tensor, *, clamp: Clamp = None) -> Tensor:
    """``exp(-x) + x - 1``: unbiased, non-negative; on-policy its gradient is that of the *forward* KL(ref || policy).

    The estimator of GRPO (2402.03300, equation 4). Its value is the reverse KL, its gradient as a loss is not
    (2506.09477): it covers the reference's modes, and its weight ``1 - exp(-x)`` grows exponentially on tokens that the
    policy has nearly given up. ``k2``, ``k3_plus`` and, off-policy too, ``k3_corrected`` have the gradient of the
    reverse KL. In the reward its policy gradient is that of the reverse KL minus that of the forward one: use k1 there.

    TRL does not clamp. verl (``low_var_kl``) and NeMo RL clamp x to 20 and the value to 10 (``clamp: [20, 10]``),
    open-instruct x to 40.
    """
    difference = _difference(logprobs, ref_logprobs, clamp)
    return _bounded((-difference).expm1() + difference, clamp)


def absolute(logprobs: Tensor, ref_logprobs: Tensor, *, clamp: Clamp = None) -> Tensor:
    """``|x|``: biased upward; as a loss it pulls every token toward the reference with the same force.

    Its gradient is that of no KL: sign(x), whatever the size of x; on-policy its expectation is the gradient of
    ``sum_v |pi(v) - pi_ref(v)|``, twice the total variation. verl's ``abs`` does not clamp.
    """
    return _bounded(_difference(logprobs, ref_logprobs, clamp).abs(), clamp)


def _difference(logprobs: Tensor, ref_logprobs: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    difference = logprobs - ref_logprobs
    return difference if clamp is None else difference.clamp(-clamp[0], clamp[0])


def _bounded(value: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    return value if clamp is None else value.clamp(-clamp[1], clamp[1])
