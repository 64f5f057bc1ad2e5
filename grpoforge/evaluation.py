"""Measuring a policy on problems it is never trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpoforge.collate import split
from grpoforge.distributed import Workers
from grpoforge.metrics import Totals, averages, rollout_totals
from grpoforge.policy import Policy
from grpoforge.scoring import BoundReward, ErrorPolicy, score
from grpoforge.seeds import mix
from grpoforge.types import Prompt, Rollouts, Sampler, Scores

KEPT = ("completions/mean_length", "completions/clipped_ratio", "reward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is measured, on which problems."""

    prompts: Sequence[Prompt]
    sampler: Sampler
    rewards: Sequence[BoundReward]
    """Scored and reported; one of them is called ``correctness``."""
    correctness: str
    """Name of the reward that is 1 where a completion is right."""
    samples: int
    """Completions per problem drawn as in training, beside the greedy one."""
    batch_size: int
    """Completions decoded at a time."""
    seed: int
    workers: Workers
    on_reward_error: ErrorPolicy
    reward_time_limit: float

    def measure(self, policy: Policy) -> dict[str, float]:
        """``eval_pass@1`` (greedy), ``eval_mean@K`` (sampled), lengths and every reward's mean.

        The same policy gives the same figures at every call: sampled completions have a seed of their own.
        """
        totals = self._totals(lambda part, _: self.sampler.greedy(policy, part), 1, "eval_pass@1", "eval_")
        if self.samples:
            sample = self.sampler.sample
            totals |= self._totals(
                lambda part, seed: sample(policy, part, self.samples, seed),
                self.samples,
                f"eval_mean@{self.samples}",
                "eval_sampled_",
            )
        return averages(self.workers.sum_totals(totals))

    def _totals(
        self, draw: Callable[[Sequence[Prompt], int], Rollouts], group_size: int, headline: str, prefix: str
    ) -> Totals:
        mine, counted = self.prompts[self.workers.rank :: self.workers.size], 1
        if not mine:
            # Sums over ranks go name by name: a rank without problems measures one, and counts it 0 times.
            mine, counted = self.prompts[:1], 0
        totals: Totals = {}
        for number, rows in enumerate(split(len(mine), max(self.batch_size // group_size, 1))):
            rollouts = draw(mine[rows], mix(self.seed, number, self.workers.rank))
            scores = score(rollouts, self.rewards, on_error=self.on_reward_error, time_limit=self.reward_time_limit)
            for name, (total, count) in self._part(rollouts, scores, headline, prefix).items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + counted * total, before[1] + counted * count)
        return totals

    def _part(self, rollouts: Rollouts, scores: Scores, headline: str, prefix: str) -> Totals:
        """Totals of one batch of problems. A completion that was not scored counts as wrong in the headline."""
        right = scores.raw[:, :, scores.names.index(self.correctness)] >= 1.0
        measured = rollout_totals(rollouts, scores)
        means = {name for name in measured if name in KEPT or (name.startswith("rewards/") and name.endswith("/mean"))}
        return {headline: (float(right.sum()), float(right.numel()))} | {
            prefix + name: measured[name] for name in sorted(means)
        }
