"""One step: what it computes at step 0, what it survives, how often it updates, and that it learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.binding import bind
from grpoforge.collate import collate, split
from grpoforge.engine import Engine
from grpoforge.errors import PluginError, RunFailed
from grpoforge.metrics import Meter
from grpoforge.objective import Frozen, kl_term
from grpoforge.policy import Policy
from grpoforge.precision import Precision
from grpoforge.reduction import REDUCTIONS, count, reduce, token_weights
from grpoforge.scoring import BoundReward
from grpoforge.types import LossInputs, PolicyView, Prompt, Rollouts
from grpoforge_plugins.kl.schulman import k1, k2, k3
from grpoforge_plugins.losses.clip import Clip
from grpoforge_plugins.samplers.hf import HFSampler, generate, seeded

EOS = 1
PROMPTS = [[5, 9, 3], [7], [4, 4, 21, 6]]
COMPLETIONS = [[[3, 8, 1], [14, 6, 20, 9, 2]], [[22], [5, 1]], [[9, 13, 4, 4], [17, 2, 8, 19, 1]]]


def share_of_a(completions: Sequence[str]) -> list[float]:
    return [text.count("a") / max(len(text), 1) for text in completions]


def reward(function: Callable[..., Any], name: str = "share") -> BoundReward:
    return BoundReward(name=name, function=function, data=("completions",), weight=1.0)


class TwoTemperatures:
    """Paired sampling: even rows of a group at 0.7, odd rows at 1.3."""

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        with seeded(seed, policy.device):
            drawn = generate(policy, rows, [0.7, 1.3] * (len(rows) // 2), 6, do_sample=True)
        return Rollouts(
            prompts=tuple(prompts),
            completions=tuple(tuple(drawn[rows_of]) for rows_of in split(len(rows), group_size)),
            max_completion_length=6,
        )

    def sync(self, policy: PolicyView) -> None: ...


def weights_of(policy: Policy) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in policy.model.parameters()]


def all_equal(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("micro", [1, 3, 64])
def test_step_0_has_ratio_1_and_no_kl(
    micro: int,
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_prompts: Callable[..., tuple[Prompt, ...]],
) -> None:
    policy = tiny_policy(dtype=torch.float32)
    policy.model.generation_config.repetition_penalty = 1.3
    policy.model.generation_config.top_k = 5
    policy.model.generation_config.temperature = 0.6
    engine = make_engine(
        policy,
        sampler=TwoTemperatures(),
        rewards=[reward(share_of_a)],
        reference=policy.freeze(),
        beta=0.1,
        group_size=4,
        micro_batch_size=micro,
    )
    report = engine.step(make_prompts(PROMPTS), step=1, seed=3)
    assert {completion.temperature for completion in report.rollouts.flat()} == {0.7, 1.3}
    assert report.metrics["invariant/ratio_dev_step0"] == 0.0
    assert report.metrics["invariant/kl_step0"] == 0.0
    assert report.metrics["kl"] == 0.0
    assert report.metrics["clip_ratio/region_mean"] == 0.0
    assert report.metrics["sampling/sampling_logp_difference/mean"] < 1e-6
    assert report.metrics["sampling/sampling_logp_difference/max"] < 1e-5


def test_minibatches_of_other_shapes_keep_step_0_at_ratio_1_to_rounding(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_prompts: Callable[..., tuple[Prompt, ...]],
) -> None:
    # The first minibatch holds other rows than the passes that gave the old log-probs: other sums, other rounding.
    policy = tiny_policy(dtype=torch.float32)
    engine = make_engine(
        policy, sampler=TwoTemperatures(), rewards=[reward(share_of_a)], group_size=4, minibatch_size=3
    )
    report = engine.step(make_prompts(PROMPTS), step=1, seed=3)
    assert report.metrics["invariant/ratio_dev_step0"] < 1e-5


def test_step_0_under_bf16_autocast(
    tiny_policy: Callable[..., Policy],
    tiny_model: Callable[..., Any],
    make_engine: Callable[..., Engine],
    make_prompts: Callable[..., tuple[Prompt, ...]],
) -> None:
    tokenizer = tiny_policy().tokenizer
    policy = Policy(tiny_model(0, torch.float32), tokenizer, Precision(torch.float32, autocast=torch.bfloat16))
    engine = make_engine(policy, sampler=TwoTemperatures(), rewards=[reward(share_of_a)], group_size=4)
    report = engine.step(make_prompts(PROMPTS), step=1, seed=3)
    assert report.metrics["invariant/ratio_dev_step0"] <= 1e-3
    # Decoding token by token rounds differently from one pass over the whole row: this is the size of that gap.
    assert report.metrics["sampling/sampling_logp_difference/mean"] < 0.05
    assert math.isfinite(report.metrics["grad_norm"]) and report.metrics["grad_norm"] > 0


@pytest.mark.parametrize("garbage", [1e4, -1e4, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_masked_positions_reach_neither_loss_nor_gradient(
    garbage: float,
    estimator: Any,
    make_frozen: Callable[..., Frozen],
) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def loss_and_gradient(masked: float) -> tuple[Tensor, Tensor]:
        logprobs = torch.full((2, 3), -1.0, dtype=torch.float64)
        logprobs = torch.where(mask, logprobs, torch.full_like(logprobs, masked)).requires_grad_()
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=torch.full_like(logprobs, -1.1),
            sampling_logprobs=torch.full_like(logprobs, -1.1),
            advantages=torch.tensor([[1.0] * 3, [-0.5] * 3], dtype=torch.float64),
            completion_mask=mask,
            entropy=torch.zeros_like(logprobs),
        )
        frozen = make_frozen(inputs.old_logprobs, torch.full_like(logprobs, -0.7), torch.zeros(2))
        kl = kl_term(bind("kl", estimator), frozen, inputs, None)
        weights = token_weights("sequence", mask, count(mask, 3))
        loss = reduce(Clip()(inputs)[0] + 0.5 * kl, weights)
        return loss.detach(), torch.autograd.grad(loss, logprobs)[0]

    clean, dirty = loss_and_gradient(0.0), loss_and_gradient(garbage)
    assert bool(dirty[0].isfinite()) and bool(dirty[1].isfinite().all())
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert dirty[1][~mask].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("garbage", [1e4, -1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
def test_garbage_in_frozen_logprobs_where_masked_changes_no_weight_gradient(
    garbage: float,
    reduction: str,
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    flat_gradient: Callable[[Policy], Tensor],
    make_frozen: Callable[..., Frozen],
) -> None:
    policy = tiny_policy()
    engine = make_engine(policy, reference=tiny_policy(2), beta=0.1, reduction=reduction)
    batch = collate(make_rollouts(PROMPTS, COMPLETIONS), pad_token_id=0)
    with torch.no_grad():
        logprobs = policy.logprobs(batch).logprobs
    found = []
    for value in (0.0, garbage):
        old = torch.where(batch.completion_mask, logprobs + 0.1, value)
        reference = torch.where(batch.completion_mask, old, value)
        engine.accumulate(batch, make_frozen(old, reference, torch.tensor([[1.0, -1.0]] * 3)), 8, Meter())
        found.append(flat_gradient(policy))
    assert bool(found[1].isfinite().all()) and float(found[0].norm()) > 0
    assert torch.equal(found[0], found[1])


def test_rows_without_tokens_weigh_nothing(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    flat_gradient: Callable[[Policy], Tensor],
    make_frozen: Callable[..., Frozen],
) -> None:
    policy = tiny_policy()
    found = []
    for completions in ([[[3, 8, 1], [4, 9]]], [[[3, 8, 1], [4, 9], [], []]]):
        engine = make_engine(policy, reduction="sequence", micro_batch_size=2, reference=tiny_policy(2), beta=0.1)
        advantages = torch.tensor([[1.0, -0.5, 2.0, 2.0][: len(completions[0])]])
        batch = collate(make_rollouts([[5, 9]], completions), pad_token_id=0)
        old, reference = engine.freeze(batch, Meter())
        engine.accumulate(batch, make_frozen(old.logprobs, reference, advantages), 8, Meter())
        found.append(flat_gradient(policy))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-14)


def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_weights(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
) -> None:
    def nan_loss(inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        return inputs.logprobs * float("nan"), {}

    policy = tiny_policy()
    sampler = given_rollouts(make_rollouts(PROMPTS, COMPLETIONS))
    before = weights_of(policy)
    engine = make_engine(policy, sampler=sampler, rewards=[reward(share_of_a)], loss=nan_loss)
    with pytest.raises(RunFailed) as failure:
        engine.step(make_prompts(PROMPTS), step=1, seed=0)
    assert failure.value.message == (
        "the gradient norm is nan at optimizer step 1, the largest |advantage| of its rows 0.707; "
        "the weights are unchanged"
    )
    assert failure.value.hint == (
        "lower `optim.learning_rate`; if that advantage is extreme, so is a reward of its group or its weight"
    )
    assert failure.value.exit_code == 1
    assert all_equal(weights_of(policy), before)
    assert policy.version == 0 and sampler.num_syncs == 0
    assert all(parameter.grad is None for parameter in policy.trainable())


@pytest.mark.parametrize(
    ("part", "choices"),
    [
        ("loss", {"loss": lambda inputs: (inputs.logprobs.mean(), {})}),
        ("KL estimator", {"kl": lambda logprobs, ref_logprobs: (logprobs - ref_logprobs).mean(dim=1), "beta": 0.1}),
        ("advantage", {"advantage": lambda rewards, weights: rewards.mean()}),
    ],
)
def test_a_part_of_another_shape_stops_the_run_before_a_wrong_gradient(
    part: str,
    choices: Mapping[str, Any],
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
) -> None:
    policy = tiny_policy()
    engine = make_engine(
        policy,
        sampler=given_rollouts(make_rollouts(PROMPTS, COMPLETIONS)),
        rewards=[reward(share_of_a)],
        reference=tiny_policy(2),
        **choices,
    )
    with pytest.raises(PluginError, match=f"^{part} `<lambda>` returned"):
        engine.step(make_prompts(PROMPTS), step=1, seed=0)
    assert policy.version == 0 and all(parameter.grad is None for parameter in policy.trainable())


def test_rewards_that_all_abstain_move_nothing(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
) -> None:
    policy = tiny_policy()
    before = weights_of(policy)
    engine = make_engine(
        policy,
        sampler=given_rollouts(make_rollouts(PROMPTS, COMPLETIONS)),
        rewards=[reward(lambda completions: [None] * len(completions))],
    )
    report = engine.step(make_prompts(PROMPTS), step=1, seed=0)
    assert report.metrics["grad_norm"] == 0.0 and report.metrics["loss"] == 0.0
    assert report.metrics["rewards/share/unscored"] == 1.0
    assert math.isnan(report.metrics["reward"])
    assert not report.advantages.any() and not report.shares.any()
    assert all_equal(weights_of(policy), before)


def test_each_row_is_used_once_per_epoch(
    tiny_policy: Callable[..., Policy], make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(tiny_policy(), epochs=3, minibatch_size=4)
    parts = [part.tolist() for part in engine.minibatches(12, seed=5)]
    assert [len(part) for part in parts] == [4] * 9
    epochs = [parts[:3], parts[3:6], parts[6:]]
    for epoch in epochs:
        assert sorted(row for part in epoch for row in part) == list(range(12))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0], "every epoch has an order of its own"
    assert parts == [part.tolist() for part in engine.minibatches(12, seed=5)]
    assert parts != [part.tolist() for part in engine.minibatches(12, seed=6)]


@pytest.mark.parametrize("minibatch_size", [4, 6])
def test_groups_stay_together_in_minibatches(
    minibatch_size: int, tiny_policy: Callable[..., Policy], make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(tiny_policy(), epochs=2, minibatch_size=minibatch_size, group_size=2)
    for part in engine.minibatches(12, seed=5):
        rows = part.tolist()
        assert rows == [row for first in rows[::2] for row in (first, first + 1)]
        assert all(first % 2 == 0 for first in rows[::2])


@pytest.mark.parametrize(("epochs", "minibatch_size", "updates"), [(1, 6, 1), (1, 2, 3), (3, 6, 3), (2, 3, 4)])
def test_number_of_optimizer_steps(
    epochs: int,
    minibatch_size: int,
    updates: int,
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
) -> None:
    policy = tiny_policy()
    sampler = given_rollouts(make_rollouts(PROMPTS, COMPLETIONS))
    engine = make_engine(
        policy, sampler=sampler, rewards=[reward(share_of_a)], epochs=epochs, minibatch_size=minibatch_size
    )
    engine.step(make_prompts(PROMPTS), step=1, seed=0)
    assert policy.version == updates
    assert engine.schedule.last_epoch == updates
    assert sampler.num_syncs == 1


def test_the_report_is_complete(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
) -> None:
    engine = make_engine(
        tiny_policy(), sampler=given_rollouts(make_rollouts([[5]], [[[2, 2, 1], [2, 3]]])), rewards=[reward(share_of_a)]
    )
    report = engine.step(make_prompts([[5]]), step=7, seed=0)
    # Rewards 1 and 1/2: gap 1/2, std 1/(2 sqrt 2), so A = +-(1/4) / (0.35355 + 1e-4).
    expected = 0.25 / (0.5 / math.sqrt(2) + 1e-4)
    assert report.step == 7
    assert report.advantages.flatten().tolist() == pytest.approx([expected, -expected], rel=1e-12)
    assert report.shares.sum(dim=2).flatten().tolist() == pytest.approx([expected, -expected], rel=1e-12)
    assert report.metrics["reward"] == 0.75
    assert report.metrics["completions/mean_length"] == 2.5
    assert report.metrics["completions/clipped_ratio"] == 0.5
    assert report.metrics["learning_rate"] == 0.01
    # At ratio 1 the loss is minus the token mean of the advantages: -(3 A - 2 A) / 5.
    assert report.metrics["loss"] == pytest.approx(-expected / 5, rel=1e-12)
    assert not {"kl", "invariant/kl_step0"} & set(report.metrics), "without a reference there is no KL to report"
    times = {name for name in report.metrics if name.startswith("time/")}
    assert times == {"time/rollout", "time/reward", "time/logprobs", "time/update"}


def test_gradients_are_scaled_down_to_the_largest_norm(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
) -> None:
    policy = tiny_policy()
    before = weights_of(policy)
    engine = make_engine(
        policy,
        sampler=given_rollouts(make_rollouts(PROMPTS, COMPLETIONS)),
        rewards=[reward(share_of_a)],
        learning_rate=1.0,
        max_grad_norm=0.01,
    )
    report = engine.step(make_prompts(PROMPTS), step=1, seed=0)
    moved = torch.cat([(one - other).flatten() for one, other in zip(weights_of(policy), before, strict=True)])
    assert report.metrics["grad_norm"] > 0.01, "the norm before clipping is reported"
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-4)


def learner(policy: Policy, make_engine: Callable[..., Engine], function: Callable[..., Any], **choices: Any) -> Engine:
    return make_engine(
        policy,
        optimizer=torch.optim.AdamW(policy.trainable(), lr=0.01, weight_decay=0.0),
        sampler=HFSampler(max_completion_length=4),
        rewards=[reward(function)],
        group_size=8,
        max_grad_norm=1.0,
        **choices,
    )


def test_it_learns(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_prompts: Callable[..., tuple[Prompt, ...]],
) -> None:
    engine = learner(tiny_policy(dtype=torch.float32), make_engine, share_of_a)
    prompts = make_prompts([*PROMPTS, [11, 2]])
    rewards = [engine.step(prompts, step=step, seed=step).metrics["reward"] for step in range(1, 41)]
    assert rewards[0] < 0.2
    assert sum(rewards[-5:]) / 5 > 0.9


def test_a_constant_reward_teaches_nothing(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_prompts: Callable[..., tuple[Prompt, ...]],
) -> None:
    policy = tiny_policy(dtype=torch.float32)
    before = weights_of(policy)
    engine = learner(
        policy, make_engine, lambda completions: [0.3] * len(completions), reference=policy.freeze(), beta=0.1
    )
    for step in range(1, 4):
        engine.step(make_prompts(PROMPTS), step=step, seed=step)
    assert all_equal(weights_of(policy), before)


def test_equal_seeds_give_equal_steps(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_prompts: Callable[..., tuple[Prompt, ...]],
) -> None:
    first, second = (tiny_policy(dtype=torch.float32) for _ in range(2))
    reports = []
    for policy in (first, second):
        torch.manual_seed(id(policy) % 1000)  # the global generator must not matter
        engine = learner(policy, make_engine, share_of_a, minibatch_size=8, epochs=2)
        reports.append([engine.step(make_prompts(PROMPTS), step=step, seed=step) for step in (1, 2)])
    assert [report.rollouts for report in reports[0]] == [report.rollouts for report in reports[1]]
    assert all_equal(weights_of(first), weights_of(second))
    assert not all_equal(weights_of(first), weights_of(copy.deepcopy(tiny_policy(dtype=torch.float32))))
