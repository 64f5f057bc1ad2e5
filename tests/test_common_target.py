"""Log-probs at a common temperature: taken when a correction asks for them, of the policy before it moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.binding import bind
from grpoforge.collate import collate
from grpoforge.engine import Engine
from grpoforge.metrics import Meter
from grpoforge.objective import Objective
from grpoforge.policy import Policy
from grpoforge.scoring import BoundReward
from grpoforge.types import Prompt, Rollouts
from grpoforge_plugins.advantages.group import group_mean
from grpoforge_plugins.corrections.target import TargetSequenceMask, TargetTIS
from grpoforge_plugins.losses.clip import Clip
from grpoforge_plugins.losses.covariance import KLCov

PROMPTS = [[5, 9, 3], [7]]
COMPLETIONS = [[[3, 8, 1], [14, 6, 20, 9, 2]], [[22, 3], [5, 1]]]
PAIRED = [[0.7, 1.3]] * 2


def given_rewards(completions: Sequence[str]) -> list[float]:
    return [1.0, 0.0, 0.25, 0.5]


Take = Callable[..., tuple[Any, Engine]]


@pytest.fixture
def take_step(
    make_engine: Callable[..., Engine],
    tiny_policy: Callable[..., Policy],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
) -> Take:
    def take(temperatures: Sequence[Sequence[float]] = PAIRED, **choices: Any) -> tuple[Any, Engine]:
        engine = make_engine(
            tiny_policy(),
            sampler=given_rollouts(make_rollouts(PROMPTS, COMPLETIONS, temperatures)),
            rewards=[BoundReward(name="r", function=given_rewards, data=("completions",), weight=1.0)],
            advantage=group_mean,
            **choices,
        )
        return engine.step(make_prompts(PROMPTS), step=1, seed=0), engine

    return take


def moved(engine: Engine) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in engine.policy.trainable()])


@pytest.mark.parametrize("target", [1.0, 0.5])
def test_the_weights_are_those_of_two_passes(
    target: float,
    take_step: Take,
    tiny_policy: Callable[..., Policy],
    make_rollouts: Callable[..., Rollouts],
) -> None:
    seen: dict[str, Tensor] = {}

    class Spy(TargetTIS):
        """Remembers what it is given, and weighs as its parent."""

        def __call__(self, target_logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
            seen.update(target=target_logprobs, old=old_logprobs, mask=completion_mask)
            return super().__call__(target_logprobs, old_logprobs, completion_mask)

    report, _ = take_step(corrections=(Spy(target_temperature=target, cap=5.0),))
    batch = collate(make_rollouts(PROMPTS, COMPLETIONS, PAIRED), pad_token_id=0)
    same = dataclasses.replace(batch, temperatures=torch.full_like(batch.temperatures, target))
    own, there = (tiny_policy().frozen_logprobs(one, 64).logprobs for one in (batch, same))
    mask = batch.completion_mask
    assert seen["mask"].equal(mask)
    torch.testing.assert_close(seen["target"], torch.where(mask, there, 0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen["old"], torch.where(mask, own, 0.0), rtol=0, atol=1e-12)
    weights = (there - own)[mask].exp().clamp(max=5.0)
    assert float((weights - 1).abs().max()) > 0.1, "the temperatures differ"
    assert report.metrics["correction/mean"] == pytest.approx(float(weights.mean()), rel=1e-12)
    assert report.metrics["sampling/ess"] == pytest.approx(
        float(weights.sum() ** 2 / (len(weights) * weights.square().sum())), rel=1e-12
    )


def test_rows_at_the_target_are_left_as_they_are(take_step: Take) -> None:
    for correction in (TargetTIS(), TargetSequenceMask(), TargetTIS(target_temperature=1.0)):
        corrected, plain = take_step([[1.0, 1.0]] * 2, corrections=(correction,))[1], take_step([[1.0, 1.0]] * 2)[1]
        assert moved(corrected).equal(moved(plain))
    at_target, plain = take_step(corrections=(TargetTIS(),))[1], take_step()[1]
    assert not moved(at_target).equal(moved(plain))


@pytest.mark.parametrize(
    "choices",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {"micro_batch_size": 1, "minibatch_size": 2},
        {"micro_batch_size": 1, "loss": KLCov()},
    ],
    ids=["single rows", "uneven", "two updates", "whole minibatch"],
)
def test_micro_batches_change_nothing(choices: dict[str, Any], take_step: Take) -> None:
    whole = take_step(corrections=(TargetTIS(),), **({} | choices | {"micro_batch_size": 64}))[1]
    parts = take_step(corrections=(TargetTIS(),), **choices)[1]
    torch.testing.assert_close(moved(parts), moved(whole), rtol=1e-9, atol=1e-12)


def test_no_correction_that_asks_costs_no_pass(take_step: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[float] = []
    frozen_logprobs = Policy.frozen_logprobs

    def counted(self: Policy, batch: Any, micro: int) -> Any:
        passes.append(float(batch.temperatures[0]))
        return frozen_logprobs(self, batch, micro)

    monkeypatch.setattr(Policy, "frozen_logprobs", counted)
    take_step()
    assert passes == [], "one update: its own forward pass tells the old log-probs"
    take_step(corrections=(TargetTIS(target_temperature=2.0), TargetSequenceMask(target_temperature=2.0)))
    assert passes == [0.7, 2.0], "old log-probs are compared with, and one pass more for both"


def test_step_0_stays_at_ratio_1(take_step: Take, tiny_policy: Callable[..., Policy]) -> None:
    report, _ = take_step(corrections=(TargetTIS(),), reference=tiny_policy(), beta=0.1)
    assert report.metrics["invariant/ratio_dev_step0"] == 0.0 and report.metrics["invariant/kl_step0"] == 0.0


def test_the_temperature_comes_from_the_correction_that_asks() -> None:
    def of(*corrections: Any) -> float | None:
        bound = [bind("correction", one) for one in corrections]
        return Objective(loss=Clip(), kl=None, corrections=bound).target_temperature

    def plain(target_logprobs: Tensor) -> Tensor:
        return target_logprobs

    assert of() is None
    assert of(lambda old_logprobs: old_logprobs) is None
    assert of(plain) == 1.0
    assert of(lambda old_logprobs: old_logprobs, TargetTIS(target_temperature=0.7)) == 0.7


def test_frozen_rows_take_their_target_along(
    take_step: Take, make_rollouts: Callable[..., Rollouts], make_frozen: Callable[..., Any]
) -> None:
    _, engine = take_step(corrections=(TargetTIS(),))
    batch = collate(make_rollouts(PROMPTS, COMPLETIONS, PAIRED), pad_token_id=0)
    target = engine.at_target(batch)
    assert target is not None
    frozen = dataclasses.replace(make_frozen(*[engine.freeze(batch, Meter())[1]] * 2, torch.zeros(2, 2)), target=target)
    index = torch.tensor([3, 1])
    assert frozen.rows(index).target.equal(target[index])
    assert dataclasses.replace(frozen, target=None).rows(index).target is None
