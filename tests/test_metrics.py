"""Averages over unequal parts, and what a step says about its rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from grpoforge.collate import collate
from grpoforge.metrics import (
    Meter,
    averages,
    group_std,
    reward_totals,
    rollout_extremes,
    rollout_totals,
    sampling_difference,
    temperature_totals,
)
from grpoforge.types import Rollouts, Scores

NAN = float("nan")


@pytest.fixture
def rollouts(make_rollouts: Callable[..., Rollouts]) -> Rollouts:
    # Lengths 3 (ended), 5 (cut), 1 (cut), 2 (ended).
    return make_rollouts([[5], [6]], [[[3, 8, 1], [14, 6, 20, 9, 2]], [[22], [5, 1]]])


def scores_of(rewards: list[list[list[float]]], weights: list[float]) -> Scores:
    table = torch.tensor(rewards)
    names = ("math", "brevity")[: table.shape[2]]
    return Scores(names=names, rewards=table, raw=table, weights=torch.tensor(weights), seconds=(0.5,) * len(names))


def test_tokens_are_averaged_over_the_mask_of_all_parts() -> None:
    meter = Meter()
    meter.add_tokens(torch.tensor([[True, False]]), {"kl": torch.tensor([[1.0, NAN]])})
    meter.add_tokens(torch.tensor([[True, True], [True, False]]), {"kl": torch.tensor([[2.0, 3.0], [6.0, math.inf]])})
    assert meter.totals == {"kl": (12.0, 4.0)}
    # (1 + 2 + 3 + 6) / 4 = 3, not the mean of the parts' means (1 + 11/3) / 2.
    assert averages(meter.totals) == {"kl": 3.0}


def test_a_part_without_tokens_counts_nothing() -> None:
    meter = Meter()
    meter.add_tokens(torch.zeros(1, 2, dtype=torch.bool), {"kl": torch.ones(1, 2)})
    assert math.isnan(averages(meter.totals)["kl"])
    meter.add_tokens(torch.ones(1, 2, dtype=torch.bool), {"kl": torch.ones(1, 2)})
    assert averages(meter.totals) == {"kl": 1.0}


def test_numbers_and_extremes() -> None:
    meter = Meter()
    meter.add("grad_norm", 1.0)
    meter.add("grad_norm", 3.0)
    meter.add("loss", 10.0, 4)
    for value in (0.1, 0.7, 0.3):
        meter.largest("ratio_dev", value)
    assert averages(meter.totals) == {"grad_norm": 2.0, "loss": 2.5, "ratio_dev": 0.7}


def test_what_is_said_of_the_completions(rollouts: Rollouts) -> None:
    found = averages(rollout_totals(rollouts, scores_of([[[1.0], [0.0]], [[0.5], [0.5]]], [1.0])))
    assert found["completions/mean_length"] == 2.75
    assert found["completions/mean_terminated_length"] == 2.5
    assert found["completions/clipped_ratio"] == 0.5
    assert found["reward"] == 0.5
    # Groups (1, 0) and (1/2, 1/2): stds sqrt(1/2) and 0.
    assert found["reward_std"] == pytest.approx(math.sqrt(0.5) / 2)
    assert found["frac_reward_zero_std"] == 0.5
    assert rollout_extremes(rollouts) == {"completions/min_length": 1.0, "completions/max_length": 5.0}


def test_what_is_said_of_each_reward(rollouts: Rollouts) -> None:
    totals = reward_totals(scores_of([[[1.0, 2.0], [0.0, NAN]], [[0.0, 4.0], [1.0, NAN]]], [1.0, 0.1]))
    assert averages(totals) == pytest.approx(
        {
            "rewards/math/mean": 0.5,
            "rewards/math/std": math.sqrt(1 / 3),
            "rewards/math/weighted_mean": 0.5,
            "rewards/math/unscored": 0.0,
            "rewards/math/seconds": 0.5,
            "rewards/brevity/mean": 3.0,  # over the two scored rows
            "rewards/brevity/std": math.sqrt(2),
            "rewards/brevity/weighted_mean": 0.3,
            "rewards/brevity/unscored": 0.5,
            "rewards/brevity/seconds": 0.5,
        }
    )


def test_unscored_rows_are_no_rows_of_reward_0(rollouts: Rollouts) -> None:
    found = averages(rollout_totals(rollouts, scores_of([[[1.0], [NAN]], [[NAN], [NAN]]], [1.0])))
    assert found["reward"] == 1.0
    assert found["rewards/math/mean"] == 1.0
    assert found["rewards/math/unscored"] == 0.75
    assert found["reward_std"] == 0.0


def test_group_std() -> None:
    groups = torch.tensor([[1.0, 2.0, 6.0], [NAN, 2.0, 4.0], [NAN, NAN, 3.0]])
    # Deviations -2, -1, 3: sqrt(14 / 2); 3 +- 1: sqrt(2 / 1); one row has no spread.
    assert group_std(groups) == pytest.approx([math.sqrt(7), math.sqrt(2), 0.0])


def test_how_far_sampler_and_policy_are_apart(rollouts: Rollouts) -> None:
    batch = collate(rollouts, pad_token_id=0)
    old = torch.full(batch.completion_mask.shape, 9.0)  # far off where masked, where it does not matter
    old[batch.completion_mask] = -1.0
    old[1, 2] = -1.5
    assert sampling_difference(batch, old) == (0.5, 11.0, 0.5)


def test_the_reward_at_each_temperature() -> None:
    rewards = torch.tensor([[[1.0, 0.0], [0.5, 2.0]], [[NAN, NAN], [0.0, NAN]]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    temperatures = torch.tensor([[0.7, 1.3], [0.7, 1.3]], dtype=torch.float64)
    # Totals 1, 1.5; unscored, 0.
    expected = {"reward_T/0.7/mean": (1.0, 1.0), "reward_T/1.3/mean": (1.5, 2.0)}
    assert temperature_totals(rewards, weights, temperatures) == expected
    assert temperature_totals(rewards, weights, torch.ones(2, 2)) == {}, "one temperature is `reward`"


def test_a_temperature_for_every_row_is_no_metric_each() -> None:
    def of(count: int) -> int:
        temperatures = torch.linspace(0.5, 1.5, count, dtype=torch.float64)[None]
        return len(temperature_totals(torch.ones(1, count, 1), torch.ones(1), temperatures))

    assert [of(8), of(9)] == [8, 0]
