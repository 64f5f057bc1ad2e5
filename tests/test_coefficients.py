"""Coefficients that follow what they act on."""

from __future__ import annotations

import pytest

from grpoforge.coefficients import AdaptiveEntropy, AdaptiveKL, Constant
from grpoforge.types import Stateful


def test_a_constant_stays() -> None:
    beta = Constant(0.04)
    beta.update(100.0, 64)
    assert beta.value == 0.04 and not isinstance(beta, Stateful)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.1, 1.0),  # at the target
        (0.11, 1.0 + 0.1 * 0.5),
        (0.3, 1.0 + 0.2 * 0.5),  # twice too much counts as a fifth
        (0.0, 1.0 - 0.2 * 0.5),
    ],
)
def test_beta_is_steered_toward_the_target(kl: float, expected: float) -> None:
    beta = AdaptiveKL(2.0, target=0.1, horizon=200)
    beta.update(kl, 100)
    assert beta.value == pytest.approx(2.0 * expected, rel=1e-12)


def test_a_step_larger_than_the_horizon_counts_as_one_horizon() -> None:
    beta = AdaptiveKL(1.0, target=0.1, horizon=10)
    beta.update(1.0, 10_000)
    assert beta.value == pytest.approx(1.2)


def test_the_entropy_bonus_acts_only_while_the_entropy_is_low() -> None:
    bonus = AdaptiveEntropy(0.01, target=0.5, delta=0.005, maximum=0.018)
    assert bonus.value == 0.0, "nothing is measured before the first step"
    values = []
    for entropy in (0.4, 0.3, 0.6, 0.5):
        bonus.update(entropy, 64)
        values.append(round(bonus.value, 6))
    # 0.015, then capped at 0.018; above the target no bonus, while the coefficient sinks to 0.013; then 0.018 again.
    assert values == [0.015, 0.018, 0.0, 0.018]


def test_the_entropy_coefficient_never_becomes_negative() -> None:
    bonus = AdaptiveEntropy(0.004, target=0.5, delta=0.005, maximum=1.0)
    bonus.update(0.9, 64)
    assert bonus.coefficient == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaptiveKL(2.0, target=0.1, horizon=200),
        lambda: AdaptiveEntropy(0.01, target=0.5, delta=0.005, maximum=1.0),
    ],
)
def test_state_makes_the_round_trip(make: object) -> None:
    first, second = make(), make()  # type: ignore[operator]
    assert isinstance(first, Stateful)
    first.update(0.3, 64)
    second.load_state_dict(first.state_dict())
    for coefficient in (first, second):
        coefficient.update(0.2, 64)
    assert vars(first) == vars(second)
