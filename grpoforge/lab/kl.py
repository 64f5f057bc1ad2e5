"""KL estimators: is the value the KL, and of what is the gradient the gradient? By enumeration, without sampling error.

One token first, sampled from the policy (on-policy) and from another one (off-policy): the identities of 2506.09477.
Then completions of two tokens, on-policy, where a token changes the KL of the token after it: put into the loss token
by token no estimator knows of that; put into the reward, and so multiplied with the score of the whole completion, it
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grpoforge.binding import bind
from grpoforge.contracts import kl_of
from grpoforge.lab.moments import Estimate, backward, compare, distance, mean_and_variance
from grpoforge.lab.policies import SoftmaxPolicy, completions, random_policy
from grpoforge.registry import Component
from grpoforge.testing.kit import Broken, foreign

VOCABULARY = 5
SAME = 1e-9
"""Relative distance below which two gradients are one."""

Direction = Literal["reverse", "forward", "zero", "neither"]
"""Whose gradient: that of KL(policy || reference), of KL(reference || policy), 0, or of no KL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OneToken:
    """An estimator on completions of one token."""

    value: float
    """Expected value, in nats."""
    bias: float
    """``value`` minus the exact KL(policy || reference)."""
    variance: float
    """Of the value."""
    gradient: Direction
    """What the expected gradient is the gradient of."""
    from_reverse: float
    """Distance of the expected gradient from that of KL(policy || reference), over the length of that."""
    from_forward: float
    """Distance of the expected gradient from that of KL(reference || policy), over the length of that."""
    gradient_variance: float
    """Summed over the components."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KLRow:
    """What is known of one KL estimator."""

    id: str
    name: str
    on_policy: OneToken
    off_policy: OneToken
    in_loss: Estimate
    """Two tokens, the estimate of each in the loss, against the gradient of the KL of whole completions."""
    in_reward: Estimate | None
    """The same with the summed estimate as (negative) reward; None where it reads whole distributions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Three policies on the same completions."""

    policy: SoftmaxPolicy
    reference: SoftmaxPolicy
    behavior: SoftmaxPolicy
    """The one that samples."""

    @property
    def reverse(self) -> float:
        """KL(policy || reference) of whole completions, in nats."""
        return float(self.policy.probabilities @ self._log_ratio)

    @property
    def reverse_gradient(self) -> Tensor:
        """Of `reverse` by the policy's logits, ``[D]``; the derivative of the log-prob itself has mean 0."""
        return self.policy.slope_of_mean(self._log_ratio)

    @property
    def forward_gradient(self) -> Tensor:
        """Of KL(reference || policy) by the policy's logits, ``[D]``."""
        return -self.reference.probabilities @ self.policy.sequence_scores

    @property
    def _log_ratio(self) -> Tensor:
        return (self.policy.logprobs - self.reference.logprobs).sum(dim=1)


def setting(length: int, *, on_policy: bool) -> Setting:
    """The policies that are measured on, on completions of ``length`` tokens; always the same."""
    space = completions(VOCABULARY, length)
    policy = random_policy(space, 1)
    behavior = policy if on_policy else random_policy(space, 3)
    return Setting(policy=policy, reference=random_policy(space, 2), behavior=behavior)


def measure_kl(component: Component, options: Mapping[str, Any]) -> KLRow:
    """What the KL estimator ``component`` is worth with ``options``.

    Raises:
        Broken: it raised, or returned what cannot be used.
    """
    two_tokens = setting(2, on_policy=True)
    values, gradients = evaluate(component, options, two_tokens)
    sums, policy, true = values.sum(dim=1), two_tokens.policy, two_tokens.reverse_gradient
    credited = (sums - policy.probabilities @ sums)[:, None] * policy.sequence_scores
    return KLRow(
        id=component.id,
        name=component.name,
        on_policy=one_token(component, options, setting(1, on_policy=True)),
        off_policy=one_token(component, options, setting(1, on_policy=False)),
        in_loss=compare(policy.probabilities, gradients, true),
        in_reward=None if _reads_distributions(component) else compare(policy.probabilities, credited, true),
    )


def one_token(component: Component, options: Mapping[str, Any], where: Setting) -> OneToken:
    """Expected value and gradient of the estimator, and their variances, over one token of ``where.behavior``."""
    values, gradients = evaluate(component, options, where)
    weights = where.behavior.probabilities
    value = float(weights @ values[:, 0])
    mean, gradient_variance = mean_and_variance(weights, gradients)
    return OneToken(
        value=value,
        bias=value - where.reverse,
        variance=float(weights @ (values[:, 0] - value).square()),
        gradient=direction(mean, where),
        from_reverse=distance(mean, where.reverse_gradient),
        from_forward=distance(mean, where.forward_gradient),
        gradient_variance=gradient_variance,
    )


def direction(mean: Tensor, where: Setting) -> Direction:
    """What ``mean [D]`` is the gradient of."""
    if distance(mean, where.reverse_gradient) <= SAME:
        return "reverse"
    if distance(mean, where.forward_gradient) <= SAME:
        return "forward"
    return "zero" if float(mean.norm() / where.reverse_gradient.norm()) <= SAME else "neither"


def evaluate(component: Component, options: Mapping[str, Any], where: Setting) -> tuple[Tensor, Tensor]:
    """The estimate at every token of every completion, ``[N, T]``, and the gradient of their sum, ``[N, D]``."""
    if _reads_distributions(component):
        return _evaluate_whole(component, options, where)
    policy, sampled = where.policy, where.behavior.logprobs
    logprobs = policy.logprobs.clone().requires_grad_()
    data = {
        "logprobs": logprobs,
        "ref_logprobs": where.reference.logprobs.clone(),
        "old_logprobs": sampled.clone(),
        "sampling_logprobs": sampled.clone(),
        "completion_mask": policy.space.mask.clone(),
    }
    with foreign():
        values = kl_of(bind("kl", component.build(options)), data, policy.space.mask.shape)
        slopes = backward(values.sum(), logprobs)
    return _finite(values), torch.einsum("nt,ntd->nd", slopes, policy.scores)


def _evaluate_whole(component: Component, options: Mapping[str, Any], where: Setting) -> tuple[Tensor, Tensor]:
    """As `evaluate`, of an estimator of whole distributions: one value for each state that a completion visits."""
    policy, states = where.policy, where.policy.space.states
    shape = (*states.shape, policy.space.vocabulary)
    flat = policy.distributions[states.flatten()].requires_grad_()
    data = {"distribution": flat, "ref_distribution": where.reference.distributions[states.flatten()]}
    with foreign():
        values = kl_of(bind("kl", component.build(options)), data, (states.numel(),))
        slopes = backward(values.sum(), flat).reshape(shape)
    probabilities = policy.distributions.exp()[states]
    by_logits = slopes - slopes.sum(dim=2, keepdim=True) * probabilities
    at_state = torch.nn.functional.one_hot(states, policy.space.num_states).double()
    return _finite(values).reshape(states.shape), torch.einsum("nts,ntv->nsv", at_state, by_logits).flatten(1)


def _reads_distributions(component: Component) -> bool:
    return any(one.name.endswith("distribution") for one in component.data)


def _finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise Broken("a value is not finite")
    return values.detach().double()
