from __future__ import annotations

import runpy
import time
from fractions import Fraction
from pathlib import Path
from re import Pattern, _constants, _parser  # type: ignore[attr-defined]
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import grpoforge.sanitize
from grpoforge.sanitize import one_line
from grpoforge_plugins.rewards import answers, equations, reasoning, symbolic
from grpoforge_plugins.rewards import format as format_module
from grpoforge_plugins.rewards.answers import extract_answer, last_number, parse_number, reference_answer

HOSTILE_FILE = Path(__file__).resolve().parents[2] / "hostile_completions.py"
HOSTILE: tuple[Any, ...] = runpy.run_path(str(HOSTILE_FILE))["HOSTILE"]

NUMBERS: list[tuple[str, Fraction | int | str | None]] = [
    # plain
    ("18", 18),
    ("0", 0),
    ("007", 7),
    ("+5", 5),
    ("-12", -12),
    ("- 12", -12),
    ("\u221212", -12),
    ("--12", None),
    ("3.0", 3),
    ("3.", 3),
    (".5", "1/2"),
    ("-.5", "-1/2"),
    ("1.5.2", None),
    ("", None),
    (".", None),
    ("eighteen", None),
    ("nan", None),
    ("inf", None),
    # groups of three
    ("1,000", 1000),
    ("1,000,000.25", "4000001/4"),
    ("1 000", 1000),
    ("1\u202f000\u00a0000", 1_000_000),
    ("1{,}000", 1000),
    ("1,00", None),
    ("1,0000", None),
    ("1000,000", None),
    (",000", None),
    ("1,2,3", None),
    ("42 43", None),
    ("1  000", None),
    # fractions
    ("3/4", "3/4"),
    ("-3/4", "-3/4"),
    ("6 / 4", "3/2"),
    ("1 1/2", "3/2"),
    ("-1 1/2", "-3/2"),
    (r"\frac{3}{4}", "3/4"),
    (r"-\dfrac{3}{4}", "-3/4"),
    (r"1\frac{1}{2}", "3/2"),
    (r"\frac{1}{2}3", None),
    (r"\frac{1}{0}", None),
    ("1/0", None),
    ("1/2/3", None),
    # scientific
    ("4.2e1", 42),
    ("5E-1", "1/2"),
    ("1e100", 10**100),
    ("1e101", None),
    ("1e-999999999", None),
    ("e5", None),
    # size
    ("9" * 100, int("9" * 100)),
    ("9" * 101, None),
    ("0" * 200 + "1", None),
    # currency, percent, units
    ("$18", 18),
    ("$ 1,234.50", "2469/2"),
    ("-$5", -5),
    ("$-5", -5),
    ("-$-5", None),
    (r"\$18", 18),
    ("€7", 7),
    ("US$7", 7),
    ("USD 7", 7),
    ("7 USD", 7),
    ("18€", 18),
    ("5 dollars.", 5),
    ("20%", 20),
    (r"400\%", 400),
    ("20 percent", 20),
    ("18 eggs per day at the farmers' market", 18),
    ("$15/hour", 15),
    ("5kg", 5),
    ("100 cm²", 100),
    ("18 sq. ft.", 18),
    # LaTeX and Markdown around the number
    ("$18$", 18),
    ("$18$.", 18),
    ("$$18$$", 18),
    (r"\(18\)", 18),
    (r"\boxed{18}", 18),
    (r"$\boxed{\text{18}}$", 18),
    (r"18 \text{ eggs}", 18),
    (r"18\,\text{eggs}", 18),
    ("**18**", 18),
    ("**$18.50**.", "37/2"),
    ("`18`", 18),
    ('"18"', 18),
    # other digits
    ("\uff11\uff18", 18),
    ("\uff11\uff0c\uff10\uff10\uff10\uff0e\uff15", "2001/2"),
    ("٤٢", None),
    ("四十二", None),
    ("0x2a", None),
    ("0xff", None),
    ("½", None),
    # not one number
    ("42 or 43", None),
    ("42 or so", None),
    ("40-44", None),
    ("40+2", None),
    ("6*7", None),
    ("6 \u00d7 7", None),
    ("2**10", None),
    ("2^10", None),
    ("5!", None),
    ("4²", None),
    ("2x", None),
    ("2pi", None),
    ("25k", None),
    ("3 million", None),
    ("3 dozen", None),
    ("3 and a half", None),
    ("5 dollars and 20 cents", None),
    ("3:30", None),
    ("12/7/2020", None),
    ("x = 5", None),
    ("about 5", None),
    ("5 (five)", None),
    (r"\boxed{1}\boxed{2}", None),
    (r"\(1\)\(2\)", None),
    ("4\u200b2", None),
    ("4\n2", None),
]

