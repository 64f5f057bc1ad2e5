"""Baselines taken from the group: the other completions of the same prompt.

A row that no reward scored is left out of every count, sum and deviation, and its advantage is 0. Throughout,
``R = sum_k w_k R_k`` over the rewards that scored the row, and means are over the scored rows of the group.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from grpoforge.declarations import declares
from grpoforge_plugins.advantages.totals import Epsilon, Std, deviation, scaled, totals

MAD_TO_STD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


@declares(invariances=("shift", "scale", "group_sum"), scales_by_std=True)
def group(rewards: Tensor, weights: Tensor, *, epsilon: Epsilon = 1e-4, std: Std = "sample") -> Tensor:
    """``(R - mean) / (std + epsilon)`` within the group (GRPO, 2402.03300).

    The deviations sum to 0 and do not move when all rewards of the group do; one winner among ``G`` gets
    ``(G - 1) / sqrt(G)``, the largest value there is (with the sample std). A group whose totals are equal up to
    rounding, or with fewer than two scored rows, gets 0.

    With two completions per prompt only the *sign* of their gap survives (+-0.707, +-1 with the population std): a gap
    of 0.01 pushes as hard as one of 1. Prefer ``group_mean`` or ``batch_std`` there.

    Implementations differ: TRL adds 1e-4 to the sample std (the defaults), verl and SkyRL 1e-6, OpenRLHF 1e-9,
    open-instruct 1e-8; nano-aha-moment divides by the population std; NeMo RL takes mean and std of the *others*.
    A group with a single scored row gets 0 here and in TRL, its bare reward in verl.
    """
    rows = totals(rewards, weights)
    centered = rows.minus(rows.mean)
    return scaled(centered, deviation(centered, rows.count, std), epsilon)


@declares(invariances=("shift", "group_sum"))
def group_mean(rewards: Tensor, weights: Tensor) -> Tensor:
    """``R - mean`` within the group: no bias toward groups that nearly agree (Dr. GRPO, 2503.20783).

    Linear in the rewards, so weights keep their meaning, also with two completions per prompt (+- half the gap).
    TRL: ``scale_rewards="none"``; verl: ``norm_adv_by_std_in_grpo=False``.
    """
    rows = totals(rewards, weights)
    return rows.minus(rows.mean)


@declares(invariances=("shift", "group_sum"))
def leave_one_out(rewards: Tensor, weights: Tensor) -> Tensor:
    """``R`` minus the mean of the group's *other* rows, ``n / (n - 1) (R - mean)`` (RLOO, 2402.14740).

    The baseline does not depend on the row's own completion, so the gradient is unbiased: also where the rows of a
    group were sampled at different temperatures. 0 with fewer than two scored rows. The same in TRL (RLOO, which can
    also whiten over the batch) and verl, except that verl gives a single row its bare reward.
    """
    rows = totals(rewards, weights)
    return rows.minus(rows.mean) * rows.count / (rows.count - 1).clamp(min=1)


@declares(invariances=("shift",))
def opo(rewards: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    """``R - sum_i n_i R_i / sum_i n_i``: a baseline weighted by completion length (OPO, 2505.23585).

    The baseline of least variance when the squared norm of a completion's gradient grows with its length ``n_i``.
    Advantages sum to 0 only when weighted by length; with equal lengths this is ``group_mean``. OPO is meant for exact
    on-policy training. The same in verl, except that a single scored row gets its bare reward there and 0 here.
    """
    rows = totals(rewards, weights)
    size = lengths.to(rows.values) * rows.scored
    weighed = (size * rows.values).sum(dim=1, keepdim=True)
    whole = size.sum(dim=1, keepdim=True)
    return rows.minus(torch.where(whole > 0, weighed / whole.clamp(min=1), rows.mean))


@declares(invariances=("scale", "group_sum"))
def maxrl(rewards: Tensor, weights: Tensor) -> Tensor:
    """``(R - mean) / mean`` within the group, 0 where the mean is not positive (MaxRL, 2602.02710).

    For binary rewards the gradient of a prompt is weighted by one over its success rate, which is that of the
    log-likelihood of success, truncated at ``G - 1`` terms: ``(1 - (1 - p)^(G - 1)) / p``, as a group without any
    success counts for nothing. Rewards must not be negative: shift them first. Does not
    change when all rewards of the group are scaled. Two completions, one right: +-1.
    """
    rows = totals(rewards, weights)
    mean, centered = rows.mean, rows.minus(rows.mean)
    return torch.where(mean > rows.noise, centered / mean, torch.zeros_like(centered))


@declares(invariances=("shift", "group_sum"))
def gpg(rewards: Tensor, weights: Tensor) -> Tensor:
    """``alpha (R - mean)``, ``alpha`` = scored rows of the batch / rows with a non-zero ``R - mean`` (GPG, 2504.02546).

    ``alpha`` makes up for groups that say nothing, over the batch of all ranks. verl counts rows with a non-zero
    *reward* instead, which for 0/1 rewards divides by the success rate rather than by the share of useful groups. The
    paper's ``F_norm`` is 1. Pair it with the loss ``reinforce``.
    """
    rows = totals(rewards, weights)
    centered = rows.minus(rows.mean)
    return centered * rows.scored.sum() / (centered != 0).sum().clamp(min=1)


@declares(invariances=("shift",), scales_by_std=True)
def robust(
    rewards: Tensor,
    weights: Tensor,
    *,
    epsilon: Annotated[float, Field(ge=0), "added to the scaled median deviation"] = 1e-4,
    limit: Annotated[float, Field(gt=0), "largest |advantage| where the median deviation is not 0"] = 3.0,
    fallback: Annotated[Literal["mean", "zero"], "where it is 0: `R - mean`, or 0"] = "mean",
) -> Tensor:
    """``(R - median) / (1.4826 MAD + epsilon)`` within the group, cut at ``+-limit``; ``MAD = median |R - median|``.

    One wild reward moves neither median nor MAD far, so the other rows hardly notice it, and its own advantage is
    bounded by ``limit``. Group sums are not 0. The median of an even number of rows is the mean of the middle two.

    MAD is 0 when more than half of the group agrees, as 0/1 rewards with a clear majority do: then ``fallback``
    decides, ``R - mean`` (as ``group_mean``; neither scaled nor cut) or 0. With two completions only the sign of the
    gap survives (+-0.674). Of this project; no paper.
    """
    rows = totals(rewards, weights)
    centered = rows.minus(_median(rows.values, rows.scored))
    spread = MAD_TO_STD * _median(centered.abs(), rows.scored)
    otherwise = rows.minus(rows.mean) if fallback == "mean" else torch.zeros_like(centered)
    return torch.where(spread > 0, (centered / (spread + epsilon)).clamp(-limit, limit), otherwise)


def _median(values: Tensor, scored: Tensor) -> Tensor:
    """Median over the scored rows of each group, ``[P, 1]``; 0 for a group without any."""
    known = torch.where(scored, values, torch.full_like(values, torch.nan))
    return known.nanquantile(0.5, dim=1, keepdim=True, interpolation="midpoint").nan_to_num(nan=0.0)
