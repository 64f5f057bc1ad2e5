"""The three estimators: values and expected gradients by exact enumeration of a five-letter policy."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpoforge_plugins.kl.schulman import k1, k2, k3

Estimator = Callable[[Tensor, Tensor], Tensor]

POLICY = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([1.1, 0.2, -0.5, 0.9, 0.0], dtype=torch.float64).log_softmax(dim=0)


def expected_value(estimator: Estimator) -> float:
    logprobs = POLICY.log_softmax(dim=0)
    return float((logprobs.exp() * estimator(logprobs, REFERENCE)).sum())


def expected_gradient(estimator: Estimator) -> Tensor:
    """Average, over samples of the policy, of the gradient that the estimator has as a loss."""
    logits = POLICY.clone().requires_grad_()
    logprobs = logits.log_softmax(dim=0)
    (gradient,) = torch.autograd.grad((logprobs.detach().exp() * estimator(logprobs, REFERENCE)).sum(), logits)
    return gradient


def divergence(reverse: bool) -> tuple[float, Tensor]:
    """KL(policy || reference) when ``reverse``, else KL(reference || policy), and its exact gradient."""
    logits = POLICY.clone().requires_grad_()
    logprobs = logits.log_softmax(dim=0)
    weight = logprobs.exp() if reverse else REFERENCE.exp()
    value = (weight * (logprobs - REFERENCE)).sum() * (1 if reverse else -1)
    (gradient,) = torch.autograd.grad(value, logits)
    return float(value.detach()), gradient


def test_golden_values() -> None:
    # x = log pi - log pi_ref = ln 2: k1 = ln 2, k2 = ln^2 2 / 2, k3 = 1/2 + ln 2 - 1.
    ours, theirs = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert float(k1(ours, theirs)) == pytest.approx(0.693147, abs=1e-6)
    assert float(k2(ours, theirs)) == pytest.approx(0.240227, abs=1e-6)
    assert float(k3(ours, theirs)) == pytest.approx(0.193147, abs=1e-6)
    # x = -ln 2: k1 = -ln 2, k3 = 2 - ln 2 - 1.
    assert float(k1(theirs, ours)) == pytest.approx(-0.693147, abs=1e-6)
    assert float(k3(theirs, ours)) == pytest.approx(0.306853, abs=1e-6)


logprobs = st.floats(-20, 0, allow_nan=False)


@given(ours=logprobs, theirs=logprobs)
def test_zero_at_equality_and_never_negative(ours: float, theirs: float) -> None:
    one, other = torch.tensor([ours], dtype=torch.float64), torch.tensor([theirs], dtype=torch.float64)
    for estimator in (k1, k2, k3):
        assert float(estimator(one, one)) == 0.0
    for estimator in (k2, k3):
        assert float(estimator(one, other)) >= 0.0


def test_k3_keeps_its_digits_near_equality() -> None:
    # exp(-x) - 1 + x loses everything below 1e-8 in float32; expm1 keeps x^2 / 2.
    x = torch.tensor([1e-3], dtype=torch.float32)
    assert float(k3(x, torch.zeros(1))) == pytest.approx(4.998e-7, rel=0.1)


def test_k1_and_k3_are_unbiased() -> None:
    kl, _ = divergence(reverse=True)
    assert expected_value(k1) == pytest.approx(kl, abs=1e-14)
    assert expected_value(k3) == pytest.approx(kl, abs=1e-14)
    assert abs(expected_value(k2) - kl) > 0.01, "k2 is biased as a value"


def test_expected_gradients() -> None:
    none = torch.zeros(5, dtype=torch.float64)
    torch.testing.assert_close(expected_gradient(k1), none, rtol=0, atol=1e-10)
    torch.testing.assert_close(expected_gradient(k2), divergence(reverse=True)[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(expected_gradient(k3), divergence(reverse=False)[1], rtol=0, atol=1e-10)
    assert float((expected_gradient(k3) - divergence(reverse=True)[1]).abs().max()) > 0.01
