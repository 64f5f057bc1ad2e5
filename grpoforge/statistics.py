"""What verdicts on a sample of problems say about all problems, and how sure that is.

Pure functions of numbers in float64; nothing depends on the order of the problems. Problems are what was sampled, so
every spread is *over problems*: samples of one problem are no independent observations (2411.00640).
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
CHUNK = 2_000_000
"""Values drawn at a time, which bounds the memory of a bootstrap to some 32 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over problems and how far to trust it."""

    value: float
    low: float
    high: float
    """Ends of the 95% interval of the mean."""
    standard_error: float
    """NaN for a single problem."""


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of ``k`` samples is right, ``1 - C(n - c, k) / C(n, k)`` (2107.03374).

    Unbiased for every ``k`` up to ``num_samples``: it is the mean over all sets of ``k`` of the ``n`` samples.
    """
    assert 0 <= num_right <= num_samples and 1 <= k <= num_samples
    sets = math.comb(num_samples, k)
    return (sets - math.comb(num_samples - num_right, k)) / sets


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Chance that the answer most frequent among ``k`` samples is right: maj@k (self-consistency, 2203.11171).

    The mean over all sets of ``k`` of the ``n`` samples, and over the winners of a tie, which are equally likely:
    unbiased as `pass_at_k` is, and without a draw. Samples without an answer do not vote; where nobody votes, nothing
    is right.

    Args:
        answers: ``n`` answers, equal where they mean the same; None where none could be read.
        right: ``n`` verdicts. An answer judged in both ways counts as right to the share of its samples that are.
    """
    assert 1 <= k <= len(answers) == len(right)
    votes = Counter(answer for answer in answers if answer is not None)
    judged = Counter(answer for answer, is_right in zip(answers, right, strict=True) if is_right)
    silent = len(answers) - votes.total()
    return math.fsum(
        judged[answer] / count * _chance_to_win(count, _without(votes, answer), silent, k)
        for answer, count in votes.items()
        if judged[answer]
    )


def _without(votes: Counter[str], answer: str) -> tuple[int, ...]:
    """Votes of the other answers, in an order that makes equal elections equal."""
    return tuple(sorted(count for other, count in votes.items() if other != answer))


@functools.lru_cache(maxsize=4096)
def _chance_to_win(count: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """Chance that an answer with ``count`` votes wins among ``k`` samples, a tie of m being won with chance 1/m.

    Summed over how many of its votes are among the ``k`` and how many other answers have as many.
    """
    won = Fraction(0)
    for mine in range(1, min(count, k) + 1):
        for ties, sets in _rivals(others, silent, mine, k - mine).items():
            won += Fraction(math.comb(count, mine) * sets, ties + 1)
    return float(won / math.comb(count + sum(others) + silent, k))


def _rivals(others: tuple[int, ...], silent: int, most: int, size: int) -> dict[int, int]:
    """Sets of ``size`` samples in which no answer has more than ``most`` votes, by the number that have ``most``."""
    sets = {(chosen, 0): math.comb(silent, chosen) for chosen in range(min(silent, size) + 1)}
    for count in others:
        larger: dict[tuple[int, int], int] = defaultdict(int)
        for (chosen, ties), number in sets.items():
            for votes in range(min(count, most, size - chosen) + 1):
                larger[chosen + votes, ties + (votes == most)] += number * math.comb(count, votes)
        sets = larger
    return {ties: number for (chosen, ties), number in sets.items() if chosen == size}


def estimate(values: Sequence[float], *, seed: int, bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """Mean over problems, its 95% interval and its standard error.

    The interval is a percentile bootstrap over problems (Efron and Tibshirani 1993, 13.3) of 10,000 resamples. Where
    all values are equal, resampling sees no spread and would be sure of them; then see `_interval_of_equals`.

    Args:
        values: one number per problem, ``N`` of them, at least 1.
        seed: fixes the resamples.
        bounds: least and largest value that a problem can have.
    """
    assert len(values) > 0
    ordered = numpy.sort(numpy.asarray(values, dtype=numpy.float64))
    value = math.fsum(values) / len(values)
    if ordered[0] == ordered[-1]:
        low, high = _interval_of_equals(value, len(values), bounds)
    else:
        ends = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
        low, high = (float(end) for end in numpy.quantile(_resampled_means(ordered, seed), ends))
    return Estimate(value=value, low=low, high=high, standard_error=standard_error(values))


def _resampled_means(ordered: NDArray[numpy.float64], seed: int) -> NDArray[numpy.float64]:
    """Means of samples of ``N`` drawn with replacement from ``ordered [N]``: ``[RESAMPLES]``."""
    generator, size = numpy.random.default_rng(seed), len(ordered)
    rows = max(CHUNK // size, 1)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return numpy.concatenate([ordered[generator.integers(size, size=(n, size))].mean(axis=1) for n in sizes])


def _interval_of_equals(value: float, count: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval when all ``count`` problems have the same value.

    If a problem had another value with chance q, all would be equal with chance ``(1 - q)^N``: q is at most
    ``1 - 0.025^(1/N)``, and what differs lies within ``bounds``. For values of 0 and 1 that is the exact interval of
    Clopper and Pearson.
    """
    other = 1.0 - float(((1 - CONFIDENCE) / 2) ** (1 / count))
    return value - other * (value - bounds[0]), value + other * (bounds[1] - value)


def standard_error(values: Sequence[float]) -> float:
    """``sqrt(sum (x - mean)^2 / (N - 1) / N)``, the standard error of the mean; NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of the exact test of McNemar (1947) for two models on the same problems.

    Problems on which one alone is right fall to either with chance 1/2 if the models are equally good:
    ``min(1, 2 P(X <= min(b, c)))`` for ``X ~ Binomial(b + c, 1/2)``. 1 where there are none.
    """
    num_decided = only_first + only_second
    tail = sum(math.comb(num_decided, number) for number in range(min(only_first, only_second) + 1))
    p_value: float = 2 * tail / 2**num_decided
    return min(1.0, p_value)
