"""Losses: the gradient at ratio 1, and what becomes of it as the policy moves away from the one that sampled.

Completions of three tokens are sampled from the old policy. The policy lies at a distance, the gap, half along its own
gradient (what earlier updates on the same completions do) and half in another direction. There the expected gradient
of the loss is compared with the gradient of the expected reward of the policy as it is now. Every completion is
enumerated; only a loss that looks at the whole minibatch is asked about sampled ones.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpoforge.contracts import loss_of
from grpoforge.lab.moments import Estimate, backward, compare
from grpoforge.lab.policies import SoftmaxPolicy, completions, random_policy
from grpoforge.objective import coupling_of
from grpoforge.registry import Component
from grpoforge.testing.kit import Broken, foreign
from grpoforge.types import LossInputs

VOCABULARY, LENGTH = 3, 3
GAPS = (0.0, 0.1, 0.3, 1.0)
"""Root mean square of a token's log-ratio, to first order."""
MINIBATCH = 16
"""Rows of a sampled minibatch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRow:
    """What is known of one loss."""

    id: str
    name: str
    is_sampled: bool
    """True where it looks at the whole minibatch, so that completions cannot be enumerated one by one."""
    at_ratio_1: float
    """The most that the gradient of a token's log-prob differs from ``-A`` at ratio 1."""
    gaps: tuple[Estimate, ...]
    """At each of `GAPS`: the policy gradient against that of the expected reward, both of the current policy."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The policy that sampled, the policy now, and what completions are worth."""

    old: SoftmaxPolicy
    policy: SoftmaxPolicy
    advantages: Tensor
    """``[N]`` float64: mean 0 and variance 1 under ``old``."""

    @property
    def true(self) -> Tensor:
        """The gradient of the expected advantage by the logits of ``policy``, ``[D]``."""
        return self.policy.slope_of_mean(self.advantages)

    @property
    def divergence(self) -> float:
        """KL(old || policy) of whole completions, in nats."""
        return float(self.old.probabilities @ (self.old.logprobs - self.policy.logprobs).sum(dim=1))


@functools.cache
def at_gap(size: float) -> Gap:
    """The setting at a gap of ``size``, one of `GAPS` or any other; always the same."""
    space = completions(VOCABULARY, LENGTH)
    old = random_policy(space, 4)
    rewards = torch.rand(len(space.tokens), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights = old.probabilities
    centered = rewards - weights @ rewards
    advantages = centered / (weights @ centered.square()).sqrt()
    other = random_policy(space, 6).logits.flatten()
    direction = sum(_unit(old, one) for one in (old.slope_of_mean(advantages), other))
    assert isinstance(direction, Tensor)
    direction = _unit(old, direction).reshape(old.logits.shape)
    return Gap(old=old, policy=old.moved(direction, size), advantages=advantages)


def _unit(policy: SoftmaxPolicy, direction: Tensor) -> Tensor:
    """``direction [D]``, scaled to move log-probs of tokens by 1 in the mean square, to first order."""
    squares = (policy.scores @ direction).square().mean(dim=1)
    return direction / (policy.probabilities @ squares).sqrt()


def measure_loss(component: Component, options: Mapping[str, Any], *, samples: int, seed: int) -> LossRow:
    """What the loss ``component`` is worth with ``options``; sampled where it looks at the whole minibatch.

    Raises:
        Broken: it raised, or returned what cannot be used.
    """
    with foreign():
        is_sampled = coupling_of(component.build(options)) == "batch"
    estimates = []
    for size in GAPS:
        gap = at_gap(size)
        if is_sampled:
            estimates.append(by_samples(component, options, gap, samples=samples, seed=seed))
        else:
            weights, every = gap.old.probabilities, torch.arange(len(gap.advantages))
            estimates.append(compare(weights, policy_gradients(component, options, gap, every), gap.true))
    return LossRow(
        id=component.id,
        name=component.name,
        is_sampled=is_sampled,
        at_ratio_1=at_ratio_1(component, options),
        gaps=tuple(estimates),
    )


def at_ratio_1(component: Component, options: Mapping[str, Any]) -> float:
    """The largest difference of a token's gradient from ``-A`` where policy and old policy are one."""
    gap = at_gap(0.0)
    slopes = token_slopes(component, options, gap, torch.arange(len(gap.advantages)))
    return float((slopes + gap.advantages[:, None]).abs().max())


def by_samples(component: Component, options: Mapping[str, Any], gap: Gap, *, samples: int, seed: int) -> Estimate:
    """The gradient of ``samples`` minibatches of `MINIBATCH` rows, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(gap.old.probabilities, samples * MINIBATCH, replacement=True, generator=generator)
    batches = drawn.reshape(samples, MINIBATCH)
    gradients = [
        policy_gradients(component, options, gap, rows, seed=number).mean(dim=0) for number, rows in enumerate(batches)
    ]
    weights = torch.full((samples,), 1 / samples, dtype=torch.float64)
    return compare(weights, torch.stack(gradients), gap.true, num_rows=MINIBATCH, num_samples=samples)


def with_exact_ratio(gap: Gap) -> Estimate:
    """The estimate without bias: the score of a completion times its advantage and its ratio, nothing clipped."""
    ratio = gap.policy.probabilities / gap.old.probabilities
    gradients = (ratio * gap.advantages)[:, None] * gap.policy.sequence_scores
    return compare(gap.old.probabilities, gradients, gap.true)


def policy_gradients(
    component: Component, options: Mapping[str, Any], gap: Gap, rows: Tensor, *, seed: int = 0
) -> Tensor:
    """Minus the gradient of the summed loss of each of ``rows [b]`` by the logits, ``[b, D]``."""
    slopes = token_slopes(component, options, gap, rows, seed=seed)
    return -torch.einsum("bt,btd->bd", slopes, gap.policy.scores[rows])


def token_slopes(component: Component, options: Mapping[str, Any], gap: Gap, rows: Tensor, *, seed: int = 0) -> Tensor:
    """The gradient of the summed loss of the completions ``rows [b]`` by the log-prob of each token, ``[b, T]``.

    Raises:
        Broken: it raised, or a value is not finite.
    """
    logprobs, old = gap.policy.logprobs[rows].requires_grad_(), gap.old.logprobs[rows]
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        sampling_logprobs=old.clone(),
        advantages=gap.advantages[rows, None].expand_as(old).clone(),
        completion_mask=gap.policy.space.mask[rows],
        entropy=gap.policy.entropy[rows],
        seed=seed,
    )
    with foreign():
        per_token_loss, _ = loss_of(component.build(options), inputs)
        slopes = backward(per_token_loss.sum(), logprobs)
    if not bool(per_token_loss.isfinite().all()):
        raise Broken("a value is not finite")
    return slopes
