"""A soft gate in the place of the clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from grpoforge.types import Coupling, LossInputs
from grpoforge_plugins.losses.ratios import check


class SAPO:
    """``-f(r) A`` with ``f(r) = (4 / tau) sigmoid(tau (r - 1))`` per token (2511.20347).

    ``tau`` is ``tau_positive`` where ``A > 0`` and ``tau_negative`` elsewhere. With ``p = sigmoid(tau (r - 1))`` the
    gradient is ``-A r 4 p (1 - p)``: ``-A`` at ratio 1, falling off on both sides, sooner with a larger ``tau``. The
    value is offset, ``f(1) = 2 / tau``.

    1.0 and 1.05 are the paper's, TRL's and verl's (which also clamps the log-ratio to 20). Both reduce by ``sequence``.
    Metric: ``sapo/gate_mean``, ``4 p (1 - p)``, 1 on policy and 0 where nothing is learned any more.
    """

    coupling: ClassVar[Coupling] = "token"
    level: ClassVar[Literal["token", "sequence"]] = "token"

    def __init__(
        self,
        *,
        tau_positive: Annotated[float, "steepness of the gate where the advantage is positive"] = 1.0,
        tau_negative: Annotated[float, "steepness of the gate elsewhere"] = 1.05,
    ) -> None:
        check("tau_positive", tau_positive, tau_positive > 0, "> 0")
        check("tau_negative", tau_negative, tau_negative > 0, "> 0")
        self.tau_positive = tau_positive
        self.tau_negative = tau_negative

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        ratio, advantages = inputs.ratio, inputs.advantages
        negative = torch.full_like(advantages, self.tau_negative)
        tau = torch.where(advantages > 0, torch.full_like(advantages, self.tau_positive), negative)
        share = (tau * (ratio - 1)).sigmoid()
        gate = (4 * share * (1 - share)).detach()
        return -(4 / tau) * share * advantages, {"sapo/gate_mean": gate}
