"""Drawing completions, dynamic sampling, and the KL as a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from grpoforge.drawing import Drawing, informative, with_penalty
from grpoforge.scoring import BoundReward
from grpoforge.types import PolicyView, Prompt, Rollouts, Scores

NAN = math.nan


def scores_of(totals: Sequence[Sequence[float]]) -> Scores:
    rewards = torch.tensor(totals, dtype=torch.float64)[:, :, None]
    return Scores(
        names=("r",), rewards=rewards, raw=rewards, weights=torch.ones(1, dtype=torch.float64), seconds=(0.5,)
    )


@pytest.mark.parametrize(
    ("group", "differs"),
    [
        ([0.0, 1.0, 1.0], True),
        ([1.0, 1.0, 1.0], False),
        ([1.0, 1.0, NAN], False),
        ([0.0, 1.0, NAN], True),
        ([NAN, 1.0, NAN], False),
        ([NAN, NAN, NAN], False),
        ([0.1 + 0.2, 0.3, 0.3], False),  # rounding is no difference
    ],
)
def test_groups_that_differ_within(group: list[float], differs: bool) -> None:
    assert informative(scores_of([group, [5.0, 5.0, 6.0]])).tolist() == [differs, True]


class ByPrompt:
    """Completions that say their prompt's number; the second of a prompt above ``same`` differs."""

    def __init__(self, make_rollouts: Callable[..., Rollouts], same: int) -> None:
        self.make_rollouts, self.same = make_rollouts, same
        self.seeds: list[int] = []

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
        self.seeds.append(seed)
        numbers = [prompt.token_ids[0] for prompt in prompts]
        return self.make_rollouts([[n] for n in numbers], [[[n], [n + (n > self.same)]] for n in numbers])


def draw(
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    first: list[int],
    more: dict[int, list[int]],
    *,
    most: int,
) -> tuple[list[int], dict[str, Any], list[int], list[str]]:
    """Numbers of the groups kept, what drawing took, the seeds used, the phases timed."""
    sampler = ByPrompt(make_rollouts, same=10)
    number = BoundReward(
        name="n",
        function=lambda completion_ids: [ids[0] for ids in completion_ids],
        data=("completion_ids",),
        weight=1.0,
    )
    drawing = Drawing(
        sampler=sampler,  # type: ignore[arg-type]
        rewards=[number],
        group_size=2,
        max_extra_draws=most,
        on_reward_error="stop",
        reward_time_limit=60.0,
    )
    laps: list[str] = []
    policy: Any = None
    rollouts, scores, totals = drawing(
        policy,
        make_prompts([[n] for n in first]),
        lambda number: make_prompts([[n] for n in more.get(number, [])]),
        7,
        laps.append,
    )
    assert [group[0].token_ids[0] for group in rollouts.completions] == scores.raw[:, 0, 0].tolist()
    return [prompt.token_ids[0] for prompt in rollouts.prompts], totals, sampler.seeds, laps


def test_without_dynamic_sampling_one_draw_is_kept_as_it_is(
    make_rollouts: Callable[..., Rollouts], make_prompts: Callable[..., tuple[Prompt, ...]]
) -> None:
    kept, totals, seeds, laps = draw(make_rollouts, make_prompts, [3, 12], {1: [14, 15]}, most=0)
    assert (kept, totals, seeds, laps) == ([3, 12], {}, [7], ["rollout", "reward"])


def test_groups_that_score_alike_are_replaced(
    make_rollouts: Callable[..., Rollouts], make_prompts: Callable[..., tuple[Prompt, ...]]
) -> None:
    kept, totals, seeds, _ = draw(make_rollouts, make_prompts, [3, 12, 4], {1: [5, 13, 6], 2: [14, 15, 16]}, most=5)
    assert kept == [12, 13, 14], "in the order drawn, and no more than asked for"
    assert totals["dynamic_sampling/draws"] == (3.0, 1.0)
    assert totals["dynamic_sampling/kept"] == (5.0, 9.0)
    assert len(set(seeds)) == 3, "every draw has a seed of its own"


def test_when_the_draws_are_used_up_groups_that_score_alike_fill_the_batch(
    make_rollouts: Callable[..., Rollouts], make_prompts: Callable[..., tuple[Prompt, ...]]
) -> None:
    kept, totals, _, _ = draw(make_rollouts, make_prompts, [3, 12, 4], {1: [5, 13, 6], 2: [14, 15, 16]}, most=1)
    assert kept == [3, 12, 13]
    assert totals["dynamic_sampling/draws"] == (2.0, 1.0)


def test_it_stops_when_there_are_no_more_prompts(
    make_rollouts: Callable[..., Rollouts], make_prompts: Callable[..., tuple[Prompt, ...]]
) -> None:
    kept, totals, _, _ = draw(make_rollouts, make_prompts, [3, 12], {}, most=5)
    assert kept == [3, 12] and totals["dynamic_sampling/draws"] == (1.0, 1.0)


def test_a_penalty_is_one_more_reward_with_a_negative_weight() -> None:
    scores = scores_of([[1.0, NAN], [0.5, 0.25]])
    penalized = with_penalty(scores, "kl", torch.tensor([[2.0, 9.0], [0.0, 1.0]], dtype=torch.float64), 0.1)
    assert penalized.names == ("r", "kl")
    assert penalized.weights.tolist() == [1.0, -0.1]
    total = penalized.total()
    assert total[0, 0].item() == pytest.approx(0.8) and math.isnan(total[0, 1].item()), "unscored rows stay unscored"
    assert total[1].tolist() == pytest.approx([0.5, 0.15])
