from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge_plugins.rewards.repetition import repetition

HOSTILE: tuple[Any, ...] = runpy.run_path(str(Path(__file__).resolve().parents[2] / "hostile_completions.py"))[
    "HOSTILE"
]


def one(text: str, token_ids: tuple[int, ...] = (), **options: Any) -> float:
    return repetition([text], [token_ids], **options)[0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("", 0.0),
        ("one two", 0.0),
        ("a b c d e f", 0.0),
        ("a b c a b c", -1 / 4),  # abc bca cab abc: 3 of 4 are distinct
        ("A b c  a\nB C", -1 / 4),
        ("a a a a a", -2 / 3),  # 1 of 3
        ("a " * 1002, -999 / 1000),
    ],
)
def test_golden(text: str, reward: float) -> None:
    assert one(text) == pytest.approx(reward)


def test_options() -> None:
    assert one("a b a b", ngram_size=2, max_penalty=0.3) == pytest.approx(-0.1)
    assert one("a a", ngram_size=1) == -0.5
    assert one("aaaa", (7, 7, 7, 7), unit="token") == -0.5
    assert one("aaaa", (7, 7, 7, 7)) == 0.0


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 5))
def test_between_nothing_and_the_most_and_never_better_when_said_twice(words: list[str], size: int) -> None:
    once, twice = one(" ".join(words), ngram_size=size), one(" ".join(words + words), ngram_size=size)
    assert -1.0 < once <= 0.0
    assert twice <= once + 1e-12 or len(words) < size


def test_hostile_completions_take_no_time() -> None:
    for hostile in HOSTILE:
        started = time.perf_counter()
        assert -1.0 <= one(hostile.text) <= 0.0
        assert time.perf_counter() - started <= 1.0, hostile.name
