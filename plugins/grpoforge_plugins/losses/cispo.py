"""Clipped importance weights: bound the weight, keep every token's gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from grpoforge.types import Coupling, LossInputs
from grpoforge_plugins.losses.ratios import check, clip_metrics, real_only


class CISPO:
    """``-sg(clip(r, min_ratio, max_ratio)) A log pi`` per token (MiniMax-M1 2506.13585; ScaleRL 2510.13786).

    The gradient is ``-A clip(r)``: ``-A`` at ratio 1, never 0. The value means nothing; watch the rewards.

    The bounds are those of the weight itself, because the systems count them differently:

    - upper only, the cap itself (TRL's ``epsilon_high``, open-instruct, ScaleRL): ``max_ratio`` 5, the default;
    - ``1 - e_low`` to ``1 + e_high`` (the paper's notation; verl, SkyRL): 0.2 and 0.2 are ``min_ratio`` 0.8,
      ``max_ratio`` 1.2. The paper sets no lower bound either.

    Metrics: ``clip_ratio/{low,high,region}_mean`` count clipped weights whatever the advantage; ``cispo_clip_ratio`` is
    TRL's, weights over the cap where the advantage is positive.
    """

    coupling: ClassVar[Coupling] = "token"
    level: ClassVar[Literal["token", "sequence"]] = "token"

    def __init__(
        self,
        *,
        min_ratio: Annotated[float, "smallest weight of a token; 0 for no lower bound"] = 0.0,
        max_ratio: Annotated[float, "largest weight of a token"] = 5.0,
    ) -> None:
        check("min_ratio", min_ratio, 0 <= min_ratio <= 1, "in [0, 1]")
        check("max_ratio", max_ratio, max_ratio >= 1, ">= 1")
        self.min_ratio = min_ratio
        self.max_ratio = max_ratio

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        ratio, advantages = inputs.ratio.detach(), inputs.advantages
        weight = ratio.clamp(self.min_ratio, self.max_ratio)
        per_token_loss = -weight * advantages * real_only(inputs, inputs.logprobs)
        below, above = ratio < self.min_ratio, ratio > self.max_ratio
        cispo_clip_ratio = (above & (advantages > 0)).to(ratio.dtype)
        return per_token_loss, clip_metrics(below, above, ratio) | {"cispo_clip_ratio": cispo_clip_ratio}
