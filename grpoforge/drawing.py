"""Prompts to scored rollouts. With dynamic sampling, prompts whose completions all scored alike are drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpoforge.metrics import Totals
from grpoforge.policy import Policy
from grpoforge.scoring import BoundReward, ErrorPolicy, score
from grpoforge.seeds import mix
from grpoforge.types import Prompt, Rollouts, Sampler, Scores, rounding

MorePrompts = Callable[[int], Sequence[Prompt]]
"""The prompts of extra draw 1, 2, ... of a step; none when there are no more."""

Lap = Callable[[str], None]
"""Charges the time since the last call to a phase of the step."""


def no_more(draw: int) -> Sequence[Prompt]:
    """No extra prompts."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How completions are drawn and scored."""

    sampler: Sampler
    rewards: Sequence[BoundReward]
    group_size: int
    """Completions per prompt, ``G``."""
    max_extra_draws: int
    """Further draws that may replace groups without a difference in reward; 0 keeps every group."""
    on_reward_error: ErrorPolicy
    reward_time_limit: float

    def __call__(
        self, policy: Policy, prompts: Sequence[Prompt], more: MorePrompts, seed: int, lap: Lap
    ) -> tuple[Rollouts, Scores, Totals]:
        """``P`` groups with their scores, and what drawing them took.

        Dynamic sampling (DAPO, 2503.14476): groups that all score alike give no gradient; other prompts are drawn
        until ``P`` groups differ within, or the draws are used up and such groups fill what is missing.

        Raises:
            RewardError: a reward broke its contract.
        """
        rollouts, scores = self.once(policy, prompts, seed, lap)
        wanted, draws = len(prompts), 1
        while draws <= self.max_extra_draws and int(informative(scores).sum()) < wanted:
            others = more(draws)
            if not others:
                break
            rollouts, scores = join((rollouts, scores), self.once(policy, others, mix(seed, draws), lap))
            draws += 1
        if self.max_extra_draws == 0:
            return rollouts, scores, {}
        kept = informative(scores)
        order = kept.logical_not().long().argsort(stable=True)[:wanted].sort().values
        totals: Totals = {
            "dynamic_sampling/draws": (float(draws), 1.0),
            "dynamic_sampling/kept": (float(kept.sum()), float(len(kept))),
        }
        return *select((rollouts, scores), order), totals

    def once(self, policy: Policy, prompts: Sequence[Prompt], seed: int, lap: Lap) -> tuple[Rollouts, Scores]:
        """One group per prompt, scored."""
        rollouts = self.sampler.sample(policy, prompts, self.group_size, seed)
        lap("rollout")
        limit = self.reward_time_limit
        scores = score(rollouts, self.rewards, on_error=self.on_reward_error, time_limit=limit)
        lap("reward")
        return rollouts, scores


def informative(scores: Scores) -> Tensor:
    """Groups with two scored completions whose totals differ by more than rounding, ``[P]`` bool."""
    total = scores.total()
    scored = ~total.isnan()
    highest = total.masked_fill(~scored, -torch.inf).amax(dim=1)
    lowest = total.masked_fill(~scored, torch.inf).amin(dim=1)
    differ = highest - lowest > 2 * rounding(scores.rewards, scores.weights).squeeze(1)
    return differ & (scored.sum(dim=1) >= 2)


def select(drawn: tuple[Rollouts, Scores], order: Tensor) -> tuple[Rollouts, Scores]:
    """The groups at ``order``."""
    rollouts, scores = drawn
    groups = order.tolist()
    return (
        Rollouts(
            prompts=tuple(rollouts.prompts[group] for group in groups),
            completions=tuple(rollouts.completions[group] for group in groups),
            max_completion_length=rollouts.max_completion_length,
        ),
        _with_values(scores, scores.rewards[order], scores.raw[order], scores.seconds),
    )


def join(first: tuple[Rollouts, Scores], second: tuple[Rollouts, Scores]) -> tuple[Rollouts, Scores]:
    """The groups of both draws, in order."""
    (rollouts, scores), (more_rollouts, more_scores) = first, second
    seconds = tuple(a + b for a, b in zip(scores.seconds, more_scores.seconds, strict=True))
    return (
        Rollouts(
            prompts=rollouts.prompts + more_rollouts.prompts,
            completions=rollouts.completions + more_rollouts.completions,
            max_completion_length=rollouts.max_completion_length,
        ),
        _with_values(
            scores,
            torch.cat([scores.rewards, more_scores.rewards]),
            torch.cat([scores.raw, more_scores.raw]),
            seconds,
        ),
    )


def with_penalty(scores: Scores, name: str, penalty: Tensor, coefficient: float) -> Scores:
    """``scores`` with one more reward ``name``: ``penalty [P, G]``, weighted by ``-coefficient``.

    A row that no reward scored stays unscored.
    """
    column = torch.where(scores.total().isnan(), torch.full_like(penalty, torch.nan), penalty)[:, :, None]
    return Scores(
        names=(*scores.names, name),
        rewards=torch.cat([scores.rewards, column], dim=2),
        raw=torch.cat([scores.raw, column], dim=2),
        weights=torch.cat([scores.weights, scores.weights.new_tensor([-coefficient])]),
        seconds=(*scores.seconds, 0.0),
    )


def _with_values(scores: Scores, rewards: Tensor, raw: Tensor, seconds: tuple[float, ...]) -> Scores:
    return Scores(names=scores.names, rewards=rewards, raw=raw, weights=scores.weights, seconds=seconds)
