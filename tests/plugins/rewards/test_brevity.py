from __future__ import annotations

import pytest

from grpoforge_plugins.rewards.brevity import brevity


def _one(text: str, num_tokens: int, reason: str = "stop", **options: bool) -> float:
    return brevity([text], [tuple(range(num_tokens))], [reason], 100, **options)[0]


def test_fewer_tokens_are_better() -> None:
    rewards = brevity(["#### 18"] * 3, [(1,) * 10, (1,) * 25, (1,) * 100], ["stop"] * 3, 100)
    assert rewards == [0.9, 0.75, 0.0]


@pytest.mark.parametrize(
    ("text", "num_tokens", "reason"),
    [
        ("", 0, "stop"),
        ("", 1, "stop"),
        (" \n", 2, "stop"),
        ("I do not know.", 5, "stop"),
        ("#### 18 or 19", 5, "stop"),
        ("<think>#### 18</think>", 5, "stop"),
        ("#### 18", 10, "length"),
        ("#### 18", 120, "stop"),
    ],
)
def test_empty_cut_off_answerless_and_overlong_completions_earn_nothing(
    text: str, num_tokens: int, reason: str
) -> None:
    assert _one(text, num_tokens, reason) == 0.0


def test_answer_need_not_be_a_number_when_told_so() -> None:
    assert _one("Paris", 20) == 0.0
    assert _one("Paris", 20, require_answer=False) == 0.8
    assert _one(" ", 20, require_answer=False) == 0.0
    assert _one("Paris", 20, "length", require_answer=False) == 0.0
