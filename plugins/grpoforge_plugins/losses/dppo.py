"""A trust region on probabilities, not on their ratio: what PPO's clip was meant to approximate (DPPO, 2602.04879).

A rare token's ratio leaves any clip range by a step that changes the distribution by nothing, and a common token's
stays inside while much mass moves. Here a token is dropped where the policy has moved too far *and* its advantage
pushes it further, distance being that between two coins: this token or any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from grpoforge.types import Coupling, LossInputs
from grpoforge_plugins.losses.ratios import Behavior, behavior_logprobs, check_region, clip_metrics, real_only

MaxRatio = Annotated[float, "largest weight of a token"]


class DPPOTV:
    """``-keep sg(min(r, max_ratio)) A log pi`` per token, bounded in total variation: ``p - p_old``.

    ``keep`` is ``p - p_old <= epsilon_high`` where ``A > 0`` and ``p - p_old >= -epsilon_low`` elsewhere, ``p`` the
    probability of the token. The gradient is ``-keep A min(r, max_ratio)``: ``-A`` at ratio 1.

    0.15 and 20 are the authors'. verl has this form (with its ``clip_ratio`` of 0.2 and ``clip_ratio_c`` of 3 unless
    told); prime-rl has ``-keep r A``, whose gradient is that of an infinite ``max_ratio``, and 0.2. The paper anchors
    the region to the policy that sampled, ``behavior: sampling``; verl to the one before the update unless it skips
    recomputing that.

    Metrics: ``clip_ratio/{low,high,region}_mean`` count dropped tokens; ``dppo/truncated_mean`` counts kept ones whose
    weight is cut.
    """

    coupling: ClassVar[Coupling] = "token"
    level: ClassVar[Literal["token", "sequence"]] = "token"

    def __init__(
        self,
        *,
        epsilon_low: Annotated[float, "how far a token's probability may fall"] = 0.15,
        epsilon_high: Annotated[float, "how far a token's probability may rise"] = 0.15,
        max_ratio: MaxRatio = 20.0,
        behavior: Behavior = "old",
    ) -> None:
        check_region(epsilon_low, epsilon_high, max_ratio)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.max_ratio = max_ratio
        self.behavior: Literal["old", "sampling"] = behavior

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        logprobs = real_only(inputs, inputs.logprobs)
        old = behavior_logprobs(inputs, self.behavior)
        moved = logprobs.detach().exp() - old.exp()
        return truncated(inputs, logprobs, old, moved < -self.epsilon_low, moved > self.epsilon_high, self.max_ratio)


class DPPOKL:
    """``-keep sg(min(r, max_ratio)) A log pi`` per token, bounded in KL divergence.

    ``k = p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))``. A token is kept where ``k`` is at most
    ``epsilon_high`` (``A > 0``) or ``epsilon_low`` (elsewhere), or where it has moved the way that ``A`` pulls back
    from. The gradient is ``-keep A min(r, max_ratio)``: ``-A`` at ratio 1.

    0.05 and 20 are the authors'. ``1 - p`` is at least 1e-8, as verl's (which adds that). Otherwise as `DPPOTV`.
    """

    coupling: ClassVar[Coupling] = "token"
    level: ClassVar[Literal["token", "sequence"]] = "token"

    def __init__(
        self,
        *,
        epsilon_low: Annotated[float, "largest divergence of a token that became less likely, in nats"] = 0.05,
        epsilon_high: Annotated[float, "largest divergence of a token that became likelier, in nats"] = 0.05,
        max_ratio: MaxRatio = 20.0,
        behavior: Behavior = "old",
    ) -> None:
        check_region(epsilon_low, epsilon_high, max_ratio)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.max_ratio = max_ratio
        self.behavior: Literal["old", "sampling"] = behavior

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        logprobs = real_only(inputs, inputs.logprobs)
        old = behavior_logprobs(inputs, self.behavior)
        divergence = binary_kl(old, logprobs.detach())
        below = (divergence > self.epsilon_low) & (logprobs < old)
        above = (divergence > self.epsilon_high) & (logprobs > old)
        return truncated(inputs, logprobs, old, below, above, self.max_ratio)


def binary_kl(old: Tensor, new: Tensor) -> Tensor:
    """KL divergence of the coin of probability ``exp(new)`` from the one of ``exp(old)``, in nats."""
    # -expm1 is 1 - p without the cancellation near p = 1.
    rest_old, rest_new = ((-torch.expm1(one)).clamp(min=1e-8) for one in (old, new))
    return old.exp() * (old - new) + rest_old * (rest_old.log() - rest_new.log())


def truncated(
    inputs: LossInputs, logprobs: Tensor, old: Tensor, below: Tensor, above: Tensor, max_ratio: float
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """``-sg(min(r, max_ratio)) A log pi``, 0 at tokens ``below`` or ``above`` the region that ``A`` pushes further."""
    ratio = (logprobs.detach() - old).exp()
    below, above = below & (inputs.advantages <= 0), above & (inputs.advantages > 0)
    dropped = below | above
    weight = torch.where(dropped, torch.zeros_like(ratio), ratio.clamp(max=max_ratio))
    cut = ((ratio > max_ratio) & ~dropped).to(ratio.dtype)
    metrics = clip_metrics(below, above, ratio) | {"dppo/truncated_mean": cut}
    return -weight * inputs.advantages * logprobs, metrics
