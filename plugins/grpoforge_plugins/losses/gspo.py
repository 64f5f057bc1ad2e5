"""One ratio per completion: its geometric mean over the tokens. GSPO, its token form, and LUSPO.

``s_i = (pi(y_i) / pi_old(y_i))^(1 / n_i) = exp(sum_t (log pi - log pi_old) / n_i)``. A mean of ``n_i`` log-ratios is
far smaller than one of them, so the clip widths are, too. Metrics have TRL's names and are averaged over tokens, where
TRL averages one value per row over rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from grpoforge.types import Coupling, LossInputs
from grpoforge_plugins.losses.ratios import (
    EpsilonHigh,
    EpsilonLow,
    check_epsilons,
    clipped_surrogate,
    surrogate_metrics,
)


class GSPO:
    """``-min(s_i A, clip(s_i, 1 - epsilon_low, 1 + epsilon_high) A)`` on every token of row ``i`` (2507.18071, eq. 5).

    Every token carries ``1 / n_i`` of the row's gradient, ``-A s_i / n_i`` at each; at ratio 1, with the row's tokens
    weighted alike, that is ``-A`` per token. Use reduction ``sequence``, the paper's.

    Epsilons are the paper's, 3e-4 and 4e-4, for completions of thousands of tokens: on short ones, whose mean log-ratio
    varies more, they clip nearly every row (try 1e-2 to 0.2). TRL (``importance_sampling_level: sequence``) keeps its
    default of 0.2 unless told and applies the reduction of ``loss_type``; verl's ``gspo`` is ``gspo_token``.
    """

    coupling: ClassVar[Coupling] = "sequence"
    level: ClassVar[Literal["token", "sequence"]] = "sequence"

    def __init__(self, *, epsilon_low: EpsilonLow = 3e-4, epsilon_high: EpsilonHigh = 4e-4) -> None:
        check_epsilons(epsilon_low, epsilon_high)
        self.low = 1 - epsilon_low
        self.high = 1 + epsilon_high

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        ratio = inputs.sequence_mean(inputs.log_ratio).exp().expand_as(inputs.logprobs)
        per_token_loss = clipped_surrogate(ratio, inputs.advantages, self.low, self.high)
        return per_token_loss, surrogate_metrics(ratio, inputs.advantages, self.low, self.high)


class GSPOToken:
    """The clipped surrogate of ``u_it = sg(s_i) pi / sg(pi)`` per token (2507.18071, equations 13 and 14).

    Its value is GSPO's, and with one advantage and one weight along the row so is its gradient, ``-A s_i`` per token;
    where tokens are weighed differently each keeps its own. At ratio 1 the gradient is ``-A``.

    verl's ``gspo``, which also clamps ``log u`` to at most 10 and always reduces by ``sequence``.
    """

    coupling: ClassVar[Coupling] = "sequence"
    level: ClassVar[Literal["token", "sequence"]] = "sequence"

    def __init__(self, *, epsilon_low: EpsilonLow = 3e-4, epsilon_high: EpsilonHigh = 4e-4) -> None:
        check_epsilons(epsilon_low, epsilon_high)
        self.low = 1 - epsilon_low
        self.high = 1 + epsilon_high

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        log_ratio = inputs.log_ratio
        sequence_ratio = inputs.sequence_mean(log_ratio.detach()).exp()
        ratio = sequence_ratio * (log_ratio - log_ratio.detach()).exp()
        per_token_loss = clipped_surrogate(ratio, inputs.advantages, self.low, self.high)
        return per_token_loss, surrogate_metrics(ratio, inputs.advantages, self.low, self.high)


class LUSPO(GSPO):
    """``n_i`` times the loss of `GSPO` (2602.05261): without its ``1 / n_i``, long completions are not played down.

    Meant for reduction ``sequence``, under which the objective is ``mean_i(n_i l_i)``: GSPO under ``sequence_sum``. At
    ratio 1 the gradient is ``-n_i A`` per token here, and ``-A`` after that reduction's ``1 / n_i``.

    Epsilons are the paper's, 2e-3 and 2.5e-3 (section 5.1). TRL (``loss_type: luspo``) has GSPO's value on every token
    and sums over the row, the same thing; its default epsilons are 0.2.
    """

    on_policy_gradient: ClassVar[bool] = False

    def __init__(self, *, epsilon_low: EpsilonLow = 2e-3, epsilon_high: EpsilonHigh = 2.5e-3) -> None:
        super().__init__(epsilon_low=epsilon_low, epsilon_high=epsilon_high)

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        per_token_loss, metrics = super().__call__(inputs)
        return inputs.lengths * per_token_loss, metrics
