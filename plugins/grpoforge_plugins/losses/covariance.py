"""Entropy collapses by the few tokens whose log-prob and advantage vary together: drop them, or hold them (2505.22617).

``cov_t = (A_t - mean A)(log pi_t - mean log pi)``, means over all completion tokens of the optimizer step: the loss of
a token depends on every row. Among tokens of equal covariance the choice is arbitrary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from grpoforge.errors import ConfigError
from grpoforge.types import Coupling, LossInputs
from grpoforge_plugins.losses.ratios import (
    EpsilonHigh,
    EpsilonLow,
    check,
    check_epsilons,
    clipped_surrogate,
    real_only,
    surrogate_metrics,
)

Share = Annotated[float, "share of all completion tokens, at least one token"]


class ClipCov:
    """The clipped surrogate, and 0 at a few random tokens of high covariance.

    Of the tokens that the clip leaves alone and whose ``cov`` lies between ``cov_low`` and ``cov_high``, as many as
    ``share`` of all tokens (at least one) are dropped. Which ones follows from the seed of the optimizer step and from
    their values, not from the order of the rows. At ratio 1 the gradient is ``-A``, and 0 at dropped tokens.

    2e-4, 1 and 5 are the authors' and verl's; verl draws from torch's global generator. Metrics: as ``clip``, and
    ``clip_cov/dropped_mean``.
    """

    coupling: ClassVar[Coupling] = "batch"
    level: ClassVar[Literal["token", "sequence"]] = "token"
    on_policy_gradient: ClassVar[bool] = False

    def __init__(
        self,
        *,
        epsilon_low: EpsilonLow = 0.2,
        epsilon_high: EpsilonHigh = 0.2,
        share: Share = 2e-4,
        cov_low: Annotated[float, "smallest covariance of a token that may be dropped"] = 1.0,
        cov_high: Annotated[float, "largest covariance of a token that may be dropped"] = 5.0,
    ) -> None:
        check_epsilons(epsilon_low, epsilon_high)
        check("share", share, 0 < share <= 1, "in (0, 1]")
        if not cov_low < cov_high:
            raise ConfigError(
                f"loss options `cov_low` ({cov_low:g}) and `cov_high` ({cov_high:g}) leave nothing between them",
                "choose `cov_low` below `cov_high`",
            )
        self.low = 1 - epsilon_low
        self.high = 1 + epsilon_high
        self.share = share
        self.cov_low = cov_low
        self.cov_high = cov_high

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        ratio, advantages = inputs.ratio, inputs.advantages
        metrics = surrogate_metrics(ratio, advantages, self.low, self.high)
        per_token_loss = clipped_surrogate(ratio, advantages, self.low, self.high)
        cov = covariances(inputs)
        free = inputs.completion_mask & (metrics["clip_ratio/region_mean"] == 0)
        dropped = self.draw(inputs, cov, free & (cov > self.cov_low) & (cov < self.cov_high))
        metrics["clip_cov/dropped_mean"] = dropped.to(ratio.dtype)
        return torch.where(dropped, torch.zeros_like(per_token_loss), per_token_loss), metrics

    def draw(self, inputs: LossInputs, cov: Tensor, candidates: Tensor) -> Tensor:
        """A random few of ``candidates``, bool ``[b, T]``."""
        places = candidates.flatten().nonzero().squeeze(1)
        places = places[cov.flatten()[places].argsort()]
        generator = torch.Generator().manual_seed(inputs.seed)
        order = torch.randperm(len(places), generator=generator).to(places.device)
        dropped = torch.zeros_like(candidates).flatten()
        dropped[places[order[: few(self.share, inputs.completion_mask)]]] = True
        return dropped.reshape(candidates.shape)


class KLCov:
    """``-r A`` per token, plus ``coefficient |log pi - log pi_old|`` at the tokens of highest covariance.

    Those are the ``share`` of all completion tokens (at least one) with the largest ``cov``. There is no clip. At
    ratio 1 the gradient is ``-A``: ``|d|`` has slope 0 there by convention, and is what keeps these tokens near it.

    2e-4 and 1 are the authors'; verl's configuration has a coefficient of 0.1. Metric: ``kl_cov/held_mean``.
    """

    coupling: ClassVar[Coupling] = "batch"
    level: ClassVar[Literal["token", "sequence"]] = "token"

    def __init__(
        self, *, share: Share = 2e-4, coefficient: Annotated[float, "of the penalty on tokens that are held"] = 1.0
    ) -> None:
        check("share", share, 0 < share <= 1, "in (0, 1]")
        check("coefficient", coefficient, coefficient >= 0, ">= 0")
        self.share = share
        self.coefficient = coefficient

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        log_ratio = inputs.log_ratio
        lowest = torch.full_like(log_ratio, -torch.inf)
        cov = torch.where(inputs.completion_mask, covariances(inputs), lowest).flatten()
        held = torch.zeros_like(cov)
        held[cov.topk(min(few(self.share, inputs.completion_mask), len(cov))).indices] = 1
        held = real_only(inputs, held.reshape(log_ratio.shape))
        penalty = held * self.coefficient * log_ratio.abs()
        return -inputs.ratio * inputs.advantages + penalty, {"kl_cov/held_mean": held}


def covariances(inputs: LossInputs) -> Tensor:
    """``cov_t`` of each token, ``[b, T]`` without gradient; 0 where masked."""
    num_tokens = inputs.completion_mask.sum().clamp(min=1)
    centered = []
    for values in (inputs.advantages, inputs.logprobs.detach()):
        values = real_only(inputs, values)
        centered.append(values - values.sum() / num_tokens)
    return real_only(inputs, centered[0] * centered[1])


def few(share: float, completion_mask: Tensor) -> int:
    """``share`` of the completion tokens, at least one."""
    return max(int(share * int(completion_mask.sum())), 1)
