"""What flows checks its sizes when it is built, and computes ratios that masks cannot poison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from grpoforge.types import Completion, LossInputs, Prompt, Rollouts, Scores, StepReport, TokenLogprobs, weighted_total

NAN = float("nan")


@pytest.fixture
def rollouts(make_rollouts: Callable[..., Rollouts]) -> Rollouts:
    return make_rollouts([[5], [6]], [[[2], [3, 1]], [[4, 4], [1]]])


def test_rollouts_are_prompt_major(rollouts: Rollouts) -> None:
    assert (rollouts.num_prompts, rollouts.group_size) == (2, 2)
    assert [completion.token_ids for completion in rollouts.flat()] == [(2,), (3, 1), (4, 4), (1,)]
    assert [prompt.token_ids for prompt in rollouts.flat_prompts()] == [(5,), (5,), (6,), (6,)]
    assert rollouts.column("row") == [0, 0, 1, 1]
    with pytest.raises(KeyError):
        rollouts.column("answer")


def test_rollouts_are_rectangular_and_frozen(rollouts: Rollouts) -> None:
    with pytest.raises(AssertionError, match=r"groups differ in size: \[1, 2\]"):
        replace(rollouts, completions=(rollouts.completions[0], rollouts.completions[1][:1]))
    with pytest.raises(AssertionError, match="one group per prompt"):
        replace(rollouts, prompts=rollouts.prompts[:1])
    with pytest.raises(FrozenInstanceError):
        rollouts.max_completion_length = 3  # type: ignore[misc]


def test_a_completion_has_one_logprob_per_token_and_a_positive_temperature() -> None:
    whole = Completion(
        text="a", token_ids=(2,), logprobs=(-0.5,), temperature=1.0, finish_reason="stop", policy_version=0
    )
    with pytest.raises(AssertionError, match="one log-prob per token"):
        replace(whole, logprobs=())
    with pytest.raises(AssertionError, match="temperatures are positive"):
        replace(whole, temperature=0.0)
    with pytest.raises(AssertionError, match="at least one token"):
        Prompt(text="", token_ids=(), columns={}, index=0)


def scores(rewards: list[list[list[float]]], weights: list[float]) -> Scores:
    return Scores(
        names=tuple(f"r{index}" for index in range(len(weights))),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        raw=torch.tensor(rewards, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
        seconds=(0.0,) * len(weights),
    )


def test_a_missing_component_counts_as_0_and_a_row_without_any_stays_unscored() -> None:
    total = scores([[[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [NAN, NAN]]], [1.0, 0.5]).total()
    assert total.dtype == torch.float64
    assert total[0, :3].tolist() == [2.0, 1.0, 1.0] and bool(total[0, 3].isnan())


def test_weighted_total_of_a_reward_of_weight_0() -> None:
    # A reward that is only watched counts for nothing: a row that no other scored must not compete with total 0.
    total = weighted_total(torch.tensor([[[NAN, 3.0], [2.0, 3.0]]]), torch.tensor([1.0, 0.0]))
    assert bool(total[0, 0].isnan()) and total[0, 1] == 2.0


def test_scores_and_reports_check_their_sizes(rollouts: Rollouts) -> None:
    made = scores([[[1.0], [0.0]], [[1.0], [1.0]]], [1.0])
    with pytest.raises(AssertionError, match=r"rewards are \[P, G, K\]"):
        replace(made, names=("r0", "r1"))
    report = StepReport(
        step=1, metrics={}, rollouts=rollouts, scores=made, advantages=torch.zeros(2, 2), shares=torch.zeros(2, 2, 1)
    )
    with pytest.raises(AssertionError):
        replace(report, advantages=torch.zeros(4))
    with pytest.raises(AssertionError):
        replace(report, shares=torch.zeros(2, 2, 3))
    with pytest.raises(AssertionError):
        TokenLogprobs(logprobs=torch.zeros(2, 3), entropy=torch.zeros(2, 2))


def loss_inputs(logprobs: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> LossInputs:
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        sampling_logprobs=old,
        advantages=torch.ones_like(logprobs),
        completion_mask=mask,
        entropy=torch.zeros_like(old),
    )


@pytest.mark.parametrize("garbage", [1e4, -1e4, NAN, float("inf"), float("-inf")])
def test_the_ratio_is_1_where_masked_and_its_gradient_stays_finite(garbage: float) -> None:
    logprobs = torch.tensor([[-1.0, garbage]], requires_grad=True)
    inputs = loss_inputs(logprobs, torch.tensor([[-1.5, 0.0]]), torch.tensor([[True, False]]))
    assert inputs.log_ratio.tolist() == [[0.5, 0.0]]
    assert inputs.ratio[0].tolist() == pytest.approx([1.6487212707001282, 1.0])
    (gradient,) = torch.autograd.grad(inputs.ratio.sum(), logprobs)
    assert gradient[0].tolist() == pytest.approx([1.6487212707001282, 0.0])


def test_loss_inputs_check_their_shapes() -> None:
    square, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(AssertionError):
        loss_inputs(square, square[:, :2], mask)
    with pytest.raises(AssertionError, match=r"log-probs are \[b, T\]"):
        loss_inputs(square[0], square[0], mask[0])
