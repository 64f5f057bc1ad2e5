"""Advantages: known expectations, found again; enumeration against brute force and against sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.lab.advantages import (
    CURVE_GROUP,
    DIFFICULTIES,
    by_samples,
    every_batch,
    exactly,
    measure_advantage,
    prompts,
    weight_by_difficulty,
)
from grpoforge.lab.moments import Estimate
from grpoforge.plugins import load_plugins
from grpoforge.registry import Component, make_component
from grpoforge.testing.kit import Broken

REGISTRY = load_plugins().registry
G = CURVE_GROUP


def ours(name: str) -> Component:
    return REGISTRY.get("advantage", name)


def exact(name: str, size: int, **options: Any) -> Estimate:
    return exactly(ours(name), options, prompts(), size)


def test_every_batch_is_there_with_its_probability() -> None:
    first, second = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64)
    drawn, weights = every_batch([first, second], 3)
    assert drawn.shape == (100, 2, 3) and float(weights.sum()) == pytest.approx(1, abs=1e-14)
    found = {(tuple(one[0]), tuple(one[1])): w for one, w in zip(drawn.tolist(), weights.tolist())}
    brute: dict[tuple[tuple[int, ...], ...], float] = {}
    for rows in itertools.product(range(3), repeat=6):
        key = (tuple(sorted(rows[:3])), tuple(sorted(rows[3:])))
        chance = math.prod(float(first[row]) for row in rows[:3]) * math.prod(float(second[row]) for row in rows[3:])
        brute[key] = brute.get(key, 0.0) + chance
    assert found == {key: pytest.approx(chance, abs=1e-14) for key, chance in brute.items()}


@pytest.mark.parametrize(("size", "block"), [(2, 2), (4, 2), (6, 3)])
def test_every_batch_of_blocks_is_there_with_its_probability(size: int, block: int) -> None:
    chances = torch.tensor([0.7, 0.3], dtype=torch.float64)
    drawn, weights = every_batch([chances], size, block)
    found = {tuple(group[0]): weight for group, weight in zip(drawn.tolist(), weights.tolist(), strict=True)}
    assert len(found) == len(drawn)
    brute: dict[tuple[int, ...], float] = {}
    for rows in itertools.product(range(2), repeat=size):
        blocks = sorted(tuple(sorted(rows[start : start + block])) for start in range(0, size, block))
        key = tuple(itertools.chain(*blocks))
        brute[key] = brute.get(key, 0.0) + math.prod(float(chances[row]) for row in rows)
    assert found == {key: pytest.approx(chance, abs=1e-14) for key, chance in brute.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_half_the_gap_is_half_the_gradient_and_its_noise_stays_that_of_two(size: int) -> None:
    found = exact("paired", size, preference_threshold=0.0)
    assert found.cosine == pytest.approx(1, abs=1e-10) and found.scale == pytest.approx(0.5, abs=1e-10)
    assert found.noise == pytest.approx(exact("group_mean", 2).noise, rel=1e-10)


@pytest.mark.parametrize("size", [2, 4])
def test_the_mean_of_the_others_is_an_unbiased_baseline(size: int) -> None:
    found = exact("leave_one_out", size)
    assert found.bias <= 1e-10 and found.scale == pytest.approx(1, abs=1e-10) and found.error is None


@pytest.mark.parametrize("size", [2, 4])
def test_the_group_mean_only_shortens(size: int) -> None:
    found, unbiased = exact("group_mean", size), exact("leave_one_out", size)
    assert found.cosine == pytest.approx(1, abs=1e-10) and found.scale == pytest.approx(1 - 1 / size, abs=1e-10)
    assert found.noise == pytest.approx(unbiased.noise, rel=1e-10)


def test_dividing_by_the_std_turns_the_gradient() -> None:
    cosine = exact("group", 4).cosine
    assert cosine is not None and cosine < 0.9


CURVES: dict[str, Callable[[float], float]] = {
    "leave_one_out": lambda p: 1.0,
    "group_mean": lambda p: 1 - 1 / G,
    "opo": lambda p: 1 - 1 / G,
    "pass_at_k": lambda p: (1 - p) ** (G - 1),
    "maxrl": lambda p: (1 - (1 - p) ** (G - 1)) / p,
}


@pytest.mark.parametrize("name", CURVES)
def test_the_weight_of_a_prompt_by_its_difficulty(name: str) -> None:
    expected = [CURVES[name](p) for p in DIFFICULTIES]
    assert weight_by_difficulty(ours(name), {}) == pytest.approx(expected, abs=1e-10)


def test_the_group_std_favors_hard_and_easy_prompts() -> None:
    """Exactly: the expectation of the group's sample std, without epsilon, over ``p (1 - p)``."""
    curve = weight_by_difficulty(ours("group"), {"epsilon": 0.0})
    for p, found in zip(DIFFICULTIES, curve):
        chances = [math.comb(G, n) * p**n * (1 - p) ** (G - n) for n in range(G + 1)]
        stds = [math.sqrt(n * (G - n) / (G * (G - 1))) for n in range(G + 1)]
        mean = sum(chance * std * (G - 1) / G for chance, std in zip(chances, stds))
        assert found == pytest.approx(mean / (p * (1 - p)), abs=1e-10)
    assert curve[0] > curve[4] < curve[8]


def test_samples_agree_with_the_enumeration() -> None:
    for name in ("group", "reinforce_pp"):
        sampled = by_samples(ours(name), {}, prompts(), 4, samples=400, seed=3)
        known = exact(name, 4)
        assert sampled.error is not None and 0.01 < sampled.error < 0.1
        assert abs(sampled.scale - known.scale) < 4 * sampled.error * known.scale
        assert sampled.noise == pytest.approx(known.noise, rel=0.2)


def test_equal_seeds_give_equal_figures() -> None:
    one, same, other = (by_samples(ours("group"), {}, prompts(), 8, samples=20, seed=seed).scale for seed in (1, 1, 2))
    assert one == same != other


def test_a_group_that_is_too_small_is_passed_over() -> None:
    row = measure_advantage(ours("pass_at_k"), {"k": 4}, samples=10, seed=0)
    assert row.groups[2] is None and row.groups[4] is not None


def test_an_advantage_that_looks_at_the_order_of_rows_is_refused() -> None:
    def first(rewards: Tensor) -> Tensor:
        return rewards[:, :, 0] - rewards[:, :1, 0]

    with pytest.raises(Broken, match="depend on the order of the rows, so groups cannot be enumerated"):
        measure_advantage(make_component("advantage", "first", "mine", first), {}, samples=10, seed=0)


class Running:
    """A baseline that remembers."""

    def __init__(self) -> None:
        self.mean = 0.0

    def __call__(self, rewards: Tensor) -> Tensor:
        advantages = rewards[:, :, 0] - self.mean
        self.mean += float(rewards.mean())
        return advantages

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


def test_a_state_does_not_leak_between_batches() -> None:
    found = exactly(make_component("advantage", "running", "mine", Running), {}, prompts(), 2)
    assert found.bias <= 1e-10, "without a baseline the gradient is unbiased"
