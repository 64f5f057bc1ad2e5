"""The clipped surrogate in each of its regions, value and gradient by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpoforge.errors import ConfigError
from grpoforge.types import LossInputs
from grpoforge_plugins.losses.clip import Clip


def inputs_at(ratio: list[float], advantage: list[float]) -> LossInputs:
    """Tokens of these ratios: old log-prob -1, log-prob -1 + log r."""
    log_ratio = torch.tensor([[math.log(value) for value in ratio]], dtype=torch.float64)
    old = torch.full_like(log_ratio, -1.0)
    return LossInputs(
        logprobs=(old + log_ratio).requires_grad_(),
        old_logprobs=old,
        sampling_logprobs=old,
        advantages=torch.tensor([advantage], dtype=torch.float64),
        completion_mask=torch.ones_like(old, dtype=torch.bool),
        entropy=torch.zeros_like(old),
    )


def loss_and_gradient(inputs: LossInputs, loss: Clip) -> tuple[list[float], list[float]]:
    per_token, _ = loss(inputs)
    (gradient,) = torch.autograd.grad(per_token.sum(), inputs.logprobs)
    return per_token[0].tolist(), gradient[0].tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        # Clip to [0.8, 1.28]. Value -min(r A, clip(r) A); where r A is the smaller, d/d log pi = -r A, else 0.
        (1.0, 2.0, -2.0, -2.0),  # at ratio 1 the gradient is -A
        (1.0, -2.0, 2.0, 2.0),
        (1.1, 2.0, -2.2, -2.2),  # inside
        (0.9, -2.0, 1.8, 1.8),
        (1.5, 2.0, -2.56, 0.0),  # above, A > 0: clipped at 1.28 * 2
        (1.5, -2.0, 3.0, 3.0),  # above, A < 0: moving back is free
        (0.5, 2.0, -1.0, -1.0),  # below, A > 0: moving back is free
        (0.5, -2.0, 1.6, 0.0),  # below, A < 0: clipped at 0.8 * 2
        (1.5, 0.0, 0.0, 0.0),  # a row without an advantage
    ],
)
def test_regions(ratio: float, advantage: float, value: float, slope: float) -> None:
    found = loss_and_gradient(inputs_at([ratio], [advantage]), Clip(epsilon_low=0.2, epsilon_high=0.28))
    assert found[0] == pytest.approx([value], rel=1e-12)
    assert found[1] == pytest.approx([slope], rel=1e-12)


def test_metrics_say_which_clip_binds() -> None:
    inputs = inputs_at([1.5, 1.5, 0.5, 0.5, 1.0], [2.0, -2.0, 2.0, -2.0, 2.0])
    _, metrics = Clip()(inputs)
    assert {name: values[0].tolist() for name, values in metrics.items()} == {
        "clip_ratio/high_mean": [1, 0, 0, 0, 0],
        "clip_ratio/low_mean": [0, 0, 0, 1, 0],
        "clip_ratio/region_mean": [1, 0, 0, 1, 0],
    }


def test_the_defaults_are_those_of_ppo() -> None:
    clip = Clip()
    assert (clip.epsilon_low, clip.epsilon_high) == (0.2, 0.2)
    value, slope = loss_and_gradient(inputs_at([1.25], [1.0]), clip)
    assert value == pytest.approx([-1.2]) and slope == [0.0]


def test_one_value_per_token() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    zeros = torch.zeros(2, 3)
    inputs = LossInputs(
        logprobs=zeros,
        old_logprobs=zeros,
        sampling_logprobs=zeros,
        advantages=zeros + 1,
        completion_mask=mask,
        entropy=zeros,
    )
    per_token: Tensor = Clip()(inputs)[0]
    assert per_token.tolist() == [[-1.0] * 3] * 2, "a loss normalizes nothing"


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"epsilon_low": -0.1}, "loss option `epsilon_low` is -0.1", "choose it in [0, 1)"),
        ({"epsilon_high": math.nan}, "loss option `epsilon_high` is nan", "choose it >= 0"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as failure:
        Clip(**options)
    assert (failure.value.message, failure.value.hint) == (message, hint)
