"""What the fused loss is told, and what it gives back."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from grpoforge_kernels.errors import KernelError

KLForm = Literal["k1", "k2", "k3"]
"""Estimators of the KL to the reference that this operation computes."""
KL_FORMS: tuple[str, ...] = get_args(KLForm)


class GrpoLoss(NamedTuple):
    """The loss, with gradient, and what is counted over the tokens that are not masked; float64 scalars."""

    loss: Tensor
    """``sum(weights * (clip loss + beta * kl))``."""
    kl_sum: Tensor
    low_sum: Tensor
    """Tokens whose ratio is below the clip range and whose advantage is negative."""
    high_sum: Tensor
    """Tokens whose ratio is above the clip range and whose advantage is positive."""
    bound_sum: Tensor
    """Tokens that ``delta`` or ``dual_clip`` stops."""
    ratio_deviation: Tensor
    """Largest ``|ratio - 1|``."""
    kl_max: Tensor
    """Largest ``|kl|``."""

    @property
    def region_sum(self) -> Tensor:
        """Tokens outside the clip range on either side, pushed further out."""
        return self.low_sum + self.high_sum


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """The clip that this operation computes.

    Raises:
        KernelError: a value outside its range.
    """

    epsilon_low: float
    """How far the ratio may fall below 1, in ``[0, 1)``."""
    epsilon_high: float
    """How far the ratio may rise above 1, at least 0."""
    delta: float | None = None
    """Largest ratio that counts where the advantage is negative, greater than ``1 + epsilon_high``."""
    dual_clip: float | None = None
    """The same bound by its other name, greater than 1; of two bounds, the smaller one counts."""

    def __post_init__(self) -> None:
        _require("epsilon_low", self.epsilon_low, 0 <= self.epsilon_low < 1, "in [0, 1)")
        _require("epsilon_high", self.epsilon_high, 0 <= self.epsilon_high < math.inf, ">= 0")
        if self.delta is not None:
            _require("delta", self.delta, self.delta > 1 + self.epsilon_high, f"> {1 + self.epsilon_high:g}")
        if self.dual_clip is not None:
            _require("dual_clip", self.dual_clip, self.dual_clip > 1, "> 1")

    @property
    def bound(self) -> float:
        """Largest ratio that counts where the advantage is negative; inf for none."""
        delta = math.inf if self.delta is None else self.delta
        return delta if self.dual_clip is None else min(delta, self.dual_clip)


def _require(name: str, value: float, is_met: bool, interval: str) -> None:
    if not is_met:
        raise KernelError(f"{name} is {value:g}", f"choose it {interval}")


def reference_for(kl: KLForm | None, ref_logprobs: Tensor | None) -> Tensor | None:
    """``ref_logprobs`` if there is a KL term to read it."""
    if kl is None:
        return None
    if kl not in KL_FORMS:
        near = difflib.get_close_matches(kl, KL_FORMS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the fused loss has {', '.join(KL_FORMS)}"
        raise KernelError(f"kl = {kl!r} is no KL of the fused loss", hint)
    if ref_logprobs is None:
        raise KernelError(f"kl = {kl!r} needs ref_logprobs, which is None", "pass kl=None for a loss without KL")
    return ref_logprobs
