"""How good a preference model is: how often it is right, how sure it may be, and whether it counts words.

All of it follows from the scores of the pairs; nothing here knows an encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpoforge_plugins.preference.loss import preference_probability

__all__ = ["accuracy", "assess", "calibration", "correlation", "wilson"]

Z95 = 1.959963984540054
"""The 97.5 % point of the normal distribution."""


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval (Wilson's) of a share of which ``right`` in ``count`` were seen."""
    share, z2 = right / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(chosen: Tensor, rejected: Tensor) -> dict[str, Any] | None:
    """The share of pairs whose chosen completion has the higher score, a tie counting half; None of no pairs."""
    if not len(chosen):
        return None
    right = outcomes(chosen, rejected).sum().item()
    low, high = wilson(right, len(chosen))
    return {"accuracy": right / len(chosen), "low": low, "high": high, "pairs": len(chosen)}


def outcomes(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen completion scores higher, 0 where lower, one half where neither; ``[n]`` float64."""
    return ((chosen - rejected).sign().double() + 1) / 2


def calibration(chosen: Tensor, rejected: Tensor, num_bins: int = 10) -> dict[str, Any]:
    """How far ``P(chosen is better)`` is from how often it is: the expected calibration error, and its bins.

    A pair counts where the model is sure of either side, with the confidence ``max(P, 1 - P)`` from 0.5 to 1:
    ``ECE = sum_b n_b / N |accuracy_b - confidence_b|`` over equal bins.
    """
    probability = preference_probability(chosen, rejected)
    confidence, right = probability.maximum(1 - probability), outcomes(chosen, rejected)
    place = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    bins = []
    for number in range(num_bins):
        inside = place == number
        if inside.any():
            own = {"confidence": confidence[inside].mean().item(), "accuracy": right[inside].mean().item()}
            low = 0.5 + number / (2 * num_bins)
            bins.append({"from": low, "to": low + 0.5 / num_bins, **own, "pairs": int(inside.sum())})
    error = sum(one["pairs"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / len(chosen)
    return {"ece": error, "bins": bins}


def correlation(first: Tensor, second: Tensor) -> float | None:
    """Pearson's correlation; None where one of the two does not vary."""
    a, b = first.double() - first.double().mean(), second.double() - second.double().mean()
    size = a.norm() * b.norm()
    return float(a @ b / size) if size > 0 else None


def assess(
    chosen: Tensor,
    rejected: Tensor,
    *,
    again: tuple[Tensor, Tensor],
    lengths: Sequence[tuple[int, int]],
    kinds: Sequence[str],
) -> dict[str, Any]:
    """Every figure of the scores of ``n`` pairs.

    Args:
        chosen, rejected: ``[n]`` float64.
        again: the same scores, asked for in the other order and in other batches.
        lengths: characters of the chosen and of the rejected completion.
        kinds: what makes the rejected one worse; empty where that is not known.
    """
    probability, reverse = preference_probability(chosen, rejected), preference_probability(again[1], again[0])
    groups = {kind: torch.tensor([one == kind for one in kinds]) for kind in sorted({*kinds} - {""})}
    return {
        "pairs": accuracy(chosen, rejected),
        "kinds": {kind: accuracy(chosen[rows], rejected[rows]) for kind, rows in groups.items()},
        "calibration": calibration(chosen, rejected),
        "length": length_bias(chosen, rejected, lengths),
        "antisymmetry": {"max_error": float((probability + reverse - 1).abs().max())},
        "score": {
            "chosen_mean": chosen.mean().item(),
            "rejected_mean": rejected.mean().item(),
            "margin_mean": (chosen - rejected).mean().item(),
        },
    }


def length_bias(chosen: Tensor, rejected: Tensor, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Accuracy where the chosen completion is the shorter and where it is the longer, and what length explains.

    ``margin_correlation`` is between the difference in score and the difference in length within a pair,
    ``score_correlation`` between score and length over all completions.
    """
    long = torch.tensor(lengths, dtype=torch.float64)
    gap = long[:, 0] - long[:, 1]
    where = {"chosen_shorter": gap < 0, "chosen_longer": gap > 0, "same_length": gap == 0}
    return {
        **{name: accuracy(chosen[rows], rejected[rows]) for name, rows in where.items()},
        "score_correlation": correlation(torch.cat([chosen, rejected]), torch.cat([long[:, 0], long[:, 1]])),
        "margin_correlation": correlation(torch.cat([chosen - rejected, rejected - chosen]), torch.cat([gap, -gap])),
    }
