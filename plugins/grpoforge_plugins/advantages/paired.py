"""Advantages of pairs: what counts is the gap between the two completions of a pair, and how large it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from grpoforge.errors import ConfigError
from grpoforge_plugins.advantages.totals import Epsilon, Totals, deviation, scaled, totals


class Paired:
    """``+-(R_1 - R_2) / 2`` for the two rows of a pair; 0 where their gap is below ``preference_threshold``.

    Rows ``2i`` and ``2i + 1`` of a group are a pair, as the sampler ``paired`` draws them. Linear in the gap: one of
    0.01 pushes a hundredth as hard as one of 1, so weights keep their meaning, and the two rows sum to 0. A pair with a
    row that no reward scored contributes nothing. With threshold 0 and one pair per prompt this is ``group_mean`` (and
    ``batch_std`` with ``std: sample``). A row's own tokens do not change what its partner got, so with threshold 0 the
    gradient is, without bias, half that of the mean reward at both temperatures.

    ``baseline_decay`` keeps a running mean of the reward at each temperature, ``b_T <- d b_T + (1 - d) mean R_T`` (RAE,
    2506.24119, by temperature). That of the earlier steps (at first the step's own) is taken off before gaps are
    compared with the threshold: the temperature that wins as a rule is paid only for winning by more than that.

    Metrics are of the rewards as they are: `paired/gap_mean`, the mean ``|R_1 - R_2|``; `paired/tie_ratio`, the share
    of pairs whose gap is below the threshold; `paired/win_rate_cold`, the share of the others that the colder row wins.

    Raises ConfigError for groups of odd size.
    """

    invariances: ClassVar[tuple[str, ...]] = ("shift", "group_sum")
    block: ClassVar[int] = 2

    def __init__(
        self,
        *,
        preference_threshold: Annotated[float, Field(ge=0), "smallest gap in reward that counts"] = 0.1,
        std: Annotated[
            Literal["none", "sample", "population"], "divide by the standard deviation of the batch"
        ] = "none",
        epsilon: Epsilon = 1e-4,
        baseline_decay: Annotated[
            float | None, Field(ge=0, lt=1), "share of the running mean by temperature kept at a step; null for none"
        ] = None,
    ) -> None:
        self.threshold = preference_threshold
        self.std: Literal["none", "sample", "population"] = std
        self.epsilon = epsilon
        self.decay = baseline_decay
        self.baselines: dict[float, float] = {}

    def __call__(
        self, rewards: Tensor, weights: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Mapping[str, tuple[float, float]]]:
        if rewards.shape[1] % 2:
            raise ConfigError(
                f"advantage `paired` compares two completions at a time, and a prompt has {rewards.shape[1]}",
                "use an even `batch.completions_per_prompt`",
            )
        rows = totals(rewards, weights)
        gaps = self._gaps(rows, rows.values - self._baseline(rows, temperatures))
        advantages = torch.stack([gaps, -gaps], dim=2).reshape(rewards.shape[:2]) / 2
        if self.std != "none":
            batch = rows.over_batch()
            spread = deviation(batch.minus(batch.mean), batch.count, self.std)
            advantages = scaled(advantages, spread, self.epsilon)
        return advantages, self._metrics(rows, temperatures)

    def state_dict(self) -> dict[str, Any]:
        """The running mean of each temperature."""
        return {"baselines": {str(temperature): value for temperature, value in self.baselines.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the running means that `state_dict` returned."""
        self.baselines = {float(temperature): float(value) for temperature, value in state["baselines"].items()}

    def _gaps(self, rows: Totals, values: Tensor) -> Tensor:
        """First minus second of each pair, ``[P, n]``; 0 where it does not count."""
        first, second = pairs(values)
        gaps = torch.where(_both_scored(rows), first - second, 0.0)
        return torch.where(self._counts(gaps, rows), gaps, 0.0)

    def _counts(self, gaps: Tensor, rows: Totals) -> Tensor:
        """Which gaps are real and reach the threshold: one of 0.1 on paper may be 1e-17 less, one of 0 more."""
        size, noise = gaps.abs(), 2 * rows.noise
        return (size >= self.threshold - noise) & (size > noise)

    def _baseline(self, rows: Totals, temperatures: Tensor) -> Tensor:
        """The mean of earlier steps at the temperature of each row, ``[P, G]``; 0 when there is none to be kept."""
        baseline = torch.zeros_like(rows.values)
        if self.decay is None:
            return baseline
        for temperature in sorted(set(temperatures.flatten().tolist())):
            here = temperatures == temperature
            scored = rows.values[here & rows.scored]
            if len(scored):
                mean = float(scored.mean())
                before = self.baselines.get(temperature, mean)
                baseline[here] = before
                self.baselines[temperature] = self.decay * before + (1 - self.decay) * mean
        return baseline

    def _metrics(self, rows: Totals, temperatures: Tensor) -> dict[str, tuple[float, float]]:
        """Sums and counts over the pairs that are scored; a winner has a temperature only where the two differ."""
        scored = _both_scored(rows)
        first, second = pairs(rows.values)
        warmer = torch.sub(*pairs(temperatures))
        decided = scored & self._counts(first - second, rows)
        told_apart = decided & (warmer != 0)
        cold_wins = told_apart & ((first > second) == (warmer < 0))
        num_pairs = float(scored.sum())
        return {
            "paired/gap_mean": (float((first - second).abs()[scored].sum()), num_pairs),
            "paired/tie_ratio": (num_pairs - float(decided.sum()), num_pairs),
            "paired/win_rate_cold": (float(cold_wins.sum()), float(told_apart.sum())),
        }


def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """``[P, G]`` to the first and the second row of every pair, ``[P, G / 2]`` each."""
    first, second = values.reshape(len(values), -1, 2).unbind(dim=2)
    return first, second


def _both_scored(rows: Totals) -> Tensor:
    first, second = pairs(rows.scored)
    return first & second
