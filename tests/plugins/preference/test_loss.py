"""Bradley-Terry by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpoforge_plugins.preference.loss import bradley_terry, preference_probability

scores = st.lists(st.floats(-20, 20), min_size=1, max_size=6)


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_loss_is_the_formula() -> None:
    # -log sigmoid(x) = log(1 + e^-x): x = 1 gives 0.3132616875, x = -2 gives 2.1269280110; their mean.
    assert float(bradley_terry(of(1, 0), of(0, 2))) == pytest.approx((0.3132616875 + 2.1269280110) / 2, abs=1e-9)
    # With margin 1/2 the first difference counts as 1/2: log(1 + e^-0.5) = 0.4740769842.
    assert float(bradley_terry(of(1), of(0), of(0.5))) == pytest.approx(0.4740769842, abs=1e-9)
    # The scores 3 and 2 sum to 5: 0.01 * 25 on top of x = 1.
    assert float(bradley_terry(of(3), of(2), center=0.01)) == pytest.approx(0.3132616875 + 0.25, abs=1e-9)


def test_its_gradient_is_the_formula() -> None:
    chosen, rejected = of(0.7).requires_grad_(), of(-0.2).requires_grad_()
    bradley_terry(chosen, rejected, 0.3, center=0.05).backward()
    # d = 0.7 + 0.2 - 0.3 = 0.6; of the fit -(1 - sigmoid(0.6)) and its opposite; of the center 2 * 0.05 * 0.5 on both.
    pull = 1 - 1 / (1 + math.exp(-0.6))
    assert chosen.grad is not None and rejected.grad is not None
    assert float(chosen.grad) == pytest.approx(-pull + 0.05, abs=1e-12)
    assert float(rejected.grad) == pytest.approx(pull + 0.05, abs=1e-12)


def test_its_gradient_agrees_with_differences() -> None:
    chosen, rejected = of(1.3, -0.4, 2.0).requires_grad_(), of(0.1, 0.9, -3.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry(a, b, of(0, 0.2, 1), center=0.02), (chosen, rejected))


@given(scores, scores, st.floats(-5, 5))
def test_the_two_orders_sum_to_one_and_only_differences_count(a: list[float], b: list[float], shift: float) -> None:
    size = min(len(a), len(b))
    first, second = of(*a[:size]), of(*b[:size])
    whole = preference_probability(first, second) + preference_probability(second, first)
    assert whole.tolist() == pytest.approx([1.0] * size, abs=1e-15)
    moved = bradley_terry(first + shift, second + shift)
    assert float(moved) == pytest.approx(float(bradley_terry(first, second)), abs=1e-9)


def test_without_center_scores_drift_and_with_it_they_come_back() -> None:
    """One pair of free scores that start at 5 and 4: where they go by gradient descent."""
    ends = {}
    for center in (0.0, 0.1):
        score = of(5.0, 4.0).requires_grad_()
        for _ in range(2000):
            (gradient,) = torch.autograd.grad(bradley_terry(score[:1], score[1:], center=center), score)
            score = (score - 0.1 * gradient).detach().requires_grad_()
        ends[center] = score.tolist()
    assert sum(ends[0.0]) == pytest.approx(9.0)
    assert sum(ends[0.1]) == pytest.approx(0.0, abs=1e-6) and ends[0.1][0] > ends[0.1][1]
