"""The three estimators by hand, and near and far from equality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpoforge_plugins.kl.schulman import k1, k2, k3


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
