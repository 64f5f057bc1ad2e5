"""The conventions that GSM8K and the model solutions published with it are written in, form by form.

The labels of those solutions are not at hand. What is: the rule that OpenAI's grade-school-math gives for reading an
answer, and the forms that solutions end in.
"""

from __future__ import annotations

import random
import re
import time
from fractions import Fraction

import pytest

from grpoforge_plugins.rewards.math import Math

WORK = "She eats 3, so 16 - 3 - 4 = <<16-3-4=9>>9 are left, worth 9 * 2 = $<<9*2=18>>18.\n"

RIGHT = [
    # the two endings
    ("#### 18", "18"),
    ("A: 18", "18"),
    ("A:18", "18"),
    ("A: 18\n", "18"),
    ("  A: 18  ", "18"),
    ("#### 18 \n\n", "18"),
    ("Answer: 18", "18"),
    ("The answer is 18.", "18"),
    # calculator annotations in the last line
    ("#### <<9*2=18>>18", "18"),
    ("A: $<<9*2=18>>18", "18"),
    ("A: <<16-3-4=9>>9*<<1+1=2>>2 is not it\nA: 18", "18"),
    # currency
    ("#### $18", "18"),
    ("A: $18", "18"),
    ("A: $ 18", "18"),
    ("A: \\$18", "18"),
    ("A: 18$", "18"),
    ("A: €18", "18"),
    ("A: £18.00", "18"),
    ("A: USD 18", "18"),
    ("A: 18 USD", "18"),
    ("A: -$18", "-18"),
    ("A: $-18", "-18"),
    # commas
    ("#### 1,080", "1080"),
    ("#### 1080", "1,080"),
    ("A: 70,000", "70000"),
    ("A: $1,234,567.50", "1234567.5"),
    ("A: 1 080", "1080"),
    # words and units
    ("A: 18 eggs", "18"),
    ("A: 18 dollars per day.", "18"),
    ("A: 18 years old", "18"),
    ("A: 18 km/h", "18"),
    ("A: 18 sq. ft.", "18"),
    ("A: 18 square feet", "18"),
    ("A: 18°", "18"),
    ("A: 18 m²", "18"),
    ("A: 18cm", "18"),
    ("A: 18-foot", "18"),
    ("A: 18 minutes' walk", "18"),
    ("#### 18 dollars", "18"),
    # dots and signs
    ("A: 18.", "18"),
    ("#### 18.", "18"),
    ("A: 18. ", "18"),
    ("A: -7", "-7"),
    ("A: \u22127", "-7"),
    ("A: +7", "7"),
    ("A: 0", "0"),
    ("A: -0", "0"),
    # decimals
    ("A: 18.00", "18"),
    ("A: 18.0", "18"),
    ("#### 18", "18.00"),
    ("A: 0.5", ".5"),
    ("A: .50", "0.5"),
    ("A: $4.50", "4.5"),
    ("A: 018", "18"),
    # percent: GSM8K writes twenty percent as 20
    ("A: 20%", "20"),
    ("A: 20 %", "20"),
    ("A: 20 percent", "20"),
    ("A: 20\\%", "20"),
    ("A: 12.5%", "12.5"),
    # fractions
    ("A: 1/2", "0.5"),
    ("A: 3/4 of a cup", "3/4"),
    ("A: 1 1/2", "1.5"),
    ("A: \\frac{1}{2}", "1/2"),
    ("A: 36/2", "18"),
    # what others write around it
    ("#### **18**", "18"),
    ("**A: 18**", "18"),
    ("**Answer:** $18$", "18"),
    ("\\boxed{18}", "18"),
    ("The final answer is $\\boxed{18}$.", "18"),
    ("#### `18`", "18"),
    # corrected on the way
    ("A: 17\nWait, that is wrong.\nA: 18", "18"),
]