ANSWERS: list[tuple[str, Fraction | int | str | None]] = [
    # marks
    ("16-3-4=9\n9*2=18\n#### 18", 18),
    ("#### 1,080", 1080),
    ("####18", 18),
    ("so it is #### 18 eggs\n", 18),
    ("#### $18.00.", 18),
    ("#### **18**", 18),
    ("#### $\\boxed{18}$", 18),
    ("#### 18\n#### 18.0", 18),
    ("#### 18\n#### 19", None),
    ("#### 42 #### 43", None),
    ("#### 18\n\nQuestion: What is 2 + 2?\n#### 4", None),
    ("#### 18 or 19\nThe answer is 18.", None),
    ("#### 18. Then nothing more", None),
    ("### 18", None),
    ("##### 18", None),
    ("####", None),
    ("#### eighteen", None),
    ("#### 18\nThe answer is 19 and \\boxed{20}", 18),
    ("#### Step 1: add\n3 + 4 = 7\n#### Step 2: answer\n\\boxed{7}", 7),
    ("#### 1. Add them\n3 + 4\n#### 2) Check\nAnswer: 7", 7),
    ("#### Step 1\n3 + 4 = 7\n#### 7", 7),
    ("<<9*2=18>>#### <<9*2=18>>18", 18),
    ("#### <<9*2=18>>", None),
    # boxes
    (r"So we get \boxed{18}.", 18),
    (r"\boxed{18 \text{ eggs}}", 18),
    (r"\boxed{\$1{,}080}", 1080),
    (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{\boxed{18}}", 18),
    (r"\boxed{9} eggs, then \boxed{18}", None),
    (r"\boxed{18} dollars, that is \boxed{18.00}", 18),
    (r"Write it in \boxed{}: \boxed{18}", 18),
    (r"\boxed{x = 18}", None),
    (r"\boxed{18", None),
    (r"\boxed{18} \boxed{18", None),
    (r"\boxed{1,2}", None),
    (r"\boxed{18} The answer is 19.", 18),
    # phrases
    ("The answer is 18.", 18),
    ("The answer is 18. She sells 9 eggs.", 18),
    ("The final answer is: $18.50", "37/2"),
    ("the answer is\n18", 18),
    ("**Answer:** 18 dollars", 18),
    ("**Final Answer**: 18", 18),
    ("ANSWER : 1 1/2 cups", "3/2"),
    ("Answer\uff1a\uff11\uff18", 18),
    ("Answer: 17\nNo, 9 * 2 is 18.\nAnswer: 18", 18),
    ("The answer is 18. I hope the answer is clear.", 18),
    ("The answer is 18 or 19.", None),
    ("The answer is 18, not 19.", None),
    ("The answer is not 18.", None),
    ("The answer is B.", None),
    ("She makes 9 * 2 = $<<9*2=18>>18 per day\nA: 18", 18),
    ("A: 90,000", 90000),
    ("A: -129025", -129025),
    ("A: 0.5", "1/2"),
    ("Plan A: 18", None),
    ("Team A: 18\nA: 19", 19),
    # thoughts
    ("<think>#### 17</think>#### 18", 18),
    ("it is 17, #### 17\n</think>\nThe answer is 18.", 18),
    ("<think>#### 18</think>", None),
    ("<think>\n#### 18", None),
    ("#### 18\n<think> or 19, #### 19", 18),
    ("<think>a</think>#### 17<think>b</think>#### 18", 18),
    # nothing stated
    ("", None),
    ("18", None),
    ("She makes 18 dollars.", None),
    ("#### 18" + " " * 5000, None),
    ("#### 17\n" + "x" * 5000 + "\n#### 18", 18),
    ("#### " + "1" * 5000, None),
]

LAST_NUMBERS: list[tuple[str, Fraction | int | str | None]] = [
    ("She makes 9 * 2 = 18 dollars.", 18),
    ("16-3", 3),
    ("step-3", 3),
    ("It is -3.", -3),
    ("It loses -$1,250.50!", "-2501/2"),
    ("5 - 3 = \u22122", -2),
    ("3/4 of it", "3/4"),
    ("half is .5", "1/2"),
    ("1,2,3", None),
    ("<think>5</think> none", None),
    ("<<2+3=5>>", None),
    ("", None),
]


def _shown(value: object) -> str:
    return one_line(str(value), 40)


def _exact(value: Fraction | int | str | None) -> Fraction | None:
    return None if value is None else Fraction(value)


@pytest.mark.parametrize(("text", "value"), NUMBERS, ids=_shown)
def test_parse_number(text: str, value: Fraction | int | str | None) -> None:
    assert parse_number(text) == _exact(value)


@pytest.mark.parametrize(("text", "value"), ANSWERS, ids=_shown)
def test_extract_answer(text: str, value: Fraction | int | str | None) -> None:
    assert extract_answer(text) == _exact(value)


@pytest.mark.parametrize(("text", "value"), LAST_NUMBERS, ids=_shown)
def test_last_number(text: str, value: Fraction | int | str | None) -> None:
    assert last_number(text) == _exact(value)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (18, 18),
        (0.1, "1/10"),
        (1e16, 10**16),
        ("18", 18),
        ("1,080", 1080),
        ("She sells 9 <<16-7=9>>9.\n#### 1,080", 1080),
        (r"It is \boxed{18}", 18),
        (float("nan"), None),
        (float("inf"), None),
        (True, None),
        (None, None),
        ([18], None),
        ("unknown", None),
    ],
)
def test_reference_answer(value: object, number: Fraction | int | str | None) -> None:
    assert reference_answer(value) == _exact(number)


