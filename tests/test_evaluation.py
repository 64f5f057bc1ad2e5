"""Measuring: what counts as right, over which problems, under which names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from grpoforge.distributed import Workers
from grpoforge.evaluation import Evaluation
from grpoforge.metrics import Totals
from grpoforge.policy import Policy
from grpoforge.scoring import BoundReward
from grpoforge.types import PolicyView, Prompt, Rollouts
from grpoforge_plugins.samplers.hf import HFSampler


class Echo:
    """Answers every prompt with its own tokens; sampled answers say them twice."""

    def __init__(self, make_rollouts: Callable[..., Rollouts]) -> None:
        self.make_rollouts = make_rollouts
        self.seeds: list[int] = []
        self.sizes: list[int] = []

    def greedy(self, policy: PolicyView, prompts: Sequence[Prompt]) -> Rollouts:
        self.sizes.append(len(prompts))
        ids = [list(prompt.token_ids) for prompt in prompts]
        return self.make_rollouts(ids, [[one] for one in ids])

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
        self.seeds.append(seed)
        ids = [list(prompt.token_ids) for prompt in prompts]
        return self.make_rollouts(ids, [[one * 2] * group_size for one in ids])

    def sync(self, policy: PolicyView) -> None: ...


class Pretend(Workers):
    """One of several processes, with the sums of all of them."""

    def sum_totals(self, totals: Totals) -> Totals:
        return totals


def starts_with_a(completions: Sequence[str]) -> list[float | None]:
    """1.0 for ``a...``, not scored for ``z...``."""
    return [None if text.startswith("v") else float(text.startswith("a")) for text in completions]


def length(completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def prompts(make_prompts: Callable[..., tuple[Prompt, ...]]) -> tuple[Prompt, ...]:
    return make_prompts([[2, 3], [3], [2], [23, 4], [2, 2, 2]])  # ab, b, a, v (not scored), aaa


@pytest.fixture
def make_evaluation(prompts: tuple[Prompt, ...], make_rollouts: Callable[..., Rollouts]) -> Callable[..., Evaluation]:
    def build(**changes: Any) -> Evaluation:
        parts: dict[str, Any] = {
            "prompts": prompts,
            "sampler": Echo(make_rollouts),
            "rewards": [
                BoundReward(name="right", function=starts_with_a, data=("completions",), weight=1.0),
                BoundReward(name="length", function=length, data=("completions",), weight=0.1),
            ],
            "correctness": "right",
            "samples": 0,
            "batch_size": 2,
            "seed": 3,
            "workers": Workers(),
            "on_reward_error": "stop",
            "reward_time_limit": 60.0,
        }
        return Evaluation(**(parts | changes))

    return build


def test_greedy_figures(make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]) -> None:
    evaluation = make_evaluation()
    found = evaluation.measure(tiny_policy())
    assert found == pytest.approx(
        {
            "eval_pass@1": 3 / 5,  # the completion that was not scored counts as wrong
            "eval_rewards/right/mean": 3 / 4,  # over the scored ones
            "eval_rewards/length/mean": (2 + 1 + 1 + 2 + 3) / 5,
            "eval_reward": (1.2 + 0.1 + 1.1 + 0.2 + 1.3) / 5,
            "eval_completions/mean_length": 9 / 5,
            "eval_completions/clipped_ratio": 1.0,
        }
    )
    assert evaluation.sampler.sizes == [2, 2, 1]  # type: ignore[attr-defined]


def test_sampled_figures_stand_beside_the_greedy_ones(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]
) -> None:
    found = make_evaluation(samples=4).measure(tiny_policy())
    assert found["eval_pass@1"] == found["eval_mean@4"] == 3 / 5
    assert found["eval_rewards/length/mean"] == 9 / 5
    assert found["eval_sampled_rewards/length/mean"] == 18 / 5


def test_samples_have_the_same_seeds_at_every_call(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]
) -> None:
    evaluation = make_evaluation(samples=1)
    for _ in range(2):
        evaluation.measure(tiny_policy())
    seeds = evaluation.sampler.seeds  # type: ignore[attr-defined]
    assert len(seeds) == 6 and seeds[:3] == seeds[3:] and len(set(seeds)) == 3


def test_a_real_policy_measured_twice_gives_the_same_figures(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]
) -> None:
    evaluation = make_evaluation(sampler=HFSampler(max_completion_length=4), samples=2)
    policy = tiny_policy()
    assert evaluation.measure(policy) == evaluation.measure(policy)


def test_processes_share_the_problems(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]
) -> None:
    parts = [make_evaluation(workers=Pretend(rank, 2)).measure(tiny_policy()) for rank in (0, 1)]
    # Rank 0 has ab, a, aaa; rank 1 has b, v.
    assert [part["eval_pass@1"] for part in parts] == [1.0, 0.0]


def test_a_process_without_problems_reports_the_same_names(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy], prompts: tuple[Prompt, ...]
) -> None:
    # Sums over processes are taken name by name: a process with other names would hang the others.
    few = {"prompts": prompts[:1], "samples": 1}
    names = [set(make_evaluation(workers=Pretend(rank, 2), **few).measure(tiny_policy())) for rank in (0, 1)]
    assert names[0] == names[1]
