from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from grpoforge.errors import ConfigError
from grpoforge_plugins.rewards.length import CosineLength

HOSTILE: tuple[Any, ...] = runpy.run_path(str(Path(__file__).resolve().parents[2] / "hostile_completions.py"))[
    "HOSTILE"
]


def reward(text: str, num_tokens: int, reason: str = "stop", answer: object = 18, **options: Any) -> float | None:
    return CosineLength(**options)([text], [tuple(range(num_tokens))], [reason], 100, [answer])[0]


@pytest.mark.parametrize(
    ("num_tokens", "right", "wrong"),
    [
        # long + (short - long) (1 + cos(pi n / L)) / 2; cos is 1, 1/2, 0, -1/2 at 0, 1/3, 1/2 and 2/3 of L
        (0, 2.0, -10.0),
        (100, 1.75, -7.5),
        (150, 1.5, -5.0),
        (200, 1.25, -2.5),
        (300, -10.0, -10.0),
        (400, -10.0, -10.0),
    ],
)
def test_golden(num_tokens: int, right: float, wrong: float) -> None:
    assert reward("#### 18", num_tokens, max_length=300) == pytest.approx(right)
    assert reward("#### 19", num_tokens, max_length=300) == pytest.approx(wrong)


def test_shorter_is_better_when_right_and_longer_when_wrong() -> None:
    right = [reward("#### 18", length) for length in range(100)]
    wrong = [reward("no answer", length) for length in range(100)]
    assert right == sorted(right, reverse=True) and wrong == sorted(wrong)
    assert min(right) > max(wrong)


def test_cut_off() -> None:
    assert reward("#### 18", 50, "length") == -10.0
    assert reward("#### 18", 50, "length", exceed=-2.0) == -2.0
    assert reward("#### 18", 100) == -10.0, "the sampler's limit is L"


def test_bounds_are_options() -> None:
    options = {"right_short": 1.0, "right_long": 0.5, "wrong_short": -0.5, "wrong_long": 0.0}
    assert reward("#### 18", 50, **options) == pytest.approx(0.75)
    assert reward("#### 19", 50, **options) == pytest.approx(-0.25)


def test_abstains_where_math_does() -> None:
    assert reward("#### 18", 5, answer="unknown") is None


def test_bounds_that_would_pay_for_being_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        CosineLength(right_long=0.0)
    assert caught.value.message == (
        "`right_short` and `right_long` are 2 and 0, `wrong_short` and `wrong_long` -10 and 0: some wrong completion "
        "would be worth as much as a right one"
    )
    assert caught.value.hint == "choose both right bounds above both wrong ones"


def test_hostile_completions() -> None:
    for hostile in HOSTILE:
        found = reward(hostile.text, 50, answer=hostile.reference)
        assert found == pytest.approx(1.5 if hostile.reward else -5.0), hostile.name
