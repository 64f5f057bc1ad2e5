"""Masks: what lies too far from the sampler is dropped, not bent."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from grpoforge.declarations import declares
from grpoforge_plugins.corrections.ratios import High, Kept, Low, check_bounds, inside, log_ratio, row_mean


class IcePop:
    """``rho`` where ``low <= rho <= high``, else 0, per token (IcePop, 2510.18855).

    Gradients of tokens on which sampler and trainer disagree are noise, on both sides. 0.5 and 5 are the paper's and
    verl's; TRL (``token_mask``) is ``low`` 0, ``high`` 3. Raises ConfigError when ``low`` is not below ``high``.
    """

    level: ClassVar[str] = "token"

    def __init__(self, *, low: Low = 0.5, high: High = 5.0, kept: Kept = "ratio") -> None:
        check_bounds(low, high)
        self.low = low
        self.high = high
        self.kept: Literal["ratio", "one"] = kept

    def __call__(self, old_logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
        ratio = log_ratio(old_logprobs, sampling_logprobs, completion_mask).exp()
        return inside(ratio, ratio if self.kept == "ratio" else torch.ones_like(ratio), self.low, self.high)


class SequenceMask:
    """``rho_i = prod_t rho_t`` on every token of a row where ``low <= rho_i <= high``, else 0.

    TRL's default (``sequence_mask``): no lower bound, 3. verl's preset is 0.5 to 2. The longer the row, the sooner it
    is dropped; ``geometric_mask`` does not mind. Raises ConfigError when ``low`` is not below ``high``.
    """

    level: ClassVar[str] = "sequence"

    def __init__(self, *, low: Low = 0.0, high: High = 3.0, kept: Kept = "ratio") -> None:
        check_bounds(low, high)
        self.low = low
        self.high = high
        self.kept: Literal["ratio", "one"] = kept

    def __call__(self, old_logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
        difference = log_ratio(old_logprobs, sampling_logprobs, completion_mask)
        return mask_sequences(difference, self.low, self.high, self.kept)


def mask_sequences(difference: Tensor, low: float, high: float, kept: Literal["ratio", "one"]) -> Tensor:
    """``exp`` of the sum of each row of ``difference [b, T]``, on all its tokens; 0 on those of a row out of bounds."""
    ratio = difference.sum(dim=1, keepdim=True).exp()
    weight = ratio if kept == "ratio" else torch.ones_like(ratio)
    return inside(ratio, weight, low, high).expand_as(difference)


class GeometricMask:
    """``rho`` on the tokens of a row whose geometric mean of ``rho`` is within the bounds, 0 on those of other rows.

    A row's bound does not depend on its length. The token ratio is not cut: to bound both, use ``kept: one`` here and
    ``tis`` beside it. OpenRLHF's ``seq-mask-tis``; bounds of 0.99 and 1.01 are SkyRL's, verl's preset is 0.999 and
    1.001. Raises ConfigError when ``low`` is not below ``high``.
    """

    level = "token"

    def __init__(self, *, low: Low = 0.99, high: High = 1.01, kept: Kept = "ratio") -> None:
        check_bounds(low, high)
        self.low = low
        self.high = high
        self.kept: Literal["ratio", "one"] = kept
        if kept == "one":
            self.level = "sequence"

    def __call__(self, old_logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
        difference = log_ratio(old_logprobs, sampling_logprobs, completion_mask)
        mean = row_mean(difference, completion_mask).exp().expand_as(difference)
        weight = difference.exp() if self.kept == "ratio" else torch.ones_like(difference)
        return inside(mean, weight, self.low, self.high)


@declares(level="sequence")
def opsm(
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    delta: Annotated[float, Field(ge=0), "largest mean of log-prob differences, in nats per token"] = 0.5,
) -> Tensor:
    """1, and 0 on rows with a negative advantage and ``mean_t (sampling - current) > delta``.

    Off-policy sequence masking (DeepSeek-V3.2, 2512.02556): what the policy has already left behind, and is told to
    leave, teaches nothing and destabilizes. Looks at the *current* policy, so rows drop out in the course of an update.
    The paper gives no ``delta``: TRL suggests 0.5 (``off_policy_mask_threshold``), slime's default is 1e-4.
    """
    difference = log_ratio(sampling_logprobs, logprobs, completion_mask)
    keep = (advantages >= 0) | (row_mean(difference, completion_mask) <= delta)
    return keep.to(logprobs.dtype)