WRONG = [
    ("#### 19", "18"),
    ("A: 19", "18"),
    ("A: -18", "18"),
    ("A: 1.8", "18"),
    ("A: 180", "18"),
    ("A: 18.5", "18"),
    ("A: 18.01", "18"),
    ("A: 1,8", "18"),
    ("A: 0.2", "20"),
    ("A: 20%", "0.2"),
    ("A: 18 or 19", "18"),
    ("A: 18, 19", "18"),
    ("A: 18-19", "18"),
    ("A: 18 to 20", "18"),
    ("A: not 18", "18"),
    ("A: 18 thousand", "18"),
    ("A: 18k", "18"),
    ("A: 9*2", "18"),
    ("A: x = 18", "18"),
    ("A: eighteen", "18"),
    ("A: 6:30", "6"),
    ("#### 18 #### 19", "18"),
    ("#### 18\n#### 19", "18"),
    ("A: 18\nA: 19", "18"),
    ("A:", "18"),
    ("####", "18"),
    ("18", "18"),
    ("so she makes 18", "18"),
    ("Plan A: 18", "18"),
    ("#### <<18>>", "18"),
]


@pytest.mark.parametrize(("ending", "gold"), RIGHT)
def test_right(ending: str, gold: str) -> None:
    assert Math()([WORK + ending, WORK + ending], [gold, f"{WORK}#### {gold}"]) == [1.0, 1.0]
    assert Math()([WORK + ending], [f"{Fraction(gold.replace(',', '')) + 1}"]) == [0.0]


@pytest.mark.parametrize(("ending", "gold"), WRONG)
def test_wrong(ending: str, gold: str) -> None:
    assert Math()([WORK + ending], [f"{WORK}#### {gold}"]) == [0.0]


def openai_answer(text: str) -> str | None:
    """The first ``#### `` number of a text without its commas: grade-school-math's `extract_answer`."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return match[1].strip().replace(",", "") if match else None


def written(value: Fraction, rng: random.Random) -> str:
    """A value with at most two decimals, in one of the forms that GSM8K and models write."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    grouping = rng.choice([",", ""])
    number = f"{int(size):{grouping}}" if size.denominator == 1 else f"{float(size):{grouping}.2f}"
    if size.denominator == 1:
        number += rng.choice(["", "", "", ".00", ".0"])
    before = rng.choice(["", "", "", "$", "\\$", "€"])
    after = rng.choice(["", "", "", " dollars", "%", " eggs per day", " sq. ft.", ".", " percent", "kg"])
    return sign + before + number + after


def test_five_hundred_solutions_in_mixed_forms() -> None:
    rng = random.Random(0)
    for _ in range(500):
        value = Fraction(rng.choice([rng.randrange(-50, 2000), rng.randrange(10**6), rng.randrange(10**5)]))
        value /= rng.choice([1, 1, 1, 2, 4, 20, 100])
        stated = written(value, rng)
        ending = rng.choice(["#### {}", "A: {}", "The answer is {}", "\\boxed{{{}}}", "**Answer:** {}"]).format(stated)
        solution, gold = WORK + ending, f"{WORK}#### {float(value):.2f}"
        assert Math()([solution], [gold]) == [1.0], solution
        for wrong in (value + 1, value - Fraction(1, 100), value * 10 + 1, -value - 1):
            assert Math()([solution], [f"#### {float(wrong):.2f}"]) == [0.0], solution
        if openai_answer(solution) == openai_answer(gold):
            assert Math()([solution], [gold]) == [1.0], "right by OpenAI's rule"


def test_five_hundred_fuzzed_strings_take_no_time() -> None:
    rng = random.Random(1)
    pieces = ["#### ", "A: ", "\\boxed{", "}", "<<", ">>", "18", "1,", ".", "/", "$", "%", "-", " ", "\n", "answer is ",
              "<think>", "</think>", "**", "\\frac{1}{2}", "e9", "0" * 50, "x", "\u2212", "\ud800", "\x00"]  # fmt: skip
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.choice([3, 10, 100, 5000])))
        assert Math()([text], ["18"]) in ([0.0], [1.0])
        assert seconds(text) <= 0.05


def seconds(text: str) -> float:
    """The better of two: a shared machine has moods."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        Math()([text], ["18"])
        times.append(time.perf_counter() - started)
    return min(times)
