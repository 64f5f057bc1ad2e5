"""Group baselines by hand, their invariances, and the ledger that divides them among the rewards."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpoforge.scoring import BoundReward, apply_gates, ledger
from grpoforge.types import Scores
from grpoforge_plugins.advantages.group import group, group_mean

NAN = float("nan")
ONE = torch.ones(1, dtype=torch.float64)
Advantage = Callable[..., Tensor]


def of(rewards: list[float], advantage: Advantage = group, **options: float) -> list[float]:
    """Advantages of one group with one reward."""
    table = torch.tensor(rewards, dtype=torch.float64)[None, :, None]
    listed: list[float] = advantage(table, ONE, **options)[0].tolist()
    return listed


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
def test_one_winner(size: int) -> None:
    # mean 1/G; squared deviations (1 - 1/G)^2 + (G - 1)/G^2 = (G - 1)/G; divided by G - 1: std = 1/sqrt(G).
    # The winner gets (1 - 1/G) sqrt(G) = (G - 1)/sqrt(G), each other -1/sqrt(G), up to epsilon.
    exact = of([1.0] + [0.0] * (size - 1), epsilon=0.0)
    assert exact == pytest.approx([(size - 1) / math.sqrt(size)] + [-1 / math.sqrt(size)] * (size - 1), rel=1e-12)
    std = 1 / math.sqrt(size)
    shrunk = of([1.0] + [0.0] * (size - 1))
    assert shrunk == pytest.approx([value * std / (std + 1e-4) for value in exact], rel=1e-12)


def test_four_completions_by_hand() -> None:
    # R = 1, 2, 3, 6: mean 3, deviations -2, -1, 0, 3, sum of squares 14, std sqrt(14/3) = 2.160247.
    assert of([1, 2, 3, 6], group_mean) == [-2, -1, 0, 3]
    assert of([1, 2, 3, 6], epsilon=0.0) == pytest.approx([-0.925820, -0.462910, 0, 1.388730], abs=1e-6)


@pytest.mark.parametrize("advantage", [group, group_mean])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.3, 1e6])
def test_a_constant_group_gets_exactly_0(advantage: Advantage, value: float) -> None:
    # Three times 0.1 has a rounded mean other than 0.1: the rounding must not be blown up by a std of nearly 0.
    assert of([value] * 3, advantage) == [0.0] * 3
    assert of([value] * 7, advantage) == [0.0] * 7


def test_a_constant_group_without_epsilon_is_not_0_over_0() -> None:
    assert of([0.1] * 3, epsilon=0.0) == [0.0] * 3


@pytest.mark.parametrize("advantage", [group, group_mean])
def test_unscored_rows(advantage: Advantage) -> None:
    # An unscored row is no row at 0: the others are as if it were not there.
    scored = of([1.0, 2.0, 6.0], advantage)
    assert of([1.0, NAN, 2.0, 6.0], advantage) == [scored[0], 0.0, *scored[1:]]
    assert of([NAN, NAN, NAN], advantage) == [0.0] * 3
    assert of([NAN, 5.0, NAN], advantage) == [0.0] * 3, "one scored row has no baseline"


def test_weights_make_one_reward_of_several() -> None:
    rewards = torch.tensor([[[1.0, 0.0], [0.0, 4.0], [NAN, 2.0], [NAN, NAN]]], dtype=torch.float64)
    # Totals 1, 0.5 * 4 = 2, 0.5 * 2 = 1, unscored: mean 4/3.
    found = group_mean(rewards, torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert found[0].tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3, 0.0], abs=1e-15)


coarse = st.integers(-1000, 1000).map(lambda number: number / 100)
"""Rewards that differ by much more than rounding, or not at all."""
fine = st.one_of(coarse, st.floats(-10, 10))


@st.composite
def tables(draw: st.DrawFn, numbers: st.SearchStrategy[float] = coarse) -> Tensor:
    """``[P, G, K]`` rewards, some not scored."""
    component = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]), numbers)
    num_prompts, group_size, num_rewards = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(1, 3))
    size = num_prompts * group_size * num_rewards
    cells = draw(st.lists(component, min_size=size, max_size=size))
    values = [NAN if cell is None else cell for cell in cells]
    return torch.tensor(values, dtype=torch.float64).reshape(num_prompts, group_size, num_rewards)


WEIGHTS = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)


def scores_of(raw: Tensor, gate: bool = False) -> Scores:
    """Scores as `grpoforge.scoring.score` makes them; every reward but the first gated on the first."""
    names = tuple(f"r{index}" for index in range(raw.shape[2]))
    bound = [
        BoundReward(name=name, function=len, data=(), weight=1.0, gate="r0" if gate and name != "r0" else None)
        for name in names
    ]
    return Scores(
        names=names,
        rewards=apply_gates(raw, bound),
        raw=raw,
        weights=WEIGHTS[: raw.shape[2]],
        seconds=(0.0,) * len(names),
    )


@given(raw=tables(fine), gate=st.booleans(), advantage=st.sampled_from([group, group_mean]))
def test_shares_sum_to_the_applied_advantage(raw: Tensor, gate: bool, advantage: Any) -> None:
    scores = scores_of(raw, gate)
    advantages = advantage(scores.rewards, scores.weights)
    shares = ledger(scores, advantages)
    assert shares.dtype == torch.float64 and not shares.isnan().any()
    # Shares that nearly cancel are far larger than their sum, and each of them is rounded.
    allowed = 1e-12 * shares.abs().sum(dim=2).clamp(min=1.0)
    assert bool(((shares.sum(dim=2) - advantages).abs() <= allowed).all())


ROUNDED = {
    "0.1 + 0.2 against 0.3": ([[0.1, 0.2], [0.3, 0.0], [0.0, 0.3]], [1.0, 1.0]),
    "cancelling to 5e-17": ([[0.3, -0.1, -0.2], [0.0, 0.0, 0.0]], [1.0, 1.0, 1.0]),
    "a weight of 0.1": ([[0.7, 0.0], [0.0, 7.0]], [1.0, 0.1]),
    "large": ([[1e4 + 0.1, 0.2], [1e4, 0.1 + 0.2]], [1.0, 1.0]),
}


@pytest.mark.parametrize(("rows", "weights"), ROUNDED.values(), ids=ROUNDED.keys())
@pytest.mark.parametrize("advantage", [group, group_mean, functools.partial(group, epsilon=0.0)])
def test_rounding_is_no_signal(rows: list[list[float]], weights: list[float], advantage: Advantage) -> None:
    table = torch.tensor([rows], dtype=torch.float64)
    scores = dataclasses.replace(scores_of(table), weights=torch.tensor(weights, dtype=torch.float64))
    assert len(set(scores.total()[0].tolist())) > 1, "equal on paper alone"
    advantages = advantage(scores.rewards, scores.weights)
    assert advantages.tolist() == [[0.0] * len(rows)]
    assert not ledger(scores, advantages).any()


def test_a_small_gap_is_a_signal() -> None:
    assert of([1.0, 1.0 + 1e-9], group_mean) == pytest.approx([-5e-10, 5e-10], rel=1e-6)


def test_a_row_at_the_mean_up_to_rounding_has_no_shares() -> None:
    # Totals 0, 0.3 and 0.6: the middle one, 0.1 + 0.2, misses the mean by 4e-17, and 0.1 / 4e-17 is no share.
    scores = scores_of(torch.tensor([[[0.0, 0.0], [0.1, 0.4], [0.6, 0.0]]], dtype=torch.float64))
    advantages = group(scores.rewards, scores.weights)
    shares = ledger(scores, advantages)
    assert advantages[0, 1] == 0.0 and shares[0, 1].tolist() == [0.0, 0.0]
    assert shares.sum(dim=2)[0].tolist() == pytest.approx(advantages[0].tolist(), rel=1e-14)


def test_shares_by_hand() -> None:
    # Weights 1 and 0.5. Centered weighted components: r0 +-1/2, r1 -+1/4; total 1 against 1/2, so A = +-1/4.
    scores = scores_of(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64))
    advantages = group_mean(scores.rewards, scores.weights)
    assert advantages.tolist() == [[0.25, -0.25]]
    assert ledger(scores, advantages).tolist() == [[[0.5, -0.25], [-0.5, 0.25]]]


def test_a_gate_that_stays_shut_takes_the_share() -> None:
    # r1 is paid only where r0 is 1: the second row's r1 counts as 0.
    scores = scores_of(torch.tensor([[[1.0, 1.0], [0.0, 1.0]]], dtype=torch.float64), gate=True)
    advantages = group_mean(scores.rewards, scores.weights)
    assert advantages.tolist() == [[0.75, -0.75]]
    assert ledger(scores, advantages).tolist() == [[[0.5, 0.25], [-0.5, -0.25]]]
