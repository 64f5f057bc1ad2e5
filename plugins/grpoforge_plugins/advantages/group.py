"""Baselines taken from the group: the other completions of the same prompt.

A row that no reward scored is left out of every count, sum and deviation, and its advantage is 0.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from grpoforge.types import rounding, weighted_total


def _centered(rewards: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``R - mean(R)`` over the scored rows of each group, and how many were scored, ``[P, G]`` and ``[P, 1]``."""
    total = weighted_total(rewards, weights)
    scored = ~total.isnan()
    count = scored.sum(dim=1, keepdim=True)
    mean = total.nan_to_num(nan=0.0).sum(dim=1, keepdim=True) / count.clamp(min=1)
    centered = total - mean
    # Equal totals differ by rounding, from each other and from their mean: dividing that by a std of nearly 0 makes
    # a signal of it.
    known = scored & (centered.abs() > rounding(rewards, weights))
    return torch.where(known, centered, torch.zeros_like(total)), count


def group(
    rewards: Tensor, weights: Tensor, *, epsilon: Annotated[float, "added to the standard deviation"] = 1e-4
) -> Tensor:
    """``(R - mean) / (std + epsilon)`` within the group, std with ``n - 1`` (GRPO, 2402.03300; epsilon as in TRL).

    ``R = sum_k w_k R_k``. A group whose totals are equal up to rounding, or with fewer than two scored rows,
    gets 0. With two completions per prompt only the *sign* of their gap survives: prefer `group_mean` there.
    """
    centered, count = _centered(rewards, weights)
    std = (centered.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(std > 0, centered / (std + epsilon), centered)


def group_mean(rewards: Tensor, weights: Tensor) -> Tensor:
    """``R - mean`` within the group: unbiased by the group's spread (Dr. GRPO, 2503.20783)."""
    return _centered(rewards, weights)[0]
