"""The geometric mean of clipped token ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from grpoforge.types import Coupling, LossInputs
from grpoforge_plugins.losses.ratios import check, clip_metrics


class GMPO:
    """``-A exp(mean_t d~)`` on every token of a row, each token clipped before the geometric mean (2507.20673).

    ``d = log pi - log pi_old``, and ``d~ = sign(A) min(sign(A) d, sign(A) clip(d, -epsilon_low, epsilon_high))``:
    clipped in log space, on the side to which ``A`` pushes. An arithmetic mean of ratios follows its outliers; this one
    does not, and so may clip later. With the row's tokens weighted alike the gradient is ``-A exp(mean d~)`` at a token
    that is not clipped, else 0; at ratio 1 it is ``-A``.

    Ratios lie in ``(exp(-0.4), exp(0.4))`` by default, the paper's. TRL's (experimental) is the same; verl's
    ``geo_mean`` takes ``clip_ratio``, by default 0.2, adds 1e-8 to lengths and always averages over rows, which is
    reduction ``sequence``. Metrics: ``clip_ratio/{low,high,region}_mean`` as in TRL.
    """

    coupling: ClassVar[Coupling] = "sequence"
    level: ClassVar[Literal["token", "sequence"]] = "sequence"

    def __init__(
        self,
        *,
        epsilon_low: Annotated[float, "how far the log-ratio of a token may fall below 0"] = 0.4,
        epsilon_high: Annotated[float, "how far the log-ratio of a token may rise above 0"] = 0.4,
    ) -> None:
        check("epsilon_low", epsilon_low, epsilon_low >= 0, ">= 0")
        check("epsilon_high", epsilon_high, epsilon_high >= 0, ">= 0")
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        log_ratio, advantages = inputs.log_ratio, inputs.advantages
        below = (log_ratio < -self.epsilon_low) & (advantages < 0)
        above = (log_ratio > self.epsilon_high) & (advantages > 0)
        clipped = log_ratio.clamp(-self.epsilon_low, self.epsilon_high)
        kept = torch.where(below | above, clipped, log_ratio)
        return -advantages * inputs.sequence_mean(kept).exp(), clip_metrics(below, above, log_ratio)
