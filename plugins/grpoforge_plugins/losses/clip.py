"""The clipped surrogate of PPO, as GRPO uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from grpoforge.errors import ConfigError
from grpoforge.types import Coupling, LossInputs
from grpoforge_kernels import ops
from grpoforge_plugins.losses.ratios import (
    EpsilonHigh,
    EpsilonLow,
    check,
    check_epsilons,
    clipped_surrogate,
    surrogate_metrics,
)


class Clip:
    """``-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)`` per token (PPO 1707.06347, GRPO 2402.03300).

    ``r = pi / pi_old``. With ``epsilon_high > epsilon_low`` this is DAPO's clip-higher (2503.14476; 0.2 and 0.28). The
    gradient is ``-A`` times that of the log-prob at ``r = 1`` and 0 where the clip binds.

    A token with ``A < 0`` whose ratio has risen is not clipped, and its loss is unbounded. Either option bounds it:

    - ``delta``, two-sided clipping (INTELLECT-2, 2505.07291): ``min(min(r, delta) A, clip(r) A)``, 4 is typical;
    - ``dual_clip``, ``c`` (1912.09729): ``max(min(r A, clip(r) A), c A)`` for ``A < 0``; 3 in the paper and verl.

    Where both are defined, ``delta > 1 + epsilon_high``, they are one function, ``-max(min(r A, clip(r) A), bound A)``
    for ``A < 0``: TRL knows it as ``delta`` (off by default), verl as ``clip_ratio_c`` (3, never off; verl also clamps
    the log-ratio to 20, TRL does not).

    Metrics: ``clip_ratio/{low,high,region}_mean`` as in TRL; ``clip_ratio/bound_mean``, with either bound, is the share
    of tokens that it stops (verl's ``pg_clipfrac_lower``).
    """

    coupling: ClassVar[Coupling] = "token"
    level: ClassVar[Literal["token", "sequence"]] = "token"

    def __init__(
        self,
        *,
        epsilon_low: EpsilonLow = 0.2,
        epsilon_high: EpsilonHigh = 0.2,
        delta: Annotated[float | None, "largest ratio that counts where the advantage is negative (TRL)"] = None,
        dual_clip: Annotated[float | None, "the same bound as the papers on dual clip and verl name it"] = None,
    ) -> None:
        check_epsilons(epsilon_low, epsilon_high)
        if delta is not None and dual_clip is not None:
            raise ConfigError(
                f"loss options `delta` ({delta:g}) and `dual_clip` ({dual_clip:g}) are both given",
                "both bound the ratio where the advantage is negative: give one",
            )
        if delta is not None:
            check("delta", delta, delta > 1 + epsilon_high, f"> 1 + epsilon_high = {1 + epsilon_high:g}")
        if dual_clip is not None:
            check("dual_clip", dual_clip, dual_clip > 1, "> 1")
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.delta = delta
        self.dual_clip = dual_clip

    @property
    def kernel_form(self) -> ops.ClipOptions:
        """What the fused kernel calls this loss."""
        return ops.ClipOptions(self.epsilon_low, self.epsilon_high, self.delta, self.dual_clip)

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        ratio, advantages = inputs.ratio, inputs.advantages
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        per_token_loss = clipped_surrogate(ratio, advantages, low, high)
        metrics = surrogate_metrics(ratio, advantages, low, high)
        bound = self.delta if self.delta is not None else self.dual_clip
        if bound is not None:
            stopped = (advantages < 0) & (ratio > bound)
            per_token_loss = torch.where(stopped, -bound * advantages, per_token_loss)
            metrics["clip_ratio/bound_mean"] = stopped.to(ratio.dtype)
        return per_token_loss, metrics
