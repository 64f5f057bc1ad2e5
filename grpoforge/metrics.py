"""Numbers about a step, averaged in one place. Names are TRL's where TRL has one.

Every metric is a pair (sum, count) until the end, so that micro-batches, optimizer steps and ranks of unequal size
average correctly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from grpoforge.types import Batch, Rollouts, Scores, weighted_total

Totals = dict[str, tuple[float, float]]
"""Metric name to (sum, count)."""

MAX_TEMPERATURES = 8
"""Temperatures of one step that are reported one by one."""


class Meter:
    """Averages over the tokens, micro-batches and optimizer steps of one step."""

    def __init__(self) -> None:
        self.totals: Totals = {}

    def add_tokens(self, mask: Tensor, per_token: Mapping[str, Tensor]) -> None:
        """Per-token values ``[b, T]``, averaged over the tokens where ``mask [b, T]`` is True."""
        count = float(mask.sum())
        for name, values in per_token.items():
            kept = torch.where(mask, values.detach(), torch.zeros_like(values))
            self.add(name, float(kept.sum()), count)

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Add ``total`` made of ``count`` things to the average called ``name``."""
        before = self.totals.get(name, (0.0, 0.0))
        self.totals[name] = (before[0] + total, before[1] + count)

    def largest(self, name: str, value: float) -> None:
        """Keep the largest value called ``name`` (of this rank; ranks are averaged)."""
        self.totals[name] = (max(value, self.totals.get(name, (value, 1.0))[0]), 1.0)


def averages(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Sum over count of each metric; NaN where nothing was counted."""
    return {name: total / count if count else float("nan") for name, (total, count) in totals.items()}


def effective_sample_size(metrics: Mapping[str, float]) -> dict[str, float]:
    """``metrics`` with ``sampling/ess`` in place of the mean square of the correction weights.

    ``(sum w)^2 / (N sum w^2)``: 1 when all are equal, ``1 / N`` when one has all the weight.
    """
    metrics = dict(metrics)
    square = metrics.pop("correction/square", None)
    if square is not None:
        metrics["sampling/ess"] = metrics["correction/mean"] ** 2 / square if square else 0.0
    return metrics


def _mean(values: Iterable[float]) -> tuple[float, float]:
    listed = list(values)
    return sum(listed), float(len(listed))


def rollout_totals(rollouts: Rollouts, scores: Scores) -> Totals:
    """Means over rows and groups of the rollouts and their scores."""
    completions = rollouts.flat()
    finished = [completion.finish_reason == "stop" for completion in completions]
    lengths = [float(len(completion.token_ids)) for completion in completions]
    total = scores.total()
    spreads = group_std(total)
    return {
        "completions/mean_length": _mean(lengths),
        "completions/mean_terminated_length": _mean(
            length for length, stop in zip(lengths, finished, strict=True) if stop
        ),
        "completions/clipped_ratio": _mean(float(not stop) for stop in finished),
        "reward": _mean(total[~total.isnan()].tolist()),
        "reward_std": _mean(spreads),
        "frac_reward_zero_std": _mean(float(std < 1e-8) for std in spreads),
        **reward_totals(scores),
    }


def rollout_extremes(rollouts: Rollouts) -> dict[str, float]:
    """Shortest and longest completion in tokens."""
    lengths = [len(completion.token_ids) for completion in rollouts.flat()]
    return {"completions/min_length": float(min(lengths)), "completions/max_length": float(max(lengths))}


def group_std(total: Tensor) -> list[float]:
    """Standard deviation (n - 1) of the scored rows of each group, ``[P, G]`` to ``P`` numbers; 0 for fewer than 2."""
    groups = [group[~group.isnan()] for group in total]
    return [float(group.std()) if len(group) > 1 else 0.0 for group in groups]


def reward_totals(scores: Scores) -> Totals:
    """Mean, spread, weighted mean, unscored share and seconds of each reward."""
    totals: Totals = {}
    for index, name in enumerate(scores.names):
        column = scores.rewards[:, :, index].reshape(-1)
        scored = column[~column.isnan()]
        mean, count = float(scored.sum()), float(len(scored))
        totals[f"rewards/{name}/mean"] = (mean, count)
        totals[f"rewards/{name}/std"] = (float(scored.std()) if len(scored) > 1 else 0.0, 1.0)
        totals[f"rewards/{name}/weighted_mean"] = (mean * float(scores.weights[index]), count)
        totals[f"rewards/{name}/unscored"] = _mean(column.isnan().double().tolist())
        totals[f"rewards/{name}/seconds"] = (scores.seconds[index], 1.0)
    return totals


def temperature_totals(rewards: Tensor, weights: Tensor, temperatures: Tensor) -> Totals:
    """Mean total reward of the rows at each temperature, where there is more than one.

    Args:
        rewards: ``[P, G, K]`` of all ranks, so that every rank reports the same names.
        weights: ``[K]``.
        temperatures: ``[P, G]``. A sampler with a temperature for every row would make a metric of each: more than
            `MAX_TEMPERATURES` are not reported.
    """
    found = sorted(set(temperatures.flatten().tolist()))
    if not 1 < len(found) <= MAX_TEMPERATURES:
        return {}
    total = weighted_total(rewards, weights)
    meter = Meter()
    for temperature in found:
        here = total[(temperatures == temperature) & ~total.isnan()]
        meter.add(f"reward_T/{temperature:g}/mean", float(here.sum()), float(len(here)))
    return meter.totals


def sampling_difference(batch: Batch, old_logprobs: Tensor) -> tuple[float, float, float]:
    """``|old - sampling|`` log-prob over real tokens: (sum, count, maximum). Near 0 when sampler and policy agree."""
    gap = (old_logprobs - batch.sampling_logprobs)[batch.completion_mask].abs()
    return float(gap.sum()), float(gap.numel()), float(gap.max()) if gap.numel() else 0.0
