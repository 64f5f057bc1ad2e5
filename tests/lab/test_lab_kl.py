"""The identities of 2506.09477, found again by the laboratory through the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.lab.kl import KLRow, evaluate, measure_kl, setting
from grpoforge.plugins import load_plugins
from grpoforge.registry import make_component

REGISTRY = load_plugins().registry
TIGHT = 1e-10

IDENTITIES = {
    # name: value unbiased, gradient on-policy; value unbiased, gradient off-policy
    "k1": (True, "zero", False, "neither"),
    "k2": (False, "reverse", False, "neither"),
    "k3": (True, "forward", False, "neither"),
    "abs": (False, "neither", False, "neither"),
    "k1_corrected": (True, "reverse", True, "reverse"),
    "k3_corrected": (True, "reverse", True, "reverse"),
    "k1_plus": (True, "reverse", False, "neither"),
    "k3_plus": (True, "reverse", False, "neither"),
    "full": (True, "reverse", True, "reverse"),
    "full_forward": (False, "forward", False, "forward"),
}


def measured(name: str, **options: Any) -> KLRow:
    return measure_kl(REGISTRY.get("kl", name), options)


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    row = measured(name)
    on_unbiased, on_gradient, off_unbiased, off_gradient = IDENTITIES[name]
    for found, unbiased, gradient in (
        (row.on_policy, on_unbiased, on_gradient),
        (row.off_policy, off_unbiased, off_gradient),
    ):
        assert found.gradient == gradient
        assert (abs(found.bias) <= TIGHT) == unbiased
        assert (found.from_reverse <= TIGHT) == (gradient == "reverse")
        assert (found.from_forward <= TIGHT) == (gradient == "forward")


def test_every_estimator_of_ours_has_its_identity() -> None:
    assert {one.name for one in REGISTRY.list("kl") if one.plugin == "grpoforge"} == set(IDENTITIES)


def test_whole_distributions_have_no_variance() -> None:
    for name in ("full", "full_forward"):
        for found in (measured(name).on_policy, measured(name).off_policy):
            assert found.variance <= TIGHT and found.gradient_variance <= TIGHT


def test_in_the_loss_no_estimator_has_the_gradient_of_the_whole_completion() -> None:
    per_state = measured("full").in_loss
    assert per_state.bias > 0.1
    for name in ("k2", "k1_plus", "k3_plus", "k1_corrected", "k3_corrected"):
        found = measured(name).in_loss
        assert found.bias == pytest.approx(per_state.bias, abs=TIGHT)
        assert found.noise is not None and per_state.noise is not None and found.noise > per_state.noise
    assert measured("k1").in_loss.cosine is None


def test_in_the_reward_only_the_value_x_has_it() -> None:
    exact = {name for name in IDENTITIES if (found := measured(name).in_reward) and found.bias <= TIGHT}
    assert exact == {"k1", "k1_plus", "k1_corrected"}
    assert measured("full").in_reward is None


def test_k3_in_the_reward_subtracts_the_gradient_of_the_forward_kl() -> None:
    """``E[(exp(-x) + x - 1) grad log pi]`` is the gradient of KL(policy || ref) minus that of KL(ref || policy)."""
    where = setting(1, on_policy=True)
    values, _ = evaluate(REGISTRY.get("kl", "k3"), {}, where)
    credited = where.policy.slope_of_mean(values[:, 0])
    torch.testing.assert_close(credited, where.reverse_gradient - where.forward_gradient, rtol=0, atol=TIGHT)


def test_exact_gradients_are_autograds() -> None:
    where = setting(2, on_policy=False)
    space = where.policy.space
    logits = where.policy.logits.clone().requires_grad_()
    logprobs = logits.log_softmax(dim=1)[space.states, space.tokens].sum(dim=1)
    reference = where.reference.logprobs.sum(dim=1)
    reverse = (logprobs.exp() * (logprobs - reference)).sum()
    forward = (reference.exp() * (reference - logprobs)).sum()
    assert float(reverse.detach()) == pytest.approx(where.reverse, abs=TIGHT)
    for exact, gradient in ((reverse, where.reverse_gradient), (forward, where.forward_gradient)):
        (slope,) = torch.autograd.grad(exact, logits, retain_graph=True)
        torch.testing.assert_close(gradient, slope.flatten(), rtol=0, atol=TIGHT)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_a_clamp_is_harmless_before_its_bound_and_biased_past_it(name: str) -> None:
    plain, wide, narrow = (measured(name, **options) for options in ({}, {"clamp": [20, 20]}, {"clamp": [0.8, 1.0]}))
    assert wide == plain
    assert abs(narrow.on_policy.bias) > 0.01
    assert narrow.on_policy.gradient == "neither"


def test_a_wrong_formula_is_seen() -> None:
    def half(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return (logprobs - ref_logprobs) / 2

    row = measure_kl(make_component("kl", "half", "mine", half), {})
    assert row.id == "mine:half"
    assert row.on_policy.value == pytest.approx(setting(1, on_policy=True).reverse / 2)
    assert row.on_policy.gradient == "zero"
    assert row.in_reward is not None
    assert row.in_reward.scale == pytest.approx(0.5) and row.in_reward.cosine == pytest.approx(1)
