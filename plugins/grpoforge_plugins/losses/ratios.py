"""What the losses share: ratios to the policy that sampled, the clipped surrogate, its metrics, and option checks."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from grpoforge.errors import ConfigError
from grpoforge.types import LossInputs

EpsilonLow = Annotated[float, "how far the ratio may fall below 1"]
EpsilonHigh = Annotated[float, "how far the ratio may rise above 1"]
Behavior = Annotated[
    Literal["old", "sampling"],
    "whose log-probs stand for the policy that sampled: those recomputed before the update, or the sampler's report",
]


def check(name: str, value: float, valid: bool, range_: str) -> None:
    """Raise ConfigError unless ``valid``; ``range_`` says where the option ``name`` may lie.

    Write conditions so that they are False for NaN.
    """
    if not valid:
        raise ConfigError(f"loss option `{name}` is {value:g}", f"choose it {range_}")


def check_epsilons(epsilon_low: float, epsilon_high: float) -> None:
    """Raise ConfigError unless ``1 - epsilon_low`` and ``1 + epsilon_high`` can bound a ratio on either side of 1."""
    check("epsilon_low", epsilon_low, 0 <= epsilon_low < 1, "in [0, 1)")
    check("epsilon_high", epsilon_high, epsilon_high >= 0, ">= 0")


def check_region(epsilon_low: float, epsilon_high: float, max_ratio: float) -> None:
    """Raise ConfigError unless the epsilons are distances and ``max_ratio`` leaves a ratio of 1 alone."""
    check("epsilon_low", epsilon_low, epsilon_low >= 0, ">= 0")
    check("epsilon_high", epsilon_high, epsilon_high >= 0, ">= 0")
    check("max_ratio", max_ratio, max_ratio >= 1, ">= 1")


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """``-min(ratio A, clip(ratio, low, high) A)``, of the shape of ``ratio``."""
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def clip_metrics(below: Tensor, above: Tensor, like: Tensor) -> dict[str, Tensor]:
    """Which tokens are ``below`` and ``above`` the bounds, bool ``[b, T]``, under TRL's names and as numbers."""
    return {
        "clip_ratio/low_mean": below.to(like.dtype),
        "clip_ratio/high_mean": above.to(like.dtype),
        "clip_ratio/region_mean": (below | above).to(like.dtype),
    }


def surrogate_metrics(ratio: Tensor, advantages: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Where the clipped surrogate has no gradient: outside ``[low, high]`` and pushed further out."""
    return clip_metrics((ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0), ratio)


def real_only(inputs: LossInputs, values: Tensor) -> Tensor:
    """``values [b, T]``, 0 where masked: replaced, because ``0 * inf`` would be NaN in the backward pass."""
    return torch.where(inputs.completion_mask, values, torch.zeros_like(values))


def behavior_logprobs(inputs: LossInputs, behavior: Literal["old", "sampling"]) -> Tensor:
    """Log-probs of the policy that sampled, ``[b, T]``, 0 where masked."""
    return real_only(inputs, inputs.old_logprobs if behavior == "old" else inputs.sampling_logprobs)
