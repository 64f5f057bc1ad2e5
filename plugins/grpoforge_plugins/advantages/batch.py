"""Advantages that look across prompts: what they divide by, or subtract, is a statistic of the whole batch.

The batch is all rows of the step on all ranks. A row that no reward scored is left out of every statistic, and its
advantage is 0. Throughout, ``R = sum_k w_k R_k`` over the rewards that scored the row.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from grpoforge.declarations import declares
from grpoforge_plugins.advantages.group import group
from grpoforge_plugins.advantages.totals import Epsilon, Std, deviation, scaled, totals

VarianceEpsilon = Annotated[float, Field(ge=0), "added to the variance"]
WHITEN_EPSILON = 1e-8
"""What verl's and TRL's whitening add to the variance."""


@declares(invariances=("shift", "scale", "group_sum"))
def batch_std(rewards: Tensor, weights: Tensor, *, epsilon: Epsilon = 1e-4, std: Std = "sample") -> Tensor:
    """``(R - group mean) / (batch std + epsilon)``, the std over the rewards of the batch (Lite PPO, 2508.08221).

    Sums to 0 in every group; gaps keep their size relative to other groups', so this is safe with two completions per
    prompt. Does not change when all rewards of the batch are scaled. TRL: ``scale_rewards="batch"`` (the defaults); the
    std is of the rewards about the batch mean, not of the advantages.
    """
    rows = totals(rewards, weights)
    batch = rows.over_batch()
    return scaled(rows.minus(rows.mean), deviation(batch.minus(batch.mean), batch.count, std), epsilon)


@declares(min_group=1, invariances=("shift", "scale"))
def prpo(rewards: Tensor, weights: Tensor, *, epsilon: Epsilon = 1e-6, std: Std = "sample") -> Tensor:
    """``(R - batch mean) / (batch std + epsilon)``: no groups at all (PRPO as in rLLM).

    Works with one completion per prompt. An easy prompt is rewarded for being easy: a group of equal totals gets 0 only
    when the whole batch agrees.
    """
    batch = totals(rewards, weights).over_batch()
    centered = batch.minus(batch.mean)
    return scaled(centered, deviation(centered, batch.count, std), epsilon).reshape(rewards.shape[:2])


@declares(min_group=1, invariances=("shift", "scale"))
def reinforce_pp(
    rewards: Tensor, weights: Tensor, lengths: Tensor, *, epsilon: VarianceEpsilon = 1e-8, std: Std = "sample"
) -> Tensor:
    """``(R - mean) / sqrt(var + epsilon)`` over all completion *tokens* of the batch (REINFORCE++, 2501.03262).

    Every token carries its row's ``R`` (discount 1), so a row counts as often as it has tokens: over tokens the mean is
    0 and the variance 1. There is no group baseline, so groups of equal totals do not get 0. ``sample`` divides by one
    less than the number of tokens, as verl and TRL do (the defaults); OpenRLHF divides by the number of tokens and
    takes at least 1e-8 as variance. In those systems the KL of each *later* token is part of a token's return; here
    the KL in the reward is one sum per row (``kl.placement: reward``).
    """
    batch = totals(rewards, weights).over_batch()
    size = _tokens(lengths, batch.scored)
    mean = (size * batch.values).sum() / size.sum().clamp(min=1)
    return _whitened(batch.minus(mean), size, std, epsilon).reshape(rewards.shape[:2])


@declares(invariances=("shift", "scale"))
def reinforce_pp_baseline(
    rewards: Tensor, weights: Tensor, lengths: Tensor, *, epsilon: VarianceEpsilon = 1e-8, std: Std = "sample"
) -> Tensor:
    """``R - group mean``, then whitened over all completion tokens of the batch (REINFORCE++-baseline, 2501.03262).

    Whitening subtracts the token mean too, which is not 0 where lengths and rewards go together: a group of equal
    totals then gets the shift of the batch, as in verl and OpenRLHF. With equal lengths it gets 0. For std and epsilon
    see `reinforce_pp`.
    """
    rows = totals(rewards, weights)
    size = _tokens(lengths, rows.scored)
    centered = rows.minus(rows.mean).reshape(1, -1)
    return _whitened(_shifted(centered, size), size, std, epsilon).reshape(rewards.shape[:2])


@declares(invariances=("shift", "scale"), scales_by_std=True)
def gdpo(
    rewards: Tensor,
    weights: Tensor,
    lengths: Tensor,
    *,
    epsilon: Annotated[float, Field(ge=0), "added to the standard deviations"] = 1e-4,
    std: Std = "sample",
    whiten: Annotated[Literal["rows", "tokens"], "what the batch statistics are over"] = "rows",
) -> Tensor:
    """Normalize each reward in its group, add, normalize over the batch (GDPO, 2601.05242).

    ``z_k = (R_k - group mean_k) / (group std_k + epsilon)``, ``Z = sum_k w_k z_k``, ``A = Z / (batch std of Z +
    epsilon)``. The batch mean of ``Z`` is 0 by construction. Weights say how much a reward counts whatever its scale; a
    reward that is constant in a group has no part there. With two completions per prompt only the sign of each
    reward's gap survives, weighted. A row that a reward did not score is left out of that reward's statistics.

    TRL (``normalize_then_sum``): the defaults. verl: epsilon 1e-6 in the groups, then ``whiten: tokens``, which
    subtracts the mean over *tokens* and divides by ``sqrt(var + 1e-8)``, so groups of equal totals get a shift.
    """
    one = torch.ones_like(weights[:1])
    single = [group(rewards[:, :, [k]], one, epsilon=epsilon, std=std) for k in range(len(weights))]
    scored = totals(rewards, weights).scored.reshape(1, -1)
    shares = torch.stack(single, dim=2) * weights
    summed = shares.sum(dim=2)
    # Rewards that cancel leave rounding, which a batch without anything else would make a signal of.
    whole = torch.where(summed.abs() > 1e-12 * shares.abs().sum(dim=2), summed, 0.0).reshape(1, -1)
    if whiten == "rows":
        advantages = scaled(whole, deviation(whole, scored.sum(dim=1, keepdim=True), std), epsilon)
    else:
        size = _tokens(lengths, scored)
        advantages = _whitened(_shifted(whole, size), size, std, WHITEN_EPSILON)
    return advantages.reshape(rewards.shape[:2])


def _tokens(lengths: Tensor, scored: Tensor) -> Tensor:
    """Tokens of each scored row as one group, ``[1, P * G]`` float64; 0 for the others."""
    return (lengths.reshape(1, -1) * scored.reshape(1, -1)).double()


def _shifted(values: Tensor, size: Tensor) -> Tensor:
    """``values [1, B]`` minus their mean over tokens; rounding, of the mean and of differences from it, is 0."""
    noise = 1e-12 * values.abs().max()
    mean = (size * values).sum() / size.sum().clamp(min=1)
    shifted = values - torch.where(mean.abs() > noise, mean, torch.zeros_like(mean))
    return torch.where(shifted.abs() > noise, shifted, torch.zeros_like(shifted))


def _whitened(centered: Tensor, size: Tensor, std: Literal["sample", "population"], epsilon: float) -> Tensor:
    """``centered / sqrt(var + epsilon)``, the variance over tokens; 0 for rows without tokens, and where it is 0."""
    freedom = size.sum() - 1 if std == "sample" else size.sum()
    variance = (size * centered.square()).sum() / freedom.clamp(min=1)
    known = (size > 0) & (variance > 0)
    return torch.where(known, centered / (variance + epsilon).sqrt(), torch.zeros_like(centered))
