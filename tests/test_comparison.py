"""Two models on the same problems: the counts, the test, the differences and the words for them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from grpoforge.comparison import Comparison, check_same_problems, compare
from grpoforge.errors import DataError
from grpoforge.outcomes import Attempt, Outcome, figures


def attempt(is_right: bool) -> Attempt:
    return Attempt(
        completion="#### 7",
        answer="7" if is_right else "8",
        verdict="right" if is_right else "wrong",
        num_tokens=3,
        finish_reason="stop",
        temperature=1.0,
    )


def outcome(index: int, greedy: bool, samples: Sequence[bool] = (), problem: str = "") -> Outcome:
    return Outcome(
        index=index,
        origin=f"test.jsonl:{index + 1}",
        problem=problem or f"sha-{index}",
        question="?",
        gold="7",
        greedy=attempt(greedy),
        samples=tuple(attempt(one) for one in samples),
    )


def compared(a: Sequence[Outcome], b: Sequence[Outcome]) -> Comparison:
    return compare(("new", "old"), a, b, lambda one: figures(one, (1, 2), votes=False), 3)


def greedy(both: int, only_a: int, only_b: int, neither: int) -> Comparison:
    pairs = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    return compared(*([outcome(i, pair[side]) for i, pair in enumerate(pairs)] for side in (0, 1)))


def test_counts_test_and_words() -> None:
    found = greedy(5, 9, 1, 3)
    assert (found.a, found.b) == ("new", "old")
    counts = (found.both_right, found.only_a_right, found.only_b_right, found.both_wrong)
    assert counts == (5, 9, 1, 3)
    assert found.p_value == 22 / 1024  # 2 (1 + 10) / 2^10
    assert found.verdict == (
        "Greedy, A alone is right on 9 and B alone on 1: A is better, by more than chance explains (p = 0.021)."
    )
    gap = found.differences["eval_pass@1"]
    assert (gap.a, gap.b, gap.a_minus_b.value) == (14 / 18, 6 / 18, 8 / 18)
    assert 0 < gap.a_minus_b.low < 8 / 18 < gap.a_minus_b.high < 1


def test_the_other_way_round() -> None:
    found = greedy(5, 1, 9, 3)
    assert "B is better" in found.verdict and found.p_value == 22 / 1024
    assert found.differences["eval_pass@1"].a_minus_b.value == -8 / 18


def test_what_chance_does_as_well() -> None:
    assert greedy(2, 3, 2, 1).verdict == (
        "Greedy, A alone is right on 3 and B alone on 2: chance alone does as much (p = 1), so neither is shown to be "
        "better."
    )
    assert greedy(2, 0, 0, 2).verdict == "Greedy, A and B are right on the same problems."


def test_samples_are_compared_problem_by_problem() -> None:
    # A is right once more of two on every problem: no spread in the difference, though there is in either model.
    a = [outcome(0, True, (True, True)), outcome(1, True, (True, False))]
    b = [outcome(0, True, (True, False)), outcome(1, True, (False, False))]
    gap = compared(a, b).differences["eval_mean@2"]
    assert (gap.a, gap.b, gap.a_minus_b.value, gap.a_minus_b.standard_error) == (0.75, 0.25, 0.5, 0.0)
    many = compared(
        [outcome(i, True, (True, True)) for i in range(40)], [outcome(i, True, (True, False)) for i in range(40)]
    )
    # All 40 differences are 0.5: with q = 1 - 0.025^(1/40), low = 0.5 - 1.5 q and high = 0.5 + 0.5 q.
    assert many.verdict.endswith("Sampled, A is ahead by +50.0 points [+36.8, +54.4]: A is better.")
    same = compared(a, a)
    assert same.verdict.endswith(": no difference is shown.")


def test_metrics_that_one_side_lacks_are_left_out() -> None:
    a = [outcome(0, True, (True, True)), outcome(1, False, (True, False))]
    assert set(compared(a, [outcome(0, True), outcome(1, True)]).differences) == {"eval_pass@1"}
    four = [outcome(0, True, (True,) * 4), outcome(1, False, (True,) * 4)]
    assert set(compared(a, four).differences) == {"eval_pass@1", "eval_pass@2"}


def test_other_problems_are_refused() -> None:
    known = [outcome(0, True), outcome(1, True)]
    same = [{"problem": "sha-0", "origin": "x:9"}, {"problem": "sha-1", "origin": "x:8"}]
    check_same_problems(known, same, "r.parquet")
    hint = "compare on the same problems: the same `--dataset`, `--num-problems` and `data.*`"
    with pytest.raises(DataError) as error:
        check_same_problems(known, same[:1], "r.parquet")
    assert (error.value.message, error.value.hint) == (
        "r.parquet has other problems: 2 on one side, 1 on the other",
        hint,
    )
    with pytest.raises(DataError) as error:
        check_same_problems(known, same[::-1], "r.parquet")
    assert (error.value.message, error.value.hint) == (
        "r.parquet has other problems: number 0 is test.jsonl:1 on one side and x:8 on the other, "
        "with another question or answer",
        hint,
    )
