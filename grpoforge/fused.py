"""The objective as one kernel, where the chosen parts are exactly those that the kernel computes."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grpoforge.binding import Bound
from grpoforge.declarations import declared, unbound
from grpoforge.objective import Frozen, Objective, Update
from grpoforge.types import Batch, TokenLogprobs
from grpoforge_kernels import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedObjective(Objective):
    """Ratio, clip, KL, mask, weights and metrics in one pass (`grpoforge_kernels.ops.grpo_loss`).

    Equal to the composed objective of the same parts, in value, gradient and metrics.
    """

    clip: ops.ClipOptions
    kl_form: ops.KLForm | None

    def __call__(
        self,
        batch: Batch,
        frozen: Frozen,
        weights: Tensor,
        current: TokenLogprobs,
        update: Update,
        distributions: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """See `Objective.__call__`."""
        mask, meter, logprobs = batch.completion_mask, update.meter, current.logprobs
        fused = ops.grpo_loss(
            logprobs,
            frozen.old,
            frozen.reference if self.kl_form else None,
            frozen.advantages.to(logprobs.dtype)[:, None].expand_as(logprobs),
            mask,
            weights,
            **dataclasses.asdict(self.clip),
            kl=self.kl_form,
            beta=update.beta,
        )
        num_tokens = float(mask.sum())
        meter.add_tokens(mask, {"entropy": current.entropy})
        counts = {"low": fused.low_sum, "high": fused.high_sum, "region": fused.region_sum}
        if math.isfinite(self.clip.bound):
            counts["bound"] = fused.bound_sum
        for name, total in counts.items():
            meter.add(f"clip_ratio/{name}_mean", float(total), num_tokens)
        if self.kl_form:
            meter.add("kl", float(fused.kl_sum), num_tokens)
        if update.is_unmoved:
            meter.largest("invariant/ratio_dev_step0", float(fused.ratio_deviation))
            if self.kl_form:
                meter.largest("invariant/kl_step0", float(fused.kl_max))
        return fused.loss


def _own_form(component: object) -> Any:
    """The ``kernel_form`` that ``component`` states about itself; None where it has somebody else's or none.

    A subclass that computes something else inherits the name, and ``functools.wraps`` copies it to the wrapper.
    """
    plain = unbound(component)
    if hasattr(plain, "__wrapped__"):
        return None
    if not inspect.isroutine(plain):
        calls, states = (_owner(type(plain), name) for name in ("__call__", "kernel_form"))
        if calls is not states:
            return None
    return declared(plain, "kernel_form")


def _owner(kind: type, name: str) -> type | None:
    """The class that an instance of ``kind`` has the attribute from."""
    return next((one for one in kind.__mro__ if name in vars(one)), None)


def _plain_form(kl: Bound | None) -> ops.KLForm | None:
    """The kernel's name of a KL estimator; an estimator with an option that is set (a clamp) has none."""
    form: ops.KLForm | None = None
    options = getattr(kl.function, "keywords", {}) if kl is not None else {}
    if kl is not None and all(value is None for value in options.values()):
        form = _own_form(kl.function)
    return form


def fuse(objective: Objective, *, entropy_bonus: bool, chooses_tokens: bool) -> tuple[Objective, str]:
    """``objective`` as one kernel where that computes the same, else as it is; and why, for people to read.

    Args:
        entropy_bonus: the run adds an entropy bonus.
        chooses_tokens: the policy loss is taken on some tokens only.
    """
    clip = _own_form(objective.loss)
    form = _plain_form(objective.kl)
    obstacles = {
        "its loss has no fused kernel": clip is None,
        "its KL estimator has no fused kernel": objective.kl is not None and form is None,
        "off-policy corrections weigh its tokens": bool(objective.corrections),
        "it has an entropy bonus": entropy_bonus,
        "it is taken on some tokens only": chooses_tokens,
    }
    reasons = [reason for reason, holds in obstacles.items() if holds]
    if reasons:
        return objective, f"composed of its parts: {reasons[0]}"
    fused = FusedObjective(
        loss=objective.loss, kl=objective.kl, corrections=objective.corrections, clip=clip, kl_form=form
    )
    return fused, "one kernel (grpo_loss)"