def test_reference_may_be_any_integer() -> None:
    assert reference_answer(10**5000) == 10**5000


@given(st.integers(-(10**99) + 1, 10**99 - 1))
def test_integers_survive_every_convention(value: int) -> None:
    for written in (f"{value}", f"{value:,}", f"${value}", f"**{value}** eggs.", rf"\boxed{{{value}}}"):
        assert extract_answer(f"work\n#### {written}") == value
    assert extract_answer(rf"so \boxed{{{value:,}}} it is") == value
    assert extract_answer(f"The answer is {value}.") == value
    assert last_number(f"in the end {value:,} are left.") == value


@given(st.decimals(min_value=-(10**9), max_value=10**9, places=4), st.integers(1, 999))
def test_decimals_and_fractions_are_exact(value: Any, denominator: int) -> None:
    assert parse_number(str(value)) == Fraction(value)
    numerator = abs(int(value))
    assert parse_number(rf"\frac{{{numerator}}}{{{denominator}}}") == Fraction(numerator, denominator)


@given(st.text(st.one_of(st.characters(), st.sampled_from("0123456789 .,/$%-#{}\\<>*\n")), max_size=300))
def test_no_text_is_too_odd(text: str) -> None:
    for written in (text, f"#### {text}", f"\\boxed{{{text}}}", f"answer is {text}"):
        extract_answer(written)
        last_number(written)


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_hostile_completions_take_no_time(hostile: Any) -> None:
    assert _seconds(extract_answer, hostile.text) <= 0.05
    assert _seconds(last_number, hostile.text) <= 0.05


UNITS = ("1", "1,", "1 ", "111,", "1/", "$", "\\", "#", "#### 1 ", "\\boxed{", "<<", "<think>", "answer is ")


@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear(unit: str) -> None:
    small, large = (unit * (size // len(unit)) for size in (8_192, 65_536))
    assert _seconds(extract_answer, large) <= 40 * _seconds(extract_answer, small) + 0.005


def test_no_regular_expression_repeats_a_repetition() -> None:
    patterns = {
        f"{module.__name__}.{name}": value
        for module in (answers, equations, format_module, grpoforge.sanitize, reasoning, symbolic)
        for name, value in vars(module).items()
        if isinstance(value, Pattern)
    }
    assert len(patterns) > 8
    nested = [name for name, value in patterns.items() if _nests_repetition(value.pattern, value.flags)]
    assert nested == []


@pytest.mark.parametrize(("pattern", "nests"), [("(a+)*", True), ("(?:a|b*c)+", True), ("(?:,[0-9]{3})+", False)])
def test_the_search_for_nested_repetition_finds_it(pattern: str, nests: bool) -> None:
    assert _nests_repetition(pattern, 0) is nests


def _nests_repetition(pattern: str, flags: int) -> bool:
    return any(_repeats(inner) for inner in _unbounded_bodies(_parser.parse(pattern, flags)))


def _children(tree: Any) -> list[tuple[Any, Any]]:
    """The nodes of a parsed pattern, at every depth."""
    nodes: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        item = pending.pop()
        if isinstance(item, _parser.SubPattern):
            nodes += item.data
            pending += [argument for _, argument in item.data]
        elif isinstance(item, tuple | list):
            pending += item
    return nodes


def _unbounded_bodies(tree: Any) -> list[Any]:
    return [
        argument[2]
        for operation, argument in _children(tree)
        if operation in (_constants.MAX_REPEAT, _constants.MIN_REPEAT) and argument[1] is _constants.MAXREPEAT
    ]


def _repeats(tree: Any) -> bool:
    """Whether a part can match a varying number of times; exactly three digits cannot."""
    return any(
        operation in (_constants.MAX_REPEAT, _constants.MIN_REPEAT) and argument[0] != argument[1]
        for operation, argument in _children(tree)
    )


def _seconds(function: Any, text: str) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function(text)
        times.append(time.perf_counter() - start)
    return min(times)
