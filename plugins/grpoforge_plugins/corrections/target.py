"""Common target: rows that were sampled at different temperatures, weighed as if all had been sampled at one.

``w = exp(old at the target temperature - old at the row's own)`` is the ratio of a token's probabilities before the
update, both of the trainer's policy. What the sampler computes otherwise than the trainer is no part of it: put ``tis``
beside it for that. The weight corrects how often a token is seen; its log-prob, ratio and clipping stay those of the
row's temperature. Costs one more forward pass without gradient.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from grpoforge_plugins.corrections.mask import mask_sequences
from grpoforge_plugins.corrections.ratios import Cap, High, Kept, Low, check_bounds, log_ratio

Target = Annotated[float, Field(gt=0), "temperature that rows are weighed to"]


class TargetTIS:
    """``min(w, cap)`` per token, ``w`` the ratio to the policy at ``target_temperature``.

    Truncated importance sampling; exactly 1 on rows that were sampled at the target.
    """

    level: ClassVar[str] = "token"

    def __init__(self, *, target_temperature: Target = 1.0, cap: Cap = 2.0) -> None:
        self.target_temperature = target_temperature
        self.cap = cap

    def __call__(self, target_logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
        return log_ratio(target_logprobs, old_logprobs, completion_mask).exp().clamp(max=self.cap)


class TargetSequenceMask:
    """``w_i = prod_t w_t`` on every token of a row where ``low <= w_i <= high``, else 0.

    The right ratio for a reward of the whole completion; it shrinks with length, since a row is as a rule more probable
    at the temperature that drew it. Raises ConfigError when ``low`` is not below ``high``.
    """

    level: ClassVar[str] = "sequence"

    def __init__(
        self, *, target_temperature: Target = 1.0, low: Low = 0.0, high: High = 3.0, kept: Kept = "ratio"
    ) -> None:
        check_bounds(low, high)
        self.target_temperature = target_temperature
        self.low = low
        self.high = high
        self.kept: Literal["ratio", "one"] = kept

    def __call__(self, target_logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
        difference = log_ratio(target_logprobs, old_logprobs, completion_mask)
        return mask_sequences(difference, self.low, self.high, self.kept)
