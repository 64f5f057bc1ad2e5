"""Mean and variance of an estimated gradient, and how the mean compares with the true one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpoforge.testing.kit import Broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What an estimator of a gradient is worth against the true gradient."""

    cosine: float | None
    """Between the expected gradient and the true one; None when the expected one is 0."""
    scale: float
    """Length of the expected gradient along the true one, over the length of that."""
    bias: float
    """``|expected - true| / |true|``."""
    variance: float
    """Of the gradient of one row: the sum over its components; of a mean of ``B`` rows, times ``B``."""
    noise: float | None
    """``variance / |expected|^2``: how many rows make signal and noise equal; None when the expected gradient is 0."""
    error: float | None
    """Standard error of the expected gradient over its length, where it was sampled; None where it is exact."""


def mean_and_variance(weights: Tensor, gradients: Tensor) -> tuple[Tensor, float]:
    """Mean ``[D]`` and summed variance of ``gradients [N, D]``, of probabilities ``weights [N]``.

    Raises:
        Broken: a gradient is not finite.
    """
    if not bool(gradients.isfinite().all()):
        raise Broken("a gradient is not finite")
    mean = weights @ gradients
    return mean, float(weights @ (gradients - mean).square().sum(dim=1))


def compare(
    weights: Tensor, gradients: Tensor, true: Tensor, *, num_rows: int = 1, num_samples: int | None = None
) -> Estimate:
    """What ``gradients [N, D]``, of probabilities ``weights [N]``, are worth as estimates of ``true [D]``.

    Args:
        num_rows: each gradient is the mean of that many rows.
        num_samples: they are that many samples, not all there are.

    Raises:
        Broken: a gradient is not finite.
    """
    mean, variance = mean_and_variance(weights, gradients)
    size, true_size = float(mean.norm()), float(true.norm())
    is_zero = size <= 1e-12 * true_size
    return Estimate(
        cosine=None if is_zero else float(mean @ true) / (size * true_size),
        scale=float(mean @ true) / true_size**2,
        bias=distance(mean, true),
        variance=num_rows * variance,
        noise=None if is_zero else num_rows * variance / size**2,
        error=None if num_samples is None or is_zero else math.sqrt(variance / num_samples) / size,
    )


def distance(mean: Tensor, true: Tensor) -> float:
    """``|mean - true| / |true|``."""
    return float((mean - true).norm() / true.norm())


def backward(total: Tensor, leaf: Tensor) -> Tensor:
    """The derivative of the scalar ``total`` by ``leaf``; 0 where nothing leads there."""
    if not total.requires_grad:
        return torch.zeros_like(leaf)
    found = torch.autograd.grad(total, leaf, allow_unused=True)[0]
    return torch.zeros_like(leaf) if found is None else found
