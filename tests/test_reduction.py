"""The four reductions: golden weights, what they sum to, and additive counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.reduction import REDUCTIONS, ReductionName, count, reduce, token_weights

# Rows of 3, 1 and 0 tokens: B = 2 rows with tokens, N = 4 tokens, L_max = 5.
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


@pytest.mark.parametrize(
    ("name", "long", "short"),
    [
        ("sequence", 1 / (2 * 3), 1 / (2 * 1)),  # 1 / (B n_i)
        ("token", 1 / 4, 1 / 4),  # 1 / N
        ("constant", 1 / (2 * 5), 1 / (2 * 5)),  # 1 / (B L_max)
        ("sequence_sum", 1 / 2, 1 / 2),  # 1 / B
    ],
)
def test_golden_weights(name: ReductionName, long: float, short: float) -> None:
    weights = token_weights(name, MASK, count(MASK, 5))
    assert weights.dtype == torch.float64
    expected = [[long] * 3, [short, 0.0, 0.0], [0.0] * 3]
    assert weights.tolist() == [pytest.approx(row, abs=1e-16) for row in expected]


masks = st.integers(1, 6).flatmap(lambda width: st.lists(st.integers(0, width), min_size=1, max_size=9))


@given(lengths=masks)
def test_means_are_means(lengths: list[int]) -> None:
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    counts = count(mask, 6)
    whole = 1.0 if sum(lengths) else 0.0
    for name in ("sequence", "token"):
        assert float(token_weights(name, mask, counts).sum()) == pytest.approx(whole, abs=1e-12)


@given(lengths=masks, at=st.integers(0, 9))
def test_counts_of_parts_add_up_and_give_the_same_weights(lengths: list[int], at: int) -> None:
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    parts = mask[:at], mask[at:]
    counts = count(mask, 6)
    first, second = (count(part, 6) for part in parts)
    assert (counts.rows, counts.tokens) == (first.rows + second.rows, first.tokens + second.tokens)
    for name in REDUCTIONS:
        assert torch.cat([token_weights(name, part, counts) for part in parts]).equal(token_weights(name, mask, counts))


def test_an_empty_step_has_no_weight() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for name in REDUCTIONS:
        assert token_weights(name, nothing, count(nothing, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_reduce_never_looks_at_masked_values(garbage: float) -> None:
    per_token = torch.tensor([[2.0, 4.0, 6.0], [10.0, garbage, garbage], [garbage] * 3], requires_grad=True)
    loss = reduce(per_token, token_weights("sequence", MASK, count(MASK, 5)))
    # ((2 + 4 + 6) / 3 + 10) / 2 = 7
    assert float(loss.detach()) == pytest.approx(7.0)
    (gradient,) = torch.autograd.grad(loss, per_token)
    assert gradient.tolist() == [pytest.approx([1 / 6] * 3), [0.5, 0.0, 0.0], [0.0] * 3]
