"""The clipped surrogate of PPO, as GRPO uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from grpoforge.errors import ConfigError
from grpoforge.types import LossInputs


class Clip:
    """``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)`` per token (PPO 1707.06347, GRPO 2402.03300).

    ``r = pi / pi_old``. With ``epsilon_high > epsilon_low`` this is DAPO's clip-higher (2503.14476). The gradient is
    ``-A`` times that of the log-prob at ``r = 1`` and 0 where the clip binds.
    """

    def __init__(
        self,
        *,
        epsilon_low: Annotated[float, "how far the ratio may fall below 1"] = 0.2,
        epsilon_high: Annotated[float, "how far the ratio may rise above 1"] = 0.2,
    ) -> None:
        if not 0 <= epsilon_low < 1:
            raise ConfigError(f"loss option `epsilon_low` is {epsilon_low:g}", "choose it in [0, 1)")
        if not epsilon_high >= 0:
            raise ConfigError(f"loss option `epsilon_high` is {epsilon_high:g}", "choose it >= 0")
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        ratio, advantages = inputs.ratio, inputs.advantages
        clipped_ratio = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        per_token_loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
        low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
        metrics = {
            "clip_ratio/low_mean": low.to(ratio.dtype),
            "clip_ratio/high_mean": high.to(ratio.dtype),
            "clip_ratio/region_mean": (low | high).to(ratio.dtype),
        }
        return per_token_loss, metrics
