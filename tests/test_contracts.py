"""What plugins return is checked before it can broadcast into something else."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.binding import bind
from grpoforge.contracts import advantages_of, correction_of, kl_of, loss_of
from grpoforge.errors import PluginError
from grpoforge.types import LossInputs
from grpoforge_plugins.advantages.group import group
from grpoforge_plugins.kl.schulman import k1, k2, k3
from grpoforge_plugins.losses.clip import Clip

NAN = float("nan")
ROWS = torch.zeros(2, 3, dtype=torch.float64)
INPUTS = LossInputs(
    logprobs=ROWS,
    old_logprobs=ROWS,
    sampling_logprobs=ROWS,
    advantages=ROWS + 1,
    completion_mask=torch.ones(2, 3, dtype=torch.bool),
    entropy=ROWS,
)
REWARDS = {
    "rewards": torch.tensor([[[1.0], [0.0]], [[NAN], [0.0]]], dtype=torch.float64),
    "weights": torch.ones(1, dtype=torch.float64),
}
LOGPROBS = {"logprobs": ROWS - 1, "ref_logprobs": ROWS, "completion_mask": INPUTS.completion_mask}


def refusal(call: Any, *data: Any) -> tuple[str, str]:
    with pytest.raises(PluginError) as caught:
        call(*data)
    return caught.value.message, caught.value.hint


def test_what_keeps_the_contract_passes_unchanged() -> None:
    advantages, totals = advantages_of(bind("advantage", group), REWARDS)
    assert advantages.equal(group(**REWARDS)) and totals == {}
    for kl in (k1, k2, k3):
        assert kl_of(bind("kl", kl), LOGPROBS, (2, 3)).equal(kl(ROWS - 1, ROWS))
    per_token_loss, metrics = loss_of(Clip(), INPUTS)
    assert per_token_loss.tolist() == [[-1.0] * 3] * 2
    assert "clip_ratio/region_mean" in metrics


PER_TOKEN = "a loss returns per-token values and normalizes nothing"
PAIR = f"return `(per_token_loss, metrics)`: {PER_TOKEN}"
METRICS = "metrics are per-token values too"
NOT_ROWS = "not a tensor of shape [2, 3]"


@pytest.mark.parametrize(
    ("output", "message", "hint"),
    [
        ((ROWS.mean(), {}), f"returned as per-token loss a tensor of shape [], {NOT_ROWS}", PER_TOKEN),
        ((ROWS.mean(dim=1), {}), f"returned as per-token loss a tensor of shape [2], {NOT_ROWS}", PER_TOKEN),
        ((ROWS[:, :1], {}), f"returned as per-token loss a tensor of shape [2, 1], {NOT_ROWS}", PER_TOKEN),
        ((0.5, {}), f"returned as per-token loss a float, {NOT_ROWS}", PER_TOKEN),
        ((ROWS, {"m": ROWS.mean()}), f"returned as metric `m` a tensor of shape [], {NOT_ROWS}", METRICS),
        ((ROWS, {"m": 1.0}), f"returned as metric `m` a float, {NOT_ROWS}", METRICS),
        (ROWS, "returned a tensor of shape [2, 3]", PAIR),  # unpacks into two rows
        ((ROWS, ROWS), "returned a tuple", PAIR),
        (None, "returned a NoneType", PAIR),
    ],
)
def test_a_loss_of_another_shape(output: Any, message: str, hint: str) -> None:
    def half(inputs: LossInputs, *, scale: float = 1.0) -> Any:
        return output

    class Half:
        def __call__(self, inputs: LossInputs) -> Any:
            return output

    assert refusal(loss_of, half, INPUTS) == (f"loss `half` {message}", hint)
    assert refusal(loss_of, functools.partial(half, scale=2.0), INPUTS) == (f"loss `half` {message}", hint)
    assert refusal(loss_of, Half(), INPUTS) == (f"loss `Half` {message}", hint)


def test_a_kl_estimate_of_another_shape() -> None:
    def mean(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return (logprobs - ref_logprobs).mean(dim=1)

    assert refusal(kl_of, bind("kl", mean), LOGPROBS, (2, 3)) == (
        f"KL estimator `mean` returned a tensor of shape [2], {NOT_ROWS}",
        "a KL estimator returns per-token values and normalizes nothing",
    )


@pytest.mark.parametrize(
    ("output", "message", "hint"),
    [
        (torch.zeros(4), "a tensor of shape [4], not a tensor of shape [2, 2]", "return one number per completion"),
        (
            (torch.zeros(2, 2), torch.zeros(2, 2)),
            "a tuple, not a tensor of shape [2, 2]",
            "return one number per completion",
        ),
        (
            (torch.zeros(4), {}),
            "a tensor of shape [4], not a tensor of shape [2, 2]",
            "return one number per completion",
        ),
        ([[0.0] * 2] * 2, "a list, not a tensor of shape [2, 2]", "return one number per completion"),
        (
            torch.tensor([[0.0, 1.0], [NAN, 1.0]]),
            "nan for completion 0 of prompt 1",
            "return finite numbers, and 0 where no reward scored the row",
        ),
        (
            torch.zeros(2, 2, requires_grad=True),
            "a tensor with a gradient",
            "detach it: a loss treats advantages as constants",
        ),
    ],
)
def test_advantages_that_cannot_be_applied(output: Any, message: str, hint: str) -> None:
    def whiten(rewards: Tensor, weights: Tensor) -> Any:
        return output

    assert refusal(advantages_of, bind("advantage", whiten), REWARDS) == (
        f"advantage `whiten` returned {message}",
        hint,
    )


def test_an_advantage_may_report_metrics() -> None:
    def counted(rewards: Tensor) -> Any:
        return rewards[:, :, 0].nan_to_num(), {"pairs": (3.0, 4), "none": (0.0, 0.0)}

    advantages, totals = advantages_of(bind("advantage", counted), REWARDS)
    assert advantages.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert totals == {"pairs": (3.0, 4), "none": (0.0, 0.0)}


@pytest.mark.parametrize(
    "pair", [1.0, (1.0,), (1.0, 2.0, 3.0), (torch.ones(2), 1.0), (NAN, 1.0), [1.0, 2.0], (1.0, "2")]
)
def test_metrics_of_an_advantage_that_cannot_be_averaged(pair: Any) -> None:
    def counted(rewards: Tensor) -> Any:
        return rewards[:, :, 0].nan_to_num(), {"pairs": pair}

    assert refusal(advantages_of, bind("advantage", counted), REWARDS) == (
        f"advantage `counted` returned as metric `pairs` {pair!r}",
        "a metric is `(sum, count)`, two numbers",
    )


@pytest.mark.parametrize(
    ("output", "message", "hint"),
    [
        (ROWS.mean(dim=1), f"a tensor of shape [2], {NOT_ROWS}", "a correction returns one weight per token"),
        (ROWS.clone().requires_grad_(), "a tensor with a gradient", "detach it: its weights are constants"),
    ],
)
def test_corrections_that_cannot_be_applied(output: Any, message: str, hint: str) -> None:
    def weigh(logprobs: Tensor) -> Any:
        return output

    assert refusal(correction_of, bind("correction", weigh), LOGPROBS) == (
        f"correction `weigh` returned {message}",
        hint,
    )


def test_data_is_bound_by_name() -> None:
    def difference(ref_logprobs: Tensor, logprobs: Tensor, more: int = 3, *, option: int = 2) -> Tensor:
        return logprobs - 2 * ref_logprobs

    bound = bind("kl", functools.partial(difference, option=5))
    assert bound.data == ("ref_logprobs", "logprobs")
    assert bound({"logprobs": 5, "ref_logprobs": 1, "old_logprobs": 9}) == 3
    assert not bound.needs_distributions
    assert bind("kl", lambda distribution, ref_distribution: distribution).needs_distributions


def test_data_that_does_not_exist() -> None:
    def centered(reward: Tensor, weights: Tensor) -> Tensor:
        return reward

    assert refusal(bind, "advantage", centered) == (
        "advantage `centered` asks for `reward`, which it cannot be given; it may ask for: rewards, weights, lengths, "
        "temperatures",
        "did you mean `rewards`?; an option is a keyword-only parameter",
    )
