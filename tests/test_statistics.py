"""Estimates against enumeration in exact fractions, p-values by hand, and intervals that cover what they claim."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.statistics import estimate, majority_at_k, mcnemar, pass_at_k, standard_error


def mean_over_sets(num_samples: int, k: int, value: Sequence[Fraction] | object) -> Fraction:
    """The mean of ``value(set)`` over all sets of ``k`` of ``num_samples`` samples."""
    sets = list(itertools.combinations(range(num_samples), k))
    return sum((Fraction(value(chosen)) for chosen in sets), Fraction(0)) / len(sets)  # type: ignore[operator]


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_pass_at_k_is_the_mean_over_all_sets(num_samples: int) -> None:
    for num_right in range(num_samples + 1):
        for k in range(1, num_samples + 1):
            truth = mean_over_sets(num_samples, k, lambda chosen, c=num_right: any(one < c for one in chosen))
            assert pass_at_k(num_samples, num_right, k) == float(truth)


def test_pass_at_k_of_many_samples() -> None:
    # 1 - C(190, 100) / C(200, 100) = 1 - (100 99 ... 91) / (200 199 ... 191), by hand: ten factors of each.
    truth = 1 - Fraction(math.prod(range(91, 101)), math.prod(range(191, 201)))
    assert pass_at_k(200, 10, 100) == float(truth)
    assert pass_at_k(5000, 1, 2500) == 0.5


def enumerated_majority(answers: Sequence[str | None], right: Sequence[bool], k: int) -> Fraction:
    """maj@k from its definition: every set of ``k``, every winner of a tie."""

    def won(chosen: Sequence[int]) -> Fraction:
        votes = Counter(answers[one] for one in chosen if answers[one] is not None)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        shares = []
        for winner in winners:
            of_winner = [right[one] for one in range(len(answers)) if answers[one] == winner]
            shares.append(Fraction(sum(of_winner), len(of_winner)))
        return sum(shares, Fraction(0)) / len(winners) if winners else Fraction(0)

    return mean_over_sets(len(answers), k, won)


def test_majority_is_the_mean_over_all_sets_for_every_election_of_up_to_six() -> None:
    for num_samples in range(1, 7):
        for answers in itertools.combinations_with_replacement(["1", "2", "3", None], num_samples):
            right = [answer == "1" for answer in answers]
            for k in range(1, num_samples + 1):
                assert majority_at_k(answers, right, k) == float(enumerated_majority(answers, right, k))


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.booleans()), min_size=1, max_size=8),
    st.data(),
)
def test_majority_where_an_answer_was_judged_in_both_ways(
    samples: list[tuple[str | None, bool]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(samples)))
    answers, right = zip(*samples)
    truth = enumerated_majority(answers, right, k)
    assert majority_at_k(answers, right, k) == pytest.approx(float(truth), abs=1e-15)


def test_majority_by_hand() -> None:
    # One of two right: the pair is a tie, won half the time.
    assert majority_at_k(["7", "8"], [True, False], 2) == 0.5
    # Three of five right is a majority; a single sample is right three times in five.
    five = ["7", "7", "7", "8", "8"]
    right = [True] * 3 + [False] * 2
    assert [majority_at_k(five, right, k) for k in (1, 5)] == [3 / 5, 1.0]
    # Two of five agree on the wrong answer, the right one has a single vote, two did not answer.
    assert majority_at_k(["7", "8", "8", None, None], [True, *[False] * 4], 5) == 0.0
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    # A right completion without an answer has no vote.
    assert majority_at_k([None, "8"], [True, False], 2) == 0.0


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=2, max_size=10), st.randoms())
def test_the_order_of_the_samples_does_not_matter(answers: list[str | None], generator: random.Random) -> None:
    shuffled = list(answers)
    generator.shuffle(shuffled)
    for k in (1, 2, len(answers)):
        before, after = (majority_at_k(one, [a == "1" for a in one], k) for one in (answers, shuffled))
        assert before == after


def test_mcnemar_against_binomial_tails_by_hand() -> None:
    # 2 P(X <= 1), X ~ Binomial(6, 1/2): 2 (1 + 6) / 64. And 2 P(X <= 2), X ~ Binomial(12, 1/2): 2 (1 + 12 + 66) / 4096.
    assert mcnemar(1, 5) == mcnemar(5, 1) == 14 / 64
    assert mcnemar(10, 2) == 158 / 4096
    assert mcnemar(0, 5) == 2 / 32
    # Both halves hold the middle: never more than 1.
    assert mcnemar(3, 3) == mcnemar(0, 0) == mcnemar(0, 1) == 1.0
    assert 0 < mcnemar(200, 400) < 1e-15


def test_the_standard_error_by_hand() -> None:
    # Mean 0.75, squares 0.0625 * 3 + 0.5625 = 0.75, over 3 and 4.
    assert standard_error([1.0, 1.0, 1.0, 0.0]) == math.sqrt(0.75 / 3 / 4)
    assert math.isnan(standard_error([1.0]))


def test_an_interval_by_hand() -> None:
    # Two problems, 0 and 1: resampled means are 0, 1/2, 1 with chances 1/4, 1/2, 1/4, so 2.5% lie at 0 and at 1.
    found = estimate([0.0, 1.0], seed=1)
    assert (found.value, found.low, found.high, found.standard_error) == (0.5, 0.0, 1.0, 0.5)
    # 100 problems, 50 right: counts of a binomial(100, 1/2), whose 2.5% and 97.5% points are 40 and 60.
    found = estimate([0.0, 1.0] * 50, seed=1)
    assert (found.low, found.high) == (0.40, 0.60)


def test_equal_values_are_no_certainty() -> None:
    # Clopper and Pearson for 4 of 4: [0.025^(1/4), 1].
    found = estimate([1.0] * 4, seed=1)
    assert (found.value, found.high, found.standard_error) == (1.0, 1.0, 0.0)
    assert found.low == pytest.approx(0.025**0.25, rel=1e-15)
    found = estimate([0.0] * 4, seed=1)
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(1 - 0.025**0.25, rel=1e-15)
    # One problem, half right: with q = 1 - 0.025 the rest may be anywhere in [0, 1].
    found = estimate([0.5], seed=1)
    assert (found.low, found.high) == (pytest.approx(0.0125), pytest.approx(0.9875))
    assert math.isnan(found.standard_error)
    # No difference on 4 problems, where a difference lies in [-1, 1].
    found = estimate([0.0] * 4, seed=1, bounds=(-1.0, 1.0))
    assert (found.low, found.high) == (pytest.approx(0.025**0.25 - 1), pytest.approx(1 - 0.025**0.25))


@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.7, 1.0]), min_size=1, max_size=30), st.randoms())
def test_the_order_of_the_problems_does_not_matter(values: list[float], generator: random.Random) -> None:
    shuffled = list(values)
    generator.shuffle(shuffled)
    # repr: the standard error of one problem is NaN, which equals nothing.
    found, again = estimate(values, seed=3), estimate(shuffled, seed=3)
    assert repr(found) == repr(again)
    assert 0.0 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1.0


def test_the_seed_fixes_the_resamples() -> None:
    values = [one / 100 for one in range(100)]
    assert estimate(values, seed=1) == estimate(values, seed=1) != estimate(values, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy", "mean of 8 samples", "difference"])
def test_the_interval_covers_the_truth_as_often_as_it_says(name: str) -> None:
    """95% of 500 trials within two points: twice the binomial error of 500 trials."""
    generator = numpy.random.default_rng(0)
    draw, truth, bounds = {
        "greedy": (lambda: generator.random(100) < 0.6, 0.6, (0.0, 1.0)),
        # Problems differ: the chance of a sample is Beta(2, 1), so its mean is 2/3.
        "mean of 8 samples": (lambda: generator.binomial(8, generator.beta(2, 1, 100)) / 8, 2 / 3, (0.0, 1.0)),
        "difference": (lambda: generator.choice([-1.0, 0.0, 1.0], 100, p=[0.1, 0.7, 0.2]), 0.1, (-1.0, 1.0)),
    }[name]
    hits = 0
    for trial in range(500):
        found = estimate(draw().astype(float).tolist(), seed=trial, bounds=bounds)
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / 500 <= 0.97
