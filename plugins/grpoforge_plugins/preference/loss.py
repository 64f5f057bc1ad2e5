"""Bradley-Terry: the better of two completions has the higher score."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bradley_terry", "preference_probability"]


def bradley_terry(chosen: Tensor, rejected: Tensor, margins: Tensor | float = 0.0, *, center: float = 0.0) -> Tensor:
    """Mean over pairs of ``-log sigmoid(h_c - h_r - m) + c (h_c + h_r)^2``, a scalar.

    The scores are known up to a constant per prompt only; the second term (2312.09244) keeps them around 0.

    Args:
        chosen: scores ``h_c [n]``.
        rejected: scores ``h_r [n]``.
        margins: how far apart the scores should at least be, ``[n]`` or one number.
        center: the coefficient ``c``; 0.01 is usual.
    """
    fit = -torch.nn.functional.logsigmoid(chosen - rejected - margins)
    return (fit + center * (chosen + rejected).square()).mean()


def preference_probability(first: Tensor, second: Tensor) -> Tensor:
    """``P(first is better) = sigmoid(h_first - h_second)``; the two orders sum to 1."""
    return torch.sigmoid(first - second)
