"""What the advantages share: totals with their unscored rows, deviations beyond rounding, and standard deviations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from grpoforge.types import rounding, weighted_total

Std = Annotated[Literal["sample", "population"], "divide squared deviations by n - 1 (sample) or by n (population)"]
Epsilon = Annotated[float, Field(ge=0), "added to the standard deviation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """``R = sum_k w_k R_k`` of every completion, and which of them were scored at all."""

    values: Tensor
    """``[P, G]``; 0 where not scored."""
    scored: Tensor
    """``[P, G]`` bool."""
    noise: Tensor
    """``[P, 1]``: how far totals of a group may lie from their mean by rounding alone."""

    @property
    def count(self) -> Tensor:
        """Scored rows of each group, ``[P, 1]``."""
        return self.scored.sum(dim=1, keepdim=True)

    @property
    def mean(self) -> Tensor:
        """Mean over the scored rows of each group, ``[P, 1]``; 0 for a group without any."""
        return self.values.sum(dim=1, keepdim=True) / self.count.clamp(min=1)

    def over_batch(self) -> Totals:
        """The same rows as one group of ``P * G``."""
        return Totals(
            values=self.values.reshape(1, -1), scored=self.scored.reshape(1, -1), noise=self.noise.amax(0)[None]
        )

    def minus(self, baseline: Tensor) -> Tensor:
        """``R - baseline``, ``[P, G]``; 0 where not scored, and where the difference is rounding.

        Equal totals differ by rounding, from each other and from their mean: dividing that by a standard deviation of
        nearly 0 makes a signal of it.
        """
        difference = self.values - baseline
        return torch.where(self.scored & (difference.abs() > self.noise), difference, torch.zeros_like(difference))


def totals(rewards: Tensor, weights: Tensor) -> Totals:
    """The totals of ``rewards [P, G, K]``, weighted by ``weights [K]``."""
    values = weighted_total(rewards, weights)
    return Totals(values=values.nan_to_num(nan=0.0), scored=~values.isnan(), noise=rounding(rewards, weights))


def deviation(centered: Tensor, count: Tensor, std: Literal["sample", "population"]) -> Tensor:
    """Standard deviation of each row of ``centered [P, G]``, ``[P, 1]``, over ``count [P, 1]`` values.

    Values that do not count are 0 in ``centered``. A single value deviates by 0.
    """
    freedom = count - 1 if std == "sample" else count
    return (centered.square().sum(dim=1, keepdim=True) / freedom.clamp(min=1)).sqrt()


def scaled(centered: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """``centered / (scale + epsilon)``, and ``centered`` as it is where ``scale`` is 0."""
    return torch.where(scale > 0, centered / (scale + epsilon), centered)
