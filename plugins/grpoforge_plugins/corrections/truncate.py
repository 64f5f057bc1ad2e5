"""Truncated importance sampling: the ratio as weight, cut where it is too large to be trusted."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from grpoforge.declarations import declares
from grpoforge_plugins.corrections.ratios import Cap, check_bounds, log_ratio


@declares(level="token")
def tis(old_logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor, *, cap: Cap = 2.0) -> Tensor:
    """``min(rho, cap)`` per token (truncated importance sampling, Yao et al. 2025).

    Bounded variance for a bias toward the sampler on tokens that it undersamples. ``cap`` is 2 in verl, slime and
    SkyRL, 3 in TRL (``token_truncate``).
    """
    return log_ratio(old_logprobs, sampling_logprobs, completion_mask).exp().clamp(max=cap)


@declares(level="sequence")
def tis_sequence(old_logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor, *, cap: Cap = 3.0) -> Tensor:
    """``min(prod_t rho_t, cap)``, one weight for all tokens of a row.

    The right ratio for a reward of the whole completion, before the cut; it decays or explodes with length. ``cap`` is
    3 in TRL (``sequence_truncate``), 2 in verl, 5 in SkyRL.
    """
    whole = log_ratio(old_logprobs, sampling_logprobs, completion_mask).sum(dim=1, keepdim=True)
    return whole.exp().clamp(max=cap).expand_as(old_logprobs)


class TwoSidedTIS:
    """``clip(rho, low, high)`` per token, OpenRLHF's ``tis`` with its bounds.

    The lower bound keeps tokens in the gradient that the trainer finds improbable. Raises ConfigError when ``low`` is
    not below ``high``.
    """

    level: ClassVar[str] = "token"

    def __init__(
        self,
        *,
        low: Annotated[float, Field(ge=0), "smallest weight"] = 0.5,
        high: Annotated[float, Field(gt=0), "largest weight"] = 5.0,
    ) -> None:
        check_bounds(low, high)
        self.low = low
        self.high = high

    def __call__(self, old_logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
        return log_ratio(old_logprobs, sampling_logprobs, completion_mask).exp().clamp(self.low, self.high)
