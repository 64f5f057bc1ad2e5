"""Measuring a policy on problems it is never trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grpoforge.collate import split
from grpoforge.declarations import declared
from grpoforge.distributed import Workers
from grpoforge.errors import RewardError, first_line
from grpoforge.metrics import Totals, averages, rollout_totals
from grpoforge.outcomes import Attempt, Outcome, Reader, attempt, describe_problem, figures
from grpoforge.policy import Policy
from grpoforge.scoring import BUILTIN_DATA, BoundReward, ErrorPolicy, score
from grpoforge.seeds import mix
from grpoforge.types import Prompt, Rollouts, Sampler, Scores

logger = logging.getLogger(__name__)

KEPT = ("completions/mean_length", "completions/clipped_ratio", "reward")


@dataclass(frozen=True, slots=True)
class Measured:
    """What `Evaluation.examine` found."""

    metrics: dict[str, float]
    """Over the problems of all ranks."""
    outcomes: tuple[Outcome, ...]
    """Of this rank's problems."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is measured, on which problems."""

    prompts: Sequence[Prompt]
    question: str
    """Column of the dataset that holds the question."""
    sampler: Sampler
    rewards: Sequence[BoundReward]
    """Scored and reported; one of them is called ``correctness``."""
    correctness: str
    """Name of the reward that is 1 where a completion is right."""
    samples: int
    """Completions per problem drawn as in training, beside the greedy one."""
    ks: Sequence[int]
    """The ``k`` of pass@k and maj@k, at most ``samples``."""
    batch_size: int
    """Completions decoded at a time."""
    seed: int
    workers: Workers
    on_reward_error: ErrorPolicy
    reward_time_limit: float

    def measure(self, policy: Policy) -> dict[str, float]:
        """The metrics: see `grpoforge.outcomes.figures`; lengths, answers that cannot be read, every reward's mean.

        The same policy gives the same figures at every call and on any number of ranks: sampled completions have a
        seed of their own.
        """
        return self.examine(policy).metrics

    def examine(self, policy: Policy) -> Measured:
        """The metrics, and what became of every problem."""
        blocks = self._blocks()[self.workers.rank :: self.workers.size]
        # Sums over ranks go name by name: a rank without problems measures one, and counts it 0 times.
        counted = 1 if blocks else 0
        blocks = blocks or [(0, self.prompts[:1])]
        problems = [prompt for _, block in blocks for prompt in block]
        greedy, measured = self._attempts(self._greedy(policy, problems), "eval_")
        samples: list[tuple[Attempt, ...]] = [()] * len(problems)
        if self.samples:
            samples, more = self._attempts(self._sampled(policy, blocks), "eval_sampled_")
            measured |= more
        outcomes = tuple(
            Outcome(**self.describe(prompt), greedy=first, samples=rest)
            for prompt, (first,), rest in zip(problems, greedy, samples, strict=True)
        )
        totals: Totals = {}
        for outcome in outcomes:
            _add(totals, {name: (value, 1.0) for name, value in self.figures_of(outcome).items()})
        totals = {name: (counted * total, counted * count) for name, (total, count) in (totals | measured).items()}
        return Measured(averages(self.workers.sum_totals(totals)), outcomes if counted else ())

    def describe(self, prompt: Prompt) -> dict[str, Any]:
        """The fields of an `Outcome` that say which problem it is."""
        gold = [name for name in self._correctness.data if name not in BUILTIN_DATA]
        return describe_problem(prompt, self.question, gold)

    def figures_of(self, outcome: Outcome) -> dict[str, float]:
        """The headline metrics of one problem."""
        return figures(outcome, self.ks, votes=self.reads_answers)

    @property
    def reads_answers(self) -> bool:
        """Whether the correctness reward declares ``answer_of``."""
        return declared(self._correctness.function, "answer_of") is not None

    @property
    def _correctness(self) -> BoundReward:
        return next(reward for reward in self.rewards if reward.name == self.correctness)

    def _blocks(self) -> list[tuple[int, Sequence[Prompt]]]:
        """The problems, numbered, as they are sampled at a time: what is drawn depends on nothing else."""
        size = max(self.batch_size // self.samples, 1) if self.samples else 1
        return [(number, self.prompts[rows]) for number, rows in enumerate(split(len(self.prompts), size))]

    def _greedy(self, policy: Policy, problems: Sequence[Prompt]) -> Iterator[Rollouts]:
        for rows in split(len(problems), self.batch_size):
            yield self.sampler.greedy(policy, problems[rows])

    def _sampled(self, policy: Policy, blocks: Sequence[tuple[int, Sequence[Prompt]]]) -> Iterator[Rollouts]:
        for number, block in blocks:
            yield self.sampler.sample(policy, block, self.samples, mix(self.seed, number))

    def _attempts(self, draws: Iterator[Rollouts], prefix: str) -> tuple[list[tuple[Attempt, ...]], Totals]:
        """The attempts at each problem, and totals of lengths and rewards under names that begin with ``prefix``."""
        attempts: list[tuple[Attempt, ...]] = []
        totals: Totals = {}
        for rollouts in draws:
            scores = score(rollouts, self.rewards, on_error=self.on_reward_error, time_limit=self.reward_time_limit)
            judged = self._judge(rollouts, scores)
            measured = rollout_totals(rollouts, scores)
            _add(totals, {prefix + name: measured[name] for name in sorted(measured) if _is_kept(name)})
            if self.reads_answers:
                missing = [float(one.answer is None) for group in judged for one in group]
                _add(totals, {f"{prefix}completions/no_answer_ratio": (sum(missing), float(len(missing)))})
            attempts += judged
        return attempts, totals

    def _judge(self, rollouts: Rollouts, scores: Scores) -> list[tuple[Attempt, ...]]:
        """The attempts at each problem. A completion that was not scored counts as wrong."""
        correctness = scores.raw[:, :, scores.names.index(self.correctness)].tolist()
        read: Reader | None = self._read if self.reads_answers else None
        return [
            tuple(attempt(completion, value, read) for completion, value in zip(group, values, strict=True))
            for group, values in zip(rollouts.completions, correctness, strict=True)
        ]

    def _read(self, text: str) -> str | None:
        """What the correctness reward reads as the answer of a completion; a reward is foreign code.

        Raises:
            RewardError: it breaks its contract, unless such errors are to be skipped.
        """
        problem, answer = "", None
        try:
            answer = declared(self._correctness.function, "answer_of")(text)
        except Exception as failure:  # the boundary
            problem = f"raised {type(failure).__name__}: {first_line(failure)}"
        if isinstance(answer, str) or (answer is None and not problem):
            return answer
        error = RewardError(
            f"`answer_of` of reward `{self.correctness}` {problem or f'returned a {type(answer).__name__}'}",
            "return the answer as a string, or None",
        )
        if self.on_reward_error == "stop":
            raise error
        logger.warning("%s; the completion counts as one without an answer", error.message)
        return None


def _is_kept(name: str) -> bool:
    return name in KEPT or (name.startswith("rewards/") and name.endswith("/mean"))


def _add(totals: Totals, more: Totals) -> None:
    """Add ``more`` to ``totals``, name by name."""
    for name, (total, count) in more.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = (before[0] + total, before[1] + count)
