"""Figures of models whose faults are planted."""

from __future__ import annotations

import pytest
import torch

from grpoforge_plugins.preference.figures import accuracy, assess, calibration, correlation, length_bias, wilson


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_interval_is_wilsons() -> None:
    # 8 of 10: centre (0.8 + 0.19207) / 1.38415, half width 1.95996 sqrt(0.016 + 0.0096036) / 1.38415.
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0


def test_a_tie_counts_half() -> None:
    found = accuracy(of(1, 0, 2), of(0, 1, 2))
    assert found is not None and found["accuracy"] == 0.5 and found["pairs"] == 3
    assert accuracy(of(), of()) is None


def test_a_model_that_says_what_it_knows_is_calibrated_and_one_that_boasts_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    margin = torch.randn(20_000, generator=generator, dtype=torch.float64) * 2
    first_wins = torch.rand(20_000, generator=generator, dtype=torch.float64) < torch.sigmoid(margin)
    signed = torch.where(first_wins, margin, -margin)
    honest = calibration(signed, torch.zeros_like(signed))
    assert honest["ece"] < 0.015
    assert sum(one["pairs"] for one in honest["bins"]) == 20_000
    boasting = calibration(10 * signed, torch.zeros_like(signed))
    # Sure of nearly everything, and right as often as before.
    right = float((signed > 0).double().mean())
    sure = float(torch.sigmoid(10 * margin.abs()).mean())
    assert boasting["ece"] == pytest.approx(sure - right, abs=0.005) and sure - right > 0.1


def test_the_error_of_two_bins_by_hand() -> None:
    # Confidences 0.6 (right), 0.6 (wrong) and 0.9 (right): |1/2 - 0.6| * 2/3 + |1 - 0.9| / 3 = 0.1.
    logit = torch.logit(of(0.6, 0.4, 0.9))
    found = calibration(logit, torch.zeros(3, dtype=torch.float64), num_bins=5)
    assert found["ece"] == pytest.approx(0.1)
    assert [(one["pairs"], one["accuracy"]) for one in found["bins"]] == [(2, 0.5), (1, 1.0)]


def test_a_model_that_counts_characters_is_found_out() -> None:
    lengths = [(10, 30), (40, 20), (5, 15), (60, 50), (7, 7)]
    chosen, rejected = (of(*(pair[side] / 10 for pair in lengths)) for side in (0, 1))
    found = length_bias(chosen, rejected, lengths)
    assert found["chosen_shorter"]["accuracy"] == 0.0 and found["chosen_shorter"]["pairs"] == 2
    assert found["chosen_longer"]["accuracy"] == 1.0 and found["chosen_longer"]["pairs"] == 2
    assert found["same_length"]["pairs"] == 1
    assert found["score_correlation"] == pytest.approx(1.0) and found["margin_correlation"] == pytest.approx(1.0)


def test_a_model_that_does_not_is_not_accused() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [tuple(row) for row in torch.randint(1, 99, (4000, 2), generator=generator).tolist()]
    chosen = torch.randn(4000, generator=generator, dtype=torch.float64) + 1
    rejected = torch.randn(4000, generator=generator, dtype=torch.float64)
    found = length_bias(chosen, rejected, lengths)
    assert abs(found["margin_correlation"]) < 0.05 and abs(found["score_correlation"]) < 0.05
    assert found["chosen_shorter"]["accuracy"] == pytest.approx(found["chosen_longer"]["accuracy"], abs=0.05)


def test_nothing_correlates_with_what_does_not_vary() -> None:
    assert correlation(of(1, 2, 3), of(2, 2, 2)) is None
    assert correlation(of(1, 2, 3), of(3, 2, 1)) == pytest.approx(-1.0)


def test_scores_that_depend_on_the_order_break_the_antisymmetry() -> None:
    chosen, rejected = of(1, 2), of(0, 3)
    kinds = ["a", "b"]
    same = assess(chosen, rejected, again=(chosen, rejected), lengths=[(1, 2), (2, 1)], kinds=kinds)
    assert same["antisymmetry"]["max_error"] == pytest.approx(0.0, abs=1e-15)
    assert same["kinds"]["a"]["accuracy"] == 1.0 and same["kinds"]["b"]["accuracy"] == 0.0
    moved = assess(chosen, rejected, again=(chosen, rejected - 1), lengths=[(1, 2), (2, 1)], kinds=kinds)
    # P(a > b) = sigmoid(1) at first and 1 - sigmoid(2) in the other order.
    expected = abs(float(torch.sigmoid(of(1)) - torch.sigmoid(of(2))))
    assert moved["antisymmetry"]["max_error"] >= expected > 0.1
