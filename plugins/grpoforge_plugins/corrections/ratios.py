"""The log-ratio of trainer to sampler, per token and per row."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from grpoforge.errors import ConfigError

Cap = Annotated[float, Field(gt=0), "largest weight"]
Low = Annotated[float, Field(ge=0), "smallest ratio that is kept"]
High = Annotated[float, Field(gt=0), "largest ratio that is kept"]
Kept = Annotated[Literal["ratio", "one"], "weight of what is kept: its ratio, or 1 (a pure mask)"]


def log_ratio(old_logprobs: Tensor, sampling_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    """``old - sampling``, ``[b, T]``; 0 where masked, before any exp."""
    difference = old_logprobs - sampling_logprobs
    return torch.where(completion_mask, difference, torch.zeros_like(difference))


def row_mean(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Mean of ``values [b, T]``, 0 where masked, over each row's tokens, ``[b, 1]``; 0 for a row without any."""
    return values.sum(dim=1, keepdim=True) / completion_mask.sum(dim=1, keepdim=True).clamp(min=1)


def inside(ratio: Tensor, weight: Tensor, low: float, high: float) -> Tensor:
    """``weight`` where ``low <= ratio <= high``, else 0."""
    return torch.where((ratio >= low) & (ratio <= high), weight, torch.zeros_like(weight))


def check_bounds(low: float, high: float) -> None:
    """Raise ConfigError unless ``low < high``."""
    if not low < high:
        raise ConfigError(
            f"correction options `low` {low:g} and `high` {high:g} leave nothing between them", "choose `low` < `high`"
        )
