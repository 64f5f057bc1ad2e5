"""Losses: ratio 1, closed forms off-policy, and minibatches against the enumeration."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from grpoforge.lab.losses import GAPS, LossRow, at_gap, measure_loss, policy_gradients, with_exact_ratio
from grpoforge.plugins import load_plugins
from grpoforge.registry import make_component
from grpoforge.types import LossInputs

REGISTRY = load_plugins().registry
ON_POLICY = {"luspo", "clip_cov"}
"""Those whose gradient at ratio 1 is not ``-A``, and says so."""


def measured(name: str, **options: Any) -> LossRow:
    return measure_loss(REGISTRY.get("loss", name), options, samples=30, seed=0)


@pytest.mark.parametrize("name", [one.name for one in REGISTRY.list("loss") if one.plugin == "grpoforge"])
def test_at_ratio_1_the_gradient_is_minus_A(name: str) -> None:
    row = measured(name)
    assert (row.at_ratio_1 <= 1e-10) == (name not in ON_POLICY)
    if not row.is_sampled:
        assert row.gaps[0].cosine == pytest.approx(1, abs=1e-10)
        assert row.gaps[0].scale == pytest.approx(3 if name == "luspo" else 1, abs=1e-10)


@pytest.mark.parametrize("gap", GAPS)
def test_the_exact_ratio_is_unbiased(gap: float) -> None:
    found = with_exact_ratio(at_gap(gap))
    assert found.bias <= 1e-10 and found.scale == pytest.approx(1, abs=1e-10)


def test_the_gap_is_the_size_of_a_log_ratio() -> None:
    gap = at_gap(1e-4)
    squares = (gap.policy.logprobs - gap.old.logprobs).square().mean(dim=1)
    assert float(gap.old.probabilities @ squares) ** 0.5 == pytest.approx(1e-4, rel=1e-3)
    assert gap.divergence == pytest.approx(1.5e-8, rel=0.5)
    assert at_gap(0.0).divergence == 0


def test_advantages_are_centered_and_scaled() -> None:
    gap = at_gap(0.3)
    assert float(gap.old.probabilities @ gap.advantages) == pytest.approx(0, abs=1e-14)
    assert float(gap.old.probabilities @ gap.advantages.square()) == pytest.approx(1, abs=1e-14)


def test_closed_forms_off_policy() -> None:
    gap = at_gap(0.3)
    every = torch.arange(len(gap.advantages))
    ratio = (gap.policy.logprobs - gap.old.logprobs).exp()
    weighted = gap.advantages[:, None, None] * gap.policy.scores
    for name, options, weights in (
        ("reinforce", {}, torch.ones_like(ratio)),
        ("clip", {"epsilon_low": 0.999, "epsilon_high": 99.0}, ratio),
        ("cispo", {"max_ratio": 1.1}, ratio.clamp(max=1.1)),
    ):
        found = policy_gradients(REGISTRY.get("loss", name), options, gap, every)
        torch.testing.assert_close(found, (weights[:, :, None] * weighted).sum(dim=1), rtol=0, atol=1e-12)


def test_a_clip_that_binds_loses_direction() -> None:
    tight, loose = (measured("clip", epsilon_low=e, epsilon_high=e).gaps[2].cosine for e in (0.1, 0.9))
    assert tight is not None and loose is not None and tight < loose


class Coupled:
    """`reinforce`, but it says that it looks at every row."""

    coupling: ClassVar[str] = "batch"

    def __call__(self, inputs: LossInputs) -> tuple[Any, dict[str, Any]]:
        return -inputs.advantages * inputs.logprobs, {}


def test_minibatches_agree_with_the_enumeration() -> None:
    sampled = measure_loss(make_component("loss", "coupled", "mine", Coupled), {}, samples=300, seed=1)
    assert sampled.is_sampled
    for found, known in zip(sampled.gaps, measured("reinforce").gaps):
        assert found.error is not None and 0 < found.error < 0.1
        assert abs(found.scale - known.scale) < 4 * found.error
        assert found.noise == pytest.approx(known.noise, rel=0.2)
