from __future__ import annotations

import math
import runpy
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge_plugins.rewards.equations import find_equations

HOSTILE: tuple[Any, ...] = runpy.run_path(str(Path(__file__).resolve().parents[2] / "hostile_completions.py"))[
    "HOSTILE"
]

HOLD = [
    ("16 - 3 - 4 = 9", "16 3 4", "9"),
    ("Janet sells 16 - 3 - 4 = 9 eggs a day.", "16 3 4", "9"),
    ("16 eggs - 3 eggs = 13 eggs", "16 3", "13"),
    ("9 * 2 = $18", "9 2", "18"),
    ("9 x 2 = 18", "9 2", "18"),
    ("9x2=18", "9 2", "18"),
    ("9 × 2 = 18", "9 2", "18"),
    (r"$9 \times 2 = 18$", "9 2", "18"),
    (r"\(48 \div 2 = 24\)", "48 2", "24"),
    (r"\frac{48}{2} = 24", "48 2", "24"),
    (r"48 \text{ clips} \cdot 2 = 96", "48 2", "96"),
    ("48/2 = 24", "48 2", "24"),
    ("$80,000 + $50,000 = $130,000", "80000 50000", "130000"),
    ("80 000 + 50 000 = 130 000", "80000 50000", "130000"),
    ("2 * (3 + 4) = 14", "2 3 4", "14"),
    ("2(3 + 4) = 14", "2 3 4", "14"),
    ("(so 2 + 3 = 5)", "2 3", "5"),
    ("2 + 3 * 4 = 14", "2 3 4", "14"),
    ("20 - 5 - 5 = 10", "20 5 5", "10"),
    ("48 / 4 / 2 = 6", "48 4 2", "6"),
    ("3 - 5 = -2", "3 5", "-2"),
    ("3 \u2212 5 = \u22122", "3 5", "-2"),
    ("-3 + 5 = 2", "3 5", "2"),
    ("20% of 50 = 10", "20 50", "10"),
    ("20% * 50 = 10", "20 50", "10"),
    ("20% + 30% = 50%", "20 30", "50"),
    ("1/4 of 48 = 12", "4 48", "12"),
    ("1 1/2 * 4 = 6", "3/2 4", "6"),
    ("100 / 3 = 33.33", "100 3", "33.33"),
    ("2 / 3 = .67", "2 3", ".67"),
    ("5 miles/hour * 2 hours = 10 miles", "5 2", "10"),
    ("18 = 9 * 2", "9 2", "18"),
    ("2 * 3 + 4 = 6 + 4 = 10", "2 3 4", "10"),
    ("Total cost = 5 * 3 = 15", "5 3", "15"),
    ("x = 5 * 3 = 15", "5 3", "15"),
    ("**5 * 3 = 15**", "5 3", "15"),
    ("She has <<5*3=15>>15", "5 3", "15"),
    ("5 + 0 + 3 = 8", "5 3", "8"),
]

FALSE = [
    "16 - 3 = 14",
    "16 - 3 = 13 = 14",
    "2 + 3 * 4 = 20",
    "20 - (5 - 5) = 10",
    "100 / 3 = 33",
    "100 / 3 = 33.34",
    "20% of 50 = 11",
    "5 / 0 = 5",
    "<<5*3=16>>",
    "18 = 9 * 3",
]

NOT_READ = [
    "",
    "18",
    "18 = 18",
    "x = 5",
    "2x + 3 = 7",
    "3p = 15",
    "2^3 = 8",
    "5! = 120",
    "10-15 minutes",
    "16 - 3",
    "= 16 - 3",
    "16 - 3 =",
    "16 - = 3",
    "step-3: 18",
    "He has 5 apples. Then 3 = 3",
    "5 apples 3 pears = 8",
    "5 + = 3 + 2",
    "1234567890123456789 * 2 = 3",
]


def numbers(text: str) -> tuple[Fraction, ...]:
    return tuple(map(Fraction, text.split()))


