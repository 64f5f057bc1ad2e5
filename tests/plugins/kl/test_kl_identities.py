"""What each estimator is worth: expected values and gradients, by enumerating a softmax policy of five letters."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.binding import bind
from grpoforge.errors import ConfigError
from grpoforge.objective import Frozen, kl_term
from grpoforge.plugins import load_plugins
from grpoforge.types import LossInputs
from grpoforge_plugins.kl.corrected import k1_corrected, k3_corrected
from grpoforge_plugins.kl.full import full, full_forward
from grpoforge_plugins.kl.plus import k1_plus, k3_plus
from grpoforge_plugins.kl.schulman import absolute, k1, k2, k3

Estimator = Callable[..., Tensor]

POLICY = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4], dtype=torch.float64)
REFERENCE = torch.tensor([1.1, 0.2, -0.5, 0.9, 0.0], dtype=torch.float64).log_softmax(dim=0)
BEHAVIOR = torch.tensor([-0.6, 0.7, 0.1, 0.4, 1.3], dtype=torch.float64).log_softmax(dim=0)
"""Another policy that may have sampled."""

REVERSE, FORWARD, NONE = "reverse", "forward", "none"


def expected(estimator: Estimator, behavior: Tensor | None = None) -> tuple[float, Tensor]:
    """Mean over samples of ``behavior`` (the policy when None) of the estimate, and of its gradient as a loss."""
    logits = POLICY.clone().requires_grad_()
    logprobs = logits.log_softmax(dim=0)
    sampled = logprobs.detach() if behavior is None else behavior
    data = {"logprobs": logprobs, "ref_logprobs": REFERENCE, "old_logprobs": sampled, "sampling_logprobs": sampled}
    mean = (sampled.exp() * bind("kl", estimator)(data)).sum()
    (gradient,) = torch.autograd.grad(mean, logits)
    return float(mean.detach()), gradient


def exact(direction: str) -> tuple[float, Tensor]:
    """KL(policy || reference) when ``reverse``, KL(reference || policy) when ``forward``, and its gradient."""
    if direction == NONE:
        return 0.0, torch.zeros_like(POLICY)
    logits = POLICY.clone().requires_grad_()
    logprobs = logits.log_softmax(dim=0)
    left, right = (logprobs, REFERENCE) if direction == REVERSE else (REFERENCE, logprobs)
    value = (left.exp() * (left - right)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return float(value.detach()), gradient


def same(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-12


ON_POLICY: dict[str, tuple[Estimator, bool, str]] = {
    "k1": (k1, True, NONE),
    "k2": (k2, False, REVERSE),
    "k3": (k3, True, FORWARD),
    "k1_plus": (k1_plus, True, REVERSE),
    "k3_plus": (k3_plus, True, REVERSE),
    "k1_corrected": (k1_corrected, True, REVERSE),
    "k3_corrected": (k3_corrected, True, REVERSE),
}
"""Estimator, whether its value is unbiased, and whose gradient its gradient is."""


@pytest.mark.parametrize(("estimator", "unbiased", "direction"), ON_POLICY.values(), ids=ON_POLICY.keys())
def test_on_policy(estimator: Estimator, unbiased: bool, direction: str) -> None:
    value, gradient = expected(estimator)
    assert (abs(value - exact(REVERSE)[0]) <= 1e-12) == unbiased
    for other in (REVERSE, FORWARD, NONE):
        assert same(gradient, exact(other)[1]) == (other == direction)


@pytest.mark.parametrize("name", ON_POLICY)
def test_off_policy_only_the_corrected_ones_are_right(name: str) -> None:
    value, gradient = expected(ON_POLICY[name][0], BEHAVIOR)
    is_right = name.endswith("_corrected")
    assert (abs(value - exact(REVERSE)[0]) <= 1e-12) == is_right
    assert same(gradient, exact(REVERSE)[1]) == is_right


@pytest.mark.parametrize("estimator", [k1_corrected, k3_corrected])
def test_corrected_for_the_policy_that_is_named(estimator: Estimator) -> None:
    logprobs = POLICY.log_softmax(dim=0)
    assert not estimator(logprobs, REFERENCE, BEHAVIOR, logprobs).equal(
        estimator(logprobs, REFERENCE, logprobs, BEHAVIOR)
    )
    assert estimator(logprobs, REFERENCE, BEHAVIOR, logprobs, behavior="old").equal(
        estimator(logprobs, REFERENCE, logprobs, BEHAVIOR)
    )


def test_k3_corrected_keeps_its_gradient_far_from_the_reference() -> None:
    """The product rule leaves exp(20) - exp(20) there, which float32 cannot subtract."""
    logprobs = torch.tensor([-21.0, -11.0, -1.001], dtype=torch.float32, requires_grad=True)
    ref_logprobs, sampling = torch.full((3,), -1.0), torch.tensor([-20.5, -11.0, -1.0])
    estimate = k3_corrected(logprobs, ref_logprobs, sampling, sampling)
    (gradient,) = torch.autograd.grad(estimate.sum(), logprobs)
    ratio, x = (logprobs - sampling).detach().exp(), (logprobs - ref_logprobs).detach()
    torch.testing.assert_close(gradient, ratio * x, rtol=1e-5, atol=1e-6)
    assert estimate.equal(ratio * k3(logprobs, ref_logprobs).detach())


def test_abs_pulls_as_twice_the_total_variation() -> None:
    value, gradient = expected(absolute)
    assert value > exact(REVERSE)[0]
    logits = POLICY.clone().requires_grad_()
    (slope,) = torch.autograd.grad((logits.softmax(dim=0) - REFERENCE.exp()).abs().sum(), logits)
    assert same(gradient, slope)


@pytest.mark.parametrize(("plus", "base"), [(k1_plus, k1), (k3_plus, k3)])
def test_plus_shows_one_and_differentiates_the_other(plus: Estimator, base: Estimator) -> None:
    logprobs = POLICY.log_softmax(dim=0).requires_grad_()
    for options in ({}, {"clamp": (0.5, 0.2)}):
        shown = plus(logprobs, REFERENCE, **options)
        assert shown.equal(base(logprobs, REFERENCE, **options).detach())
        (gradient,) = torch.autograd.grad(shown.sum(), logprobs)
        assert gradient.equal((logprobs - REFERENCE).detach())


@pytest.mark.parametrize(("estimator", "direction"), [(full, REVERSE), (full_forward, FORWARD)])
def test_full_is_exact(estimator: Estimator, direction: str) -> None:
    logits = torch.stack([POLICY, POLICY.flip(0)]).requires_grad_()
    divergence = estimator(logits.log_softmax(dim=1), torch.stack([REFERENCE, REFERENCE]))
    assert divergence.shape == (2,)
    (gradient,) = torch.autograd.grad(divergence[0], logits)
    value, slope = exact(direction)
    assert float(divergence[0].detach()) == pytest.approx(value, abs=1e-14)
    assert same(gradient[0], slope) and not gradient[1].any()


def test_full_where_a_token_is_excluded() -> None:
    """Top-k leaves -inf: excluded by the left side it counts nothing, by the right side alone the KL is infinite."""
    logits = POLICY.clone().requires_grad_()
    cut = torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0], dtype=torch.float64)
    narrow, wide = (logits + cut).log_softmax(dim=0), logits.log_softmax(dim=0)
    for left, right in ((narrow, REFERENCE), (narrow, (REFERENCE + cut).log_softmax(dim=0))):
        value = full(left[None], right[None])
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        kept = [0, 2, 3, 4]
        by_hand = (left.exp()[kept] * (left - right)[kept]).sum()
        assert float(value.detach()) == pytest.approx(float(by_hand.detach()), abs=1e-15)
        assert bool(gradient.isfinite().all())
    assert float(full(wide[None], (REFERENCE + cut)[None]).detach()) == float("inf")
    assert float(full_forward((POLICY + cut).log_softmax(dim=0)[None], REFERENCE[None])) == float("inf")


TOKEN_ESTIMATORS: dict[str, Estimator] = {name: case[0] for name, case in ON_POLICY.items()} | {"abs": absolute}


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
@pytest.mark.parametrize("wild", [1e4, -1e4])
def test_what_stands_at_masked_positions_does_not_matter(name: str, wild: float) -> None:
    logprobs = torch.tensor([[-1.0, wild, -0.5], [wild, wild, wild]], dtype=torch.float64, requires_grad=True)
    calm = torch.tensor([[-1.5, 0.0, -0.25], [0.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=calm,
        sampling_logprobs=calm,
        advantages=torch.zeros_like(calm),
        completion_mask=mask,
        entropy=torch.zeros_like(calm),
    )
    frozen = Frozen(old=calm, reference=calm, advantages=torch.zeros(2), weights=torch.ones_like(calm))
    estimate = kl_term(bind("kl", TOKEN_ESTIMATORS[name]), frozen, inputs, None)
    (gradient,) = torch.autograd.grad(estimate.sum(), logprobs)
    assert bool(estimate.isfinite().all()) and bool(gradient.isfinite().all())
    assert not estimate[~mask].any() and not gradient[~mask].any()
    assert bool((estimate[mask] != 0).all())


@pytest.mark.parametrize("name", TOKEN_ESTIMATORS)
def test_zero_where_policy_and_reference_agree(name: str) -> None:
    logprobs = torch.tensor([[-0.1, -3.0, -20.0]], dtype=torch.float32)
    data = dict.fromkeys(("logprobs", "ref_logprobs", "old_logprobs", "sampling_logprobs"), logprobs)
    assert not bind("kl", TOKEN_ESTIMATORS[name])(data).any()


@pytest.mark.parametrize("estimator", [k1, k2, k3, absolute])
def test_a_clamp_bounds_value_and_gradient(estimator: Estimator) -> None:
    logprobs = torch.tensor([-30.0, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.tensor([-1.0, -1.0, -31.0], dtype=torch.float64)
    bounded = estimator(logprobs, ref_logprobs, clamp=(20.0, 10.0))
    (gradient,) = torch.autograd.grad(bounded.sum(), logprobs)
    assert float(bounded.detach().abs().max()) == 10.0
    assert gradient[[0, 2]].tolist() == [0.0, 0.0], "beyond the bound nothing pulls"
    assert bounded[1].equal(estimator(logprobs, ref_logprobs)[1]), "within it nothing changes"


def test_k1_in_the_reward_has_the_gradient_of_the_whole_completion() -> None:
    """Two tokens of three letters, the second conditioned on the first.

    The KL of the sequence depends on the first token through the states it leads to. ``k2`` in the loss leaves that
    part out; minus k1 as reward, summed over the row, does not.
    """
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
    second = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    ref_first = torch.randn(3, generator=generator, dtype=torch.float64).log_softmax(dim=0)
    ref_second = torch.randn(3, 3, generator=generator, dtype=torch.float64).log_softmax(dim=1)
    kl, in_reward, in_loss = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for a, b in itertools.product(range(3), repeat=2):
        ours = torch.stack([first.log_softmax(dim=0)[a], second.log_softmax(dim=1)[a, b]])
        theirs = torch.stack([ref_first[a], ref_second[a, b]])
        chance = ours.sum().exp()
        kl = kl + chance * (ours - theirs).sum()
        in_reward = in_reward + chance.detach() * k1(ours, theirs).sum().detach() * ours.sum()
        in_loss = in_loss + chance.detach() * k2(ours, theirs).sum()
    wanted, rewarded, lost = (
        torch.autograd.grad(one, (first, second), retain_graph=True) for one in (kl, in_reward, in_loss)
    )
    assert same(rewarded[0], wanted[0]) and same(rewarded[1], wanted[1])
    assert same(lost[1], wanted[1]), "at the last token nothing comes after"
    assert not same(lost[0], wanted[0])


def test_plugins_show_says_what_the_gradient_of_k3_is() -> None:
    doc = inspect.getdoc(k3) or ""
    assert "*forward* KL(ref || policy)" in doc.partition("\n")[0]
    assert "2506.09477" in doc


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs", "k1_plus", "k3_plus"])
def test_the_clamp_as_people_write_it(name: str) -> None:
    component = load_plugins().registry.get("kl", name)
    built: Any = component.build({"clamp": [float("inf"), 10]})
    assert isinstance(built, functools.partial) and built.keywords["clamp"] == (float("inf"), 10.0)
    with pytest.raises(ConfigError, match=r"`clamp`.*both bounds must be greater than 0"):
        component.validate({"clamp": [-20, 10]})
