"""How per-token losses become one number: a closed set of four, each a weight per token.

The loss of an optimizer step is ``sum(weights * per_token_loss)`` over every row of every micro-batch of every rank.
The weights are computed once per optimizer step from counts over all of its rows, so the micro-batch size, the padding
and the number of ranks cannot change the gradient.

A mean over the tokens of the current micro-batch (TRL's ``bnpo``) is deliberately absent: its gradient depends on how
the rows happen to be split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

ReductionName = Literal["sequence", "token", "constant", "sequence_sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Sizes of one optimizer step, over all ranks."""

    rows: int
    """Rows with at least one completion token."""
    tokens: int
    """Completion tokens, ``N``."""
    max_completion_length: int
    """The sampler's limit, a constant of the run."""


def count(completion_mask: Tensor, max_completion_length: int) -> Counts:
    """Counts of the local rows of an optimizer step; ``completion_mask [B, T]`` bool."""
    return Counts(
        rows=int(completion_mask.any(dim=1).sum()),
        tokens=int(completion_mask.sum()),
        max_completion_length=max_completion_length,
    )


def _sequence(mask: Tensor, counts: Counts) -> Tensor:
    """``1 / (B n_i)``: the mean over rows of each row's token mean (GRPO, 2402.03300)."""
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mask.double() / (lengths * max(counts.rows, 1))


def _token(mask: Tensor, counts: Counts) -> Tensor:
    """``1 / N``: the mean over all completion tokens of the step (DAPO, 2503.14476)."""
    return mask.double() / max(counts.tokens, 1)


def _constant(mask: Tensor, counts: Counts) -> Tensor:
    """``1 / (B L_max)``: no row's weight depends on its length (Dr. GRPO, 2503.20783)."""
    return mask.double() / (max(counts.rows, 1) * counts.max_completion_length)


def _sequence_sum(mask: Tensor, counts: Counts) -> Tensor:
    """``1 / B``: the mean over rows of each row's token sum."""
    return mask.double() / max(counts.rows, 1)


REDUCTIONS: Mapping[ReductionName, Callable[[Tensor, Counts], Tensor]] = MappingProxyType(
    {"sequence": _sequence, "token": _token, "constant": _constant, "sequence_sum": _sequence_sum}
)
assert set(REDUCTIONS) == set(get_args(ReductionName))


def token_weights(name: ReductionName, completion_mask: Tensor, counts: Counts) -> Tensor:
    """Weight of every token in the loss of the step, ``[B, T]`` float64, 0 where masked."""
    return REDUCTIONS[name](completion_mask, counts)


def reduce(per_token: Tensor, weights: Tensor) -> Tensor:
    """``sum(weights * per_token)``, a scalar; ``per_token`` is replaced by 0 where the weight is 0.

    Replaced, not multiplied: a masked position may hold inf or NaN, and 0 * inf is NaN.
    """
    kept = torch.where(weights > 0, per_token, torch.zeros_like(per_token))
    return (kept * weights.to(per_token.dtype)).sum()
