"""A soft weight of the whole sequence's ratio, from a variational view of off-policy learning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from grpoforge.types import Coupling, LossInputs
from grpoforge_plugins.losses.ratios import Behavior, behavior_logprobs, check, real_only

LOG_WEIGHT_BOUNDS = (math.log(1e-8), 20.0)
"""Of ``log w``; each token's log-ratio is bounded by 20 in size before the sum."""


class VESPO:
    """``-sg(phi(w_i)) A log pi`` per token, ``phi(w) = exp(lambda) w^k exp(-lambda w)`` (2602.10693).

    ``w_i = prod_t pi / mu``, the ratio of the whole completion, not normalized by its length. ``phi(1) = 1``, its
    maximum is at ``w = k / lambda``, and it vanishes on both sides. ``(k, lambda)`` is (2, 3) where ``A >= 0`` and
    (3, 2) elsewhere: rows that are pushed up count less once they are likelier, rows that are pushed down count most
    at ``w = 1.5``. The gradient is ``-A phi(w_i)``, ``-A`` at ratio 1.

    Clamps and defaults as in TRL (token log-ratios to +-20, ``w`` to 1e-8..exp(20)). With samplers that report their
    own log-probs TRL multiplies ``w`` by its capped token corrections; ``behavior: sampling`` uses the exact ratio to
    the sampler, as in the paper, and wants no correction beside it. Metric: ``vespo/phi_seq_mean`` as in TRL, but
    averaged over tokens, not rows.
    """

    coupling: ClassVar[Coupling] = "sequence"
    level: ClassVar[Literal["token", "sequence"]] = "sequence"

    def __init__(
        self,
        *,
        k_positive: Annotated[float, "power of the weight where the advantage is >= 0"] = 2.0,
        lambda_positive: Annotated[float, "decay of the weight where the advantage is >= 0"] = 3.0,
        k_negative: Annotated[float, "power of the weight where the advantage is negative"] = 3.0,
        lambda_negative: Annotated[float, "decay of the weight where the advantage is negative"] = 2.0,
        behavior: Behavior = "old",
    ) -> None:
        check("k_positive", k_positive, k_positive >= 0, ">= 0")
        check("lambda_positive", lambda_positive, lambda_positive > 0, "> 0")
        check("k_negative", k_negative, k_negative >= 0, ">= 0")
        check("lambda_negative", lambda_negative, lambda_negative > 0, "> 0")
        self.positive = (k_positive, lambda_positive)
        self.negative = (k_negative, lambda_negative)
        self.behavior: Literal["old", "sampling"] = behavior

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        logprobs = real_only(inputs, inputs.logprobs)
        difference = (logprobs.detach() - behavior_logprobs(inputs, self.behavior)).clamp(-20, 20)
        log_weight = inputs.sequence_sum(difference).clamp(*LOG_WEIGHT_BOUNDS)
        phi = torch.where(inputs.advantages >= 0, gamma(log_weight, *self.positive), gamma(log_weight, *self.negative))
        return -phi * inputs.advantages * logprobs, {"vespo/phi_seq_mean": phi}


def gamma(log_weight: Tensor, k: float, decay: float) -> Tensor:
    """``exp(decay) w^k exp(-decay w)`` at ``w = exp(log_weight)``: the shape of a gamma density, 1 at ``w = 1``."""
    return (decay + k * log_weight - decay * log_weight.exp()).exp()
