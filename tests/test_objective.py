"""What an optimizer step minimizes, term by term and factor by factor; and the fused kernel, equal to the parts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpoforge.binding import bind
from grpoforge.coefficients import AdaptiveEntropy, AdaptiveKL
from grpoforge.collate import collate
from grpoforge.engine import Engine
from grpoforge.fused import FusedObjective, fuse
from grpoforge.metrics import Meter, averages
from grpoforge.objective import Frozen, Objective, Update
from grpoforge.policy import Policy
from grpoforge.reduction import REDUCTIONS
from grpoforge.scoring import BoundReward
from grpoforge.types import Batch, LossInputs, Prompt, Rollouts, TokenLogprobs
from grpoforge_plugins.kl.full import full
from grpoforge_plugins.kl.schulman import k1, k2, k3
from grpoforge_plugins.losses.clip import Clip
from grpoforge_plugins.losses.covariance import KLCov

PROMPTS = [[5, 9, 3], [7], [4, 4, 21, 6]]
COMPLETIONS = [[[3, 8, 1], [14, 6, 20, 9, 2]], [[22], [5, 1]], [[9, 13, 4, 4], [17, 2, 8, 19, 1]]]
ADVANTAGES = torch.tensor([[1.0, -0.5], [0.25, 2.0], [-1.5, 0.0]], dtype=torch.float64)
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def reward(function: Callable[..., Any]) -> BoundReward:
    return BoundReward(name="r", function=function, data=("completions",), weight=1.0)


def half(old_logprobs: Tensor) -> Tensor:
    """Drops the first token of each row and halves the second."""
    weights = torch.ones_like(old_logprobs)
    weights[:, 0], weights[:, 1:2] = 0.0, 0.5
    return weights


@pytest.fixture(scope="module")
def accumulate(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_frozen: Callable[..., Frozen],
    flat_gradient: Callable[[Policy], Tensor],
) -> Callable[..., tuple[dict[str, float], Tensor]]:
    """Metrics and gradient of one optimizer step."""
    current, old, reference = tiny_policy(0), tiny_policy(1, scale=0.97), tiny_policy(2)
    batch = collate(make_rollouts(PROMPTS, COMPLETIONS), pad_token_id=0)

    def run(weights: Tensor | None = None, **choices: Any) -> tuple[dict[str, float], Tensor]:
        engine = make_engine(current, reference=reference, **choices)
        logprobs = [policy.frozen_logprobs(batch, 6).logprobs for policy in (old, reference)]
        frozen = make_frozen(logprobs[0], logprobs[1], ADVANTAGES)
        if weights is not None:
            frozen = Frozen(old=frozen.old, reference=frozen.reference, advantages=frozen.advantages, weights=weights)
        meter = Meter()
        engine.accumulate(batch, frozen, 8, meter)
        return averages(meter.totals), flat_gradient(current)

    return run


def test_terms_add_up(accumulate: Callable[..., Any]) -> None:
    loss, slope = accumulate(beta=0.0)
    with_kl, kl_slope = accumulate(beta=0.3)
    with_both, both_slope = accumulate(beta=0.3, entropy=0.2)
    assert with_kl["loss"] == pytest.approx(loss["loss"] + 0.3 * loss["kl"], rel=1e-10)
    assert with_both["loss"] == pytest.approx(with_kl["loss"] - 0.2 * loss["entropy"], rel=1e-10)
    again, twice_slope = accumulate(beta=0.0, entropy=0.2)
    torch.testing.assert_close(both_slope - slope, (kl_slope - slope) + (twice_slope - slope), rtol=1e-9, atol=1e-12)
    assert float((twice_slope - slope).norm()) > 1e-3, "the entropy has a gradient"
    assert again["entropy"] == loss["entropy"]


def test_corrections_multiply_the_policy_loss_and_nothing_else(accumulate: Callable[..., Any]) -> None:
    plain, plain_slope = accumulate(beta=0.3, entropy=0.2)
    corrected, slope = accumulate(beta=0.3, entropy=0.2, corrections=(half,))
    twice, _ = accumulate(beta=0.3, entropy=0.2, corrections=(half, half))
    none, none_slope = accumulate(beta=0.3, entropy=0.2, corrections=(lambda old_logprobs: old_logprobs * 0,))
    assert plain["kl"] == corrected["kl"] and plain["entropy"] == corrected["entropy"]
    assert not torch.equal(slope, plain_slope) and not torch.equal(slope, none_slope)
    # 20 tokens: 6 first ones weigh 0, 5 second ones 1/2, the other 9 weigh 1.
    assert corrected["correction/mean"] == pytest.approx(11.5 / 20, rel=1e-12)
    assert corrected["correction/zero_share"] == pytest.approx(6 / 20, rel=1e-12)
    assert twice["correction/mean"] == pytest.approx(10.25 / 20, rel=1e-12)
    assert none["loss"] == pytest.approx(0.3 * plain["kl"] - 0.2 * plain["entropy"], rel=1e-10)


def test_tokens_that_are_not_chosen_leave_the_denominator_as_it_is(accumulate: Callable[..., Any]) -> None:
    weights = torch.zeros(6, 5, dtype=torch.float64)
    weights[:, 1] = 1.0
    chosen, slope = accumulate(weights, beta=0.0)
    corrected, other = accumulate(
        beta=0.0, corrections=(lambda old_logprobs: weights[: len(old_logprobs)],), reduction="token"
    )
    assert chosen["loss"] == pytest.approx(corrected["loss"], rel=1e-12)
    torch.testing.assert_close(slope, other)


def test_the_kl_of_the_whole_vocabulary(
    accumulate: Callable[..., Any], tiny_policy: Callable[..., Policy], make_rollouts: Callable[..., Rollouts]
) -> None:
    batch = collate(make_rollouts(PROMPTS, COMPLETIONS), pad_token_id=0)
    found, slope = accumulate(beta=0.5, kl=full)
    split, split_slope = accumulate(beta=0.5, kl=full, micro_batch_size=2)
    with torch.no_grad():
        log_p, log_q = (tiny_policy(seed).distributions(batch)[1] for seed in (0, 2))
    assert found["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean()), rel=1e-9)
    assert split["kl"] == pytest.approx(found["kl"], rel=1e-12)
    torch.testing.assert_close(split_slope, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_loss_that_looks_at_the_whole_minibatch_does_not_depend_on_the_micro_batch(
    micro: int, accumulate: Callable[..., Any]
) -> None:
    loss = KLCov(share=0.3)
    whole, slope = accumulate(loss=loss, beta=0.1, entropy=0.1)
    parts, parts_slope = accumulate(loss=loss, beta=0.1, entropy=0.1, micro_batch_size=micro)
    assert parts == pytest.approx(whole, rel=1e-10)
    torch.testing.assert_close(parts_slope, slope, rtol=1e-9, atol=1e-12)


def plain_objective(kl: str | None, **clip: float) -> Objective:
    return Objective(loss=Clip(**clip), kl=bind("kl", ESTIMATORS[kl]) if kl else None, corrections=())


@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3"])
@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
@pytest.mark.parametrize(
    "clip",
    [{}, {"epsilon_low": 0.1, "epsilon_high": 0.28}, {"delta": 1.5}, {"dual_clip": 1.3}],
    ids=["plain", "asymmetric", "delta", "dual"],
)
@given(data=st.data())
def test_the_fused_kernel_equals_the_parts(
    kl: str | None, reduction: str, clip: dict[str, float], data: st.DataObject
) -> None:
    composed = plain_objective(kl, **clip)
    fused, said = fuse(composed, entropy_bonus=False, chooses_tokens=False)
    assert isinstance(fused, FusedObjective) and said == "one kernel (grpo_loss)"
    seed = data.draw(st.integers(0, 9999))
    found = [one_update(objective, reduction, data_seed=seed) for objective in (composed, fused)]
    (loss, slope, metrics), (fused_loss, fused_slope, fused_metrics) = found
    assert fused_loss == pytest.approx(loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(fused_slope, slope, rtol=1e-11, atol=1e-14)
    assert fused_metrics == pytest.approx(metrics, rel=1e-12, abs=1e-14)


def one_update(objective: Objective, reduction: str, *, data_seed: int) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics on made-up log-probs in float64, ratios on both sides of every clip."""
    from grpoforge.reduction import count, token_weights

    generator = torch.Generator().manual_seed(data_seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(7) < torch.randint(0, 8, (5, 1), generator=generator)
    mask[0, 0] = True
    logprobs = (normal(5, 7) - 2).requires_grad_()
    batch = Batch(
        prompt_ids=torch.zeros(5, 1, dtype=torch.int64),
        prompt_mask=torch.ones(5, 1, dtype=torch.bool),
        completion_ids=torch.zeros(5, 7, dtype=torch.int64),
        completion_mask=mask,
        sampling_logprobs=torch.zeros(5, 7),
        temperatures=torch.ones(5, dtype=torch.float64),
    )
    old = logprobs.detach() + 0.4 * normal(5, 7)
    # What stands at masked places must not matter.
    old = torch.where(mask, old, 1e4)
    frozen = Frozen(
        old=old, reference=old + 0.3 * normal(5, 7), advantages=normal(5).round(), weights=torch.ones_like(old)
    )
    meter = Meter()
    update = Update(beta=0.2, entropy_coefficient=0.0, seed=0, is_unmoved=True, meter=meter)
    weights = token_weights(reduction, mask, count(mask, 9))  # type: ignore[arg-type]
    current = TokenLogprobs(logprobs=logprobs, entropy=torch.ones_like(old))
    loss = objective(batch, frozen, weights, current, update)
    return float(loss.detach()), torch.autograd.grad(loss, logprobs)[0], averages(meter.totals)


class AnotherCall(Clip):
    """Computes something else under an inherited name."""

    def __call__(self, inputs: LossInputs) -> Any:
        loss, metrics = super().__call__(inputs)
        return 2 * loss, metrics


class OtherDefaults(Clip):
    """Computes the same."""

    def __init__(self) -> None:
        super().__init__(epsilon_high=0.28)


@functools.wraps(k3)
def clamped(logprobs: Tensor, ref_logprobs: Tensor, *, clamp: Any = None) -> Tensor:
    return k3(logprobs, ref_logprobs, clamp=clamp).clamp(max=1)


class Estimator:
    kernel_form = "k3"

    def __call__(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return k3(logprobs, ref_logprobs)


class AnotherEstimator(Estimator):
    def __call__(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return 2 * k3(logprobs, ref_logprobs)


NO_LOSS, NO_KL = "its loss has no fused kernel", "its KL estimator has no fused kernel"


@pytest.mark.parametrize(
    ("objective", "options", "reason"),
    [
        (Objective(loss=lambda inputs: None, kl=None, corrections=()), {}, NO_LOSS),
        (Objective(loss=AnotherCall(), kl=None, corrections=()), {}, NO_LOSS),
        (Objective(loss=Clip(), kl=bind("kl", full), corrections=()), {}, NO_KL),
        (Objective(loss=Clip(), kl=bind("kl", clamped), corrections=()), {}, NO_KL),
        (Objective(loss=Clip(), kl=bind("kl", functools.partial(clamped, clamp=None)), corrections=()), {}, NO_KL),
        (Objective(loss=Clip(), kl=bind("kl", AnotherEstimator()), corrections=()), {}, NO_KL),
        (plain_objective("k3"), {"entropy_bonus": True}, "it has an entropy bonus"),
        (plain_objective("k3"), {"chooses_tokens": True}, "it is taken on some tokens only"),
        (
            Objective(loss=Clip(), kl=None, corrections=(bind("correction", half),)),
            {},
            "off-policy corrections weigh its tokens",
        ),
    ],
)
def test_other_parts_are_composed(objective: Objective, options: dict[str, bool], reason: str) -> None:
    chosen, said = fuse(objective, **({"entropy_bonus": False, "chooses_tokens": False} | options))
    assert chosen is objective and said == f"composed of its parts: {reason}"


def test_a_name_that_a_component_has_of_its_own_counts() -> None:
    plain = Objective(loss=OtherDefaults(), kl=bind("kl", Estimator()), corrections=())
    fused, said = fuse(plain, entropy_bonus=False, chooses_tokens=False)
    assert said == "one kernel (grpo_loss)" and isinstance(fused, FusedObjective)
    assert (fused.clip.epsilon_high, fused.kl_form) == (0.28, "k3")


def test_options_of_an_estimator_that_are_off_do_not_matter() -> None:
    def said(clamp: Any) -> str:
        kl = bind("kl", functools.partial(k3, clamp=clamp))
        return fuse(Objective(loss=Clip(), kl=kl, corrections=()), entropy_bonus=False, chooses_tokens=False)[1]

    assert said(None) == "one kernel (grpo_loss)"
    assert said((20.0, 10.0)) == "composed of its parts: its KL estimator has no fused kernel"


def share_of_a(completions: list[str]) -> list[float]:
    return [text.count("a") / max(len(text), 1) for text in completions]


def step(
    make_engine: Callable[..., Engine],
    tiny_policy: Callable[..., Policy],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
    **choices: Any,
) -> tuple[Any, Engine]:
    engine = make_engine(
        tiny_policy(),
        sampler=given_rollouts(make_rollouts(PROMPTS, COMPLETIONS)),
        rewards=[reward(share_of_a)],
        **choices,
    )
    return engine.step(make_prompts(PROMPTS), step=1, seed=0), engine


@pytest.fixture
def take_step(
    make_engine: Callable[..., Engine],
    tiny_policy: Callable[..., Policy],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
) -> Callable[..., tuple[Any, Engine]]:
    def take(**choices: Any) -> tuple[Any, Engine]:
        return step(make_engine, tiny_policy, make_rollouts, make_prompts, given_rollouts, **choices)

    return take


def test_the_kl_in_the_reward_is_a_reward_of_its_own(
    take_step: Callable[..., Any], tiny_policy: Callable[..., Policy], make_rollouts: Callable[..., Rollouts]
) -> None:
    report, _ = take_step(reference=tiny_policy(2), beta=0.5, kl=k1, kl_in_reward=True)
    batch = collate(make_rollouts(PROMPTS, COMPLETIONS), pad_token_id=0)
    gaps = tiny_policy().frozen_logprobs(batch, 6).logprobs - tiny_policy(2).frozen_logprobs(batch, 6).logprobs
    expected = gaps.sum(dim=1).reshape(3, 2)
    assert report.scores.names == ("r", "kl")
    torch.testing.assert_close(report.scores.rewards[:, :, 1], expected, rtol=1e-9, atol=1e-12)
    assert report.scores.weights.tolist() == [1.0, -0.5]
    assert report.metrics["kl"] == pytest.approx(float(expected.sum()) / 20, rel=1e-9)
    total = report.scores.rewards[:, :, 0] - 0.5 * expected
    assert bool(((report.advantages > 0) == (total > total.mean(dim=1, keepdim=True))).all())
    torch.testing.assert_close(report.shares.sum(dim=2), report.advantages)


def test_an_adaptive_beta_follows_the_kl(take_step: Callable[..., Any], tiny_policy: Callable[..., Policy]) -> None:
    beta = AdaptiveKL(0.5, target=0.001, horizon=60)
    report, engine = take_step(reference=tiny_policy(2), beta=beta)
    assert report.metrics["coefficient/beta"] == 0.5 and report.metrics["kl"] > 0.002
    assert engine.algorithm.beta.value == pytest.approx(0.5 * (1 + 0.2 * 6 / 60))


def test_an_adaptive_entropy_bonus_begins_after_the_first_step(take_step: Callable[..., Any]) -> None:
    bonus = AdaptiveEntropy(0.01, target=10.0, delta=0.005, maximum=1.0)
    report, _ = take_step(entropy=bonus)
    assert report.metrics["coefficient/entropy_coef"] == 0.0 and bonus.value == pytest.approx(0.015)


def test_the_tokens_of_highest_entropy(take_step: Callable[..., Any]) -> None:
    _, engine = take_step(top_entropy_quantile=0.4)
    entropy = torch.tensor([[0.5, 2.0, 9.0], [1.0, 1.0, 0.1]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    # Two of the five real tokens; what stands at masked places does not count, and ties go in together.
    assert engine.high_entropy(entropy, mask)[mask].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert engine.high_entropy(entropy, torch.zeros_like(mask)).shape == (2, 3)


def test_effective_sample_size_is_reported(take_step: Callable[..., Any]) -> None:
    report, _ = take_step(corrections=(half,))
    # (6 * 0 + 5 / 2 + 9)^2 / (20 * (5 / 4 + 9))
    assert report.metrics["sampling/ess"] == pytest.approx(11.5**2 / (20 * 10.25), rel=1e-12)
    assert "correction/square" not in report.metrics


def test_truncated_completions_are_left_out_of_the_loss(take_step: Callable[..., Any]) -> None:
    report, _ = take_step(mask_truncated=True)
    assert report.metrics["completions/clipped_ratio"] == 0.5
    assert math.isfinite(report.metrics["loss"])
    everything, _ = take_step()
    assert report.metrics["loss"] != everything.metrics["loss"]
