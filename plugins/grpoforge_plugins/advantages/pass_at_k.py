"""Credit for what a completion adds to the best of ``k``."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from grpoforge.errors import ConfigError
from grpoforge_plugins.advantages.totals import Epsilon, Totals, deviation, scaled, totals


class PassAtK:
    """What a row adds to the best of ``k``: the mean of ``max with - max without`` over its ``k``-subsets of the group.

    The leave-one-out estimator of the gradient of max@k, pass@k for 0/1 rewards (PKPO, 2505.15201, its ``loo-1`` up to
    the constant ``k / G``): unbiased, because ``max without`` does not depend on the row. A row that is beaten in every
    subset gets 0, so nothing is ever pushed down; for 0/1 rewards a right row gets the probability that the other
    ``k - 1`` are wrong. Sums are not 0; shifts change nothing, scaling scales. Ties for the best get nothing at ``k =
    G``.

    By default ``k`` is the group size: the best row gets its lead over the second best and all others 0, the form of
    2503.19595. verl has only that form, divided by the group's ``sample`` std + 1e-6. Unscored rows are no members of
    any subset; a group with fewer than ``k`` scored rows gets 0.

    Raises ConfigError when ``k`` is less than 2 or more than the group size.
    """

    invariances: ClassVar[tuple[str, ...]] = ("shift",)
    min_group = 2
    scales_by_std = False

    def __init__(
        self,
        *,
        k: Annotated[int | None, "size of the subsets; default: the group size"] = None,
        std: Annotated[Literal["none", "sample", "population"], "divide by the group's standard deviation"] = "none",
        epsilon: Epsilon = 1e-6,
    ) -> None:
        if k is not None and k < 2:
            raise ConfigError(f"advantage option `k` is {k}", "choose it >= 2; `leave_one_out` is the case of 1")
        self.k = k
        self.std: Literal["none", "sample", "population"] = std
        self.epsilon = epsilon
        self.min_group = k or 2
        self.scales_by_std = std != "none"

    def check(self, group_size: int) -> None:
        """Raise ConfigError when groups of ``group_size`` have no subset of ``k``."""
        if group_size < 2:
            raise ConfigError(
                f"advantage `pass_at_k` compares the completions of a prompt, and there is {group_size}",
                "raise `batch.completions_per_prompt`",
            )
        if self.k is not None and self.k > group_size:
            raise ConfigError(
                f"advantage option `k` is {self.k}, and a prompt has {group_size} completions",
                f"choose `k` <= {group_size}, or raise `batch.completions_per_prompt`",
            )

    def __call__(self, rewards: Tensor, weights: Tensor) -> Tensor:
        self.check(rewards.shape[1])
        rows = totals(rewards, weights)
        lead = torch.stack([self._leads(rows, prompt) for prompt in range(rewards.shape[0])])
        if self.std == "none":
            return lead
        return scaled(lead, deviation(rows.minus(rows.mean), rows.count, self.std), self.epsilon)

    def _leads(self, rows: Totals, prompt: int) -> Tensor:
        """``[G]``: what each row of a group adds to the best of ``k``, on average."""
        scored = rows.scored[prompt].nonzero().flatten()
        num_scored = len(scored)
        k = num_scored if self.k is None else self.k
        leads = torch.zeros_like(rows.values[prompt])
        if not 2 <= k <= num_scored:
            return leads
        values, order = rows.values[prompt, scored].sort()
        gaps = values[:, None] - values[None, :]
        gaps = torch.where(gaps > rows.noise[prompt], gaps, torch.zeros_like(gaps))
        # The best of the other k - 1 is the row of this rank when the k - 2 beside it are drawn from those below.
        chances = [math.comb(rank, k - 2) / math.comb(num_scored - 1, k - 1) for rank in range(num_scored)]
        leads[scored[order]] = gaps @ torch.tensor(chances, dtype=values.dtype, device=values.device)
        return leads
