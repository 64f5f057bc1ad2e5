"""Policy gradients without a clip: no ratio at all, a quadratic pull to the old policy, or a taper of the negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from grpoforge.declarations import declares
from grpoforge.types import Coupling, LossInputs
from grpoforge_plugins.losses.ratios import check, real_only


@declares(coupling="token", level="token")
def reinforce(inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    """``-A log pi`` per token (Williams 1992); the loss of GPG (2504.02546) beside its advantage ``gpg``.

    The gradient is ``-A`` at every token, on- and off-policy alike: exact only at the first step on fresh rollouts.
    With the correction ``tis`` beside it each token is weighed by a truncated ratio to the sampler.
    """
    return -inputs.advantages * real_only(inputs, inputs.logprobs), {}


class DRO:
    """``-(A log pi - (beta / 2) d^2)`` per token, ``d = log pi - log pi_old`` (DRO 2405.19107).

    The gradient is ``-A + beta d``: ``-A`` at ratio 1, and 0 where ``d = A / beta``. The same as the mirror descent of
    Kimi k1.5 (2501.12599) with ``tau`` for ``beta``. No default is agreed on: 0.1 is ROLL's for Kimi's; verl has none.
    Papers sum ``d`` over the completion before the square; the per-token form is that of verl and ROLL.
    """

    coupling: ClassVar[Coupling] = "token"
    level: ClassVar[Literal["token", "sequence"]] = "token"

    def __init__(self, *, beta: Annotated[float, "strength of the pull to the old policy"] = 0.1) -> None:
        check("beta", beta, beta > 0, "> 0; without the pull it is `reinforce`")
        self.beta = beta

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        pull = 0.5 * self.beta * inputs.log_ratio.square()
        per_token_loss = -inputs.advantages * real_only(inputs, inputs.logprobs) + pull
        return per_token_loss, {"dro/pull": pull.detach()}


class TOPR:
    """``-sg(w) A log pi`` per token: ``w = 1`` where ``A >= 0``, else the ratio clipped to [0, 1] (TOPR, 2503.14286).

    What should become likelier is learned as in supervised training however rare it is now; what should become rarer
    is let go as it does. The gradient is ``-A w``, ``-A`` at ratio 1.

    ``ratio: sequence`` is the paper's ``pi(y) / pi_old(y)`` of the whole completion; ``ratio: token`` is ROLL's. Rows
    are told apart by the sign of the advantage: the paper and ROLL use that of the reward, which is the same for
    rewards of -1 and 1 without a baseline. ROLL's weights of the two terms are 1. Metric: ``topr/weight_mean``.
    """

    coupling: ClassVar[Coupling] = "sequence"

    def __init__(
        self,
        *,
        ratio: Annotated[Literal["sequence", "token"], "of the whole completion, or of each token"] = "sequence",
    ) -> None:
        self.level: Literal["token", "sequence"] = ratio

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        log_ratio = inputs.log_ratio.detach()
        if self.level == "sequence":
            log_ratio = inputs.sequence_sum(log_ratio).expand_as(log_ratio)
        taper = log_ratio.clamp(max=0).exp()
        weight = torch.where(inputs.advantages < 0, taper, torch.ones_like(taper))
        return -weight * inputs.advantages * real_only(inputs, inputs.logprobs), {"topr/weight_mean": weight}