@pytest.mark.parametrize(("text", "operands", "result"), HOLD)
def test_equation_that_holds(text: str, operands: str, result: str) -> None:
    (found,) = find_equations(text)
    assert (found.operands, found.result, found.holds) == (numbers(operands), Fraction(result), True)
    assert not found.is_trivial


@pytest.mark.parametrize("text", FALSE)
def test_equation_that_does_not_hold(text: str) -> None:
    (found,) = find_equations(text)
    assert not found.holds


@pytest.mark.parametrize("text", NOT_READ)
def test_what_is_no_equation(text: str) -> None:
    assert find_equations(text) == []


@pytest.mark.parametrize(
    "text",
    ["5 + 0 = 5", "5 - 0 = 5", "2 * 1 = 2", "2 / 1 = 2", "0 * 7 = 0", "5 + 3 - 3 = 5", "5 * 3 / 3 = 5", "1/2 = 0.5"],
)
def test_equation_that_leads_nowhere(text: str) -> None:
    (found,) = find_equations(text)
    assert found.holds and found.is_trivial


@pytest.mark.parametrize("text", ["24 - 8 - 6 - 4 = 6", "10 - 5 = 5", "4 / 2 = 2", "2 * 1 * 3 = 6", "1 + 1 = 2"])
def test_equation_that_only_looks_so(text: str) -> None:
    (found,) = find_equations(text)
    assert found.holds and not found.is_trivial


def test_equations_that_say_the_same() -> None:
    one, swapped, reversed_, other = find_equations("9 * 2 = 18\n2 * 9 = 18\n18 / 2 = 9\n9 + 2 = 11")
    assert one.key == swapped.key != reversed_.key
    assert one.relation == swapped.relation == reversed_.relation != other.relation


def test_order_and_several_in_a_line() -> None:
    found = find_equations("16 - 3 = 13, and 13 - 4 = 9.\nThen 9 * 2 = $<<9*2=18>>18; 18 + 1 = 20")
    assert [(str(one.result), one.holds) for one in found] == [
        ("13", True), ("9", True), ("18", True), ("18", True), ("20", False),
    ]  # fmt: skip


@given(st.lists(st.integers(-(10**6), 10**6).filter(abs), min_size=2, max_size=12))
def test_sums_are_exact(values: list[int]) -> None:
    text = " ".join(f"{value:+,}".replace("+", "+ ").replace("-", "- ") for value in values).removeprefix("+ ")
    (right,) = find_equations(f"{text} = {sum(values):,}")
    assert right.holds and right.num_operations == len(values) - 1
    (wrong,) = find_equations(f"{text} = {sum(values) + 1}")
    assert not wrong.holds


@given(st.lists(st.integers(2, 99), min_size=2, max_size=7))
def test_products_and_quotients_are_exact(values: list[int]) -> None:
    product = math.prod(values)
    (right,) = find_equations(" x ".join(map(str, values)) + f" = {product:,}")
    assert right.holds
    (back,) = find_equations(f"{product} / " + " / ".join(map(str, values[1:])) + f" = {values[0]}")
    assert back.holds and back.relation == right.relation


UNITS = ("1", "1 ", "1+", "1+1=", "(", "1(", "=", "a", "a ", "<<", "<<1+1=2>>", "1,", "1/", "\\frac{1}{2}", "%", "$",
         "-", "1 of ", "20% of ", "\n", "x")  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear(unit: str) -> None:
    small, large = (unit * (size // len(unit)) for size in (2_048, 16_384))
    assert seconds(large) <= 40 * seconds(small) + 0.01


def test_hostile_completions_take_no_time() -> None:
    for hostile in HOSTILE:
        assert seconds(hostile.text[-16_384:]) <= 0.5, hostile.name


def seconds(text: str) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        find_equations(text)
        times.append(time.perf_counter() - started)
    return min(times)
