from __future__ import annotations

import json
import os
import random
import runpy
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from grpoforge_plugins.rewards.reasoning import given_numbers, reasoning

CHECKOUT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("GRPOFORGE_SHARED", CHECKOUT.parent / "shared"))
HOSTILE: tuple[Any, ...] = runpy.run_path(str(CHECKOUT / "tests/hostile_completions.py"))["HOSTILE"]

DUCKS = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends "
    "every day with four. She sells the remainder for $2 per egg. How much does she make every day?"
)
WORK = "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 every day.\n"

HONEST = {
    "as in GSM8K": WORK + "#### 18",
    "plain": "16 - 3 = 13 eggs\n13 - 4 = 9 eggs\n9 x $2 = $18\nA: 18",
    "units": "16 eggs - 3 eggs - 4 eggs = 9 eggs. 9 eggs * 2 dollars = 18 dollars.\nThe answer is $18.",
    "one line": "(16 - 3 - 4) * 2 = 9 * 2 = 18\n#### 18",
    "LaTeX": "$16 - 3 - 4 = 9$\n\\[ 9 \\times 2 = 18 \\]\n\\boxed{18}",
    "in a thought": f"<think>{WORK}</think>\nThe answer is 18.",
    "with a detour": WORK + "9 * 2 = 18\n#### 18",
    "sum": "3 + 4 = 7 eggs are used\n16 - 7 = 9 are left\n9 * 2 = 18\n#### 18.00",
}

CHEATS = {
    "only the answer": ("#### 18", 0.0),
    "the question copied": (f"{DUCKS}\n#### 18", 0.0),
    "markers": ("Step 1: Step 2: Step 3: First, then, therefore, finally\n" * 20 + "#### 18", 0.0),
    "the answer restated": ("18 = 18. So the answer is 18 = 18.\n#### 18", 0.0),
    "trivial equations": ("18 + 0 = 18\n18 * 1 = 18\n18 / 1 = 18\n18 - 0 = 18\n#### 18", 0.0),
    "trivial equations of the prompt": ("16 + 0 = 16\n16 * 1 = 16\n2 * 1 = 2\n#### 16", 0.0),
    "one step, many times": ("9 * 2 = 18\n" * 50 + "#### 18", 0.2),
    "one step, turned around": ("9 * 2 = 18\n2 * 9 = 18\n18 / 2 = 9\n18 / 9 = 2\n9 * 2 = 18\n#### 18", 0.2),
    "in annotations": ("<<9*2=18>>" * 30 + "\n#### 18", 0.2),
    "in code, thought and annotation": ("<think>9*2=18</think>\n```\n9*2=18\n```\n<<9*2=18>>\n#### 18", 0.2),
    "true and unrelated": ("".join(f"{n} + {n + 1} = {2 * n + 1}\n" for n in range(20, 40)) + "#### 18", 0.0),
    "true, of the prompt, unrelated": ("16 + 3 = 19\n16 * 4 = 64\n16 * 2 = 32\n#### 18", 0.0),
    "numbers from nowhere": ("7 * 5 = 35\n35 - 17 = 18\n#### 18", 0.0),
    "the answer split": ("11 + 7 = 18\n#### 18", 0.0),
    "cancelled": ("18 + 16 - 16 = 18\n#### 18", 0.0),
    "from itself": ("18 + 16 - 12 - 4 = 18\n#### 18", 0.0),
    "there and back": ("16 + 3 = 19\n19 - 3 = 16\n#### 16", 0.5),
    "a number to bridge the gap": ("34 - 16 = 18\n#### 18", 0.2),
    "two steps to bridge the gap": ("16 + 5 = 21\n21 - 3 = 18\n#### 18", 0.6),
    "false steps": ("16 - 3 - 4 = 12\n12 * 2 = 18\n#### 18", 0.0),
    "a false chain": ("16 - 3 = 4 = 18\n#### 18", 0.0),
    "thousands of steps": ("".join(f"{n} * 2 = {2 * n}\n" for n in range(5000)) + WORK + "#### 18", 0.1),
    "another answer": (WORK + "#### 19", 0.0),
    "no answer": (WORK, 0.0),
    "two answers": (WORK + "#### 18\n#### 9", 0.0),
    "goes on after the answer": (WORK + "18 * 365 = 6570\n#### 18", 0.5),
    "steps after the answer": ("#### 18 9 * 2 = 18", 0.0),
    "huge numbers": ("9" * 5000 + " * 2 = 18\n#### 18", 0.0),
    "division by zero": ("16 / 0 = 18\n#### 18", 0.0),
}


def score(text: str, prompt: str = DUCKS, **options: int) -> float | None:
    return reasoning([prompt], [text], **options)[0]


@pytest.mark.parametrize("name", HONEST)
def test_honest_work_earns_everything(name: str) -> None:
    assert score(HONEST[name]) == 1.0


@pytest.mark.parametrize("name", CHEATS)
def test_cheating_does_not_pay(name: str) -> None:
    text, bound = CHEATS[name]
    found = score(text)
    assert found is not None and 0.0 <= found <= bound


def test_golden_values() -> None:
    # One operation of two numbers, 9 from nowhere: grounds (1/2)^2, work 1/2, use 0.85 + 0.3 / 4.
    assert score("9 * 2 = 18\n#### 18") == pytest.approx(0.25 * 0.5 * 0.925)
    # Two derived, one false: truth 2/3.
    assert score(WORK + "9 + 9 = 20\n#### 18") == pytest.approx(2 / 3)
    # 9 is the result of an equation that does not hold: grounds (1/2)^2, truth 1/2, work 1/2, use 0.925.
    assert score("16 - 3 - 3 = 9\n9 * 2 = 18\n#### 18") == pytest.approx(0.25 * 0.5 * 0.5 * 0.925)
    # A wrong answer from true steps: this reward does not know what is right. One operation of the two is missing.
    assert score("16 - 3 = 13\n13 * 2 = 26\n#### 26") == 1.0
    assert score("16 * 2 = 32\n#### 32") == pytest.approx(0.5)


def test_more_equations_than_allowed_cost() -> None:
    noise = "".join(f"16 + {n} = {16 + n}\n" for n in range(20, 60))
    assert score(noise + WORK + "#### 18") == pytest.approx(32 / 42)
    assert score(noise + WORK + "#### 18", max_equations=42) == 1.0
    assert score(noise + WORK + "#### 18", max_equations=21) == 0.5


def test_prompt_without_a_number_is_not_judged() -> None:
    assert reasoning(["What is love?", DUCKS], [WORK + "#### 18"] * 2) == [None, 1.0]


def test_numbers_of_a_prompt() -> None:
    stated, usable = given_numbers(
        "Twenty-five of 1,200 pay 20%; half of the three hundred, 3/4, and $2.50 for a dozen."
    )
    assert stated == set(map(Fraction, (20, 5, 25, 1200, 3, 100, 300, 4, 2.5)))
    for expected in ("1/5", "4/5", "6/5", "120", "1/2", "1/4", "7/4", "12", "250"):
        assert Fraction(expected) in usable
    assert Fraction(17) not in usable


def rows() -> list[dict[str, str]]:
    files = [SHARED / "data/gsm8k" / f"{split}.jsonl" for split in ("train", "test")]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def some_rows() -> list[dict[str, str]]:
    return random.Random(0).sample(rows(), 600)


def mean(prompts: list[str], completions: list[str]) -> float:
    found = [value for value in reasoning(prompts, completions) if value is not None]
    assert len(found) == len(prompts)
    return sum(found) / len(found)


def corrupted(solution: str, rng: random.Random) -> str:
    """A solution with another result in one of its annotations and behind it."""
    places = [place for place in range(len(solution)) if solution.startswith(">>", place)]
    place = rng.choice(places)
    before, after = solution[:place], solution[place + 2 :]
    digits = len(after) - len(after.lstrip("0123456789."))
    return f"{before.rpartition('=')[0]}=7919>>7919{after[digits:]}"


def test_real_solutions_score_high_and_damaged_ones_lower(some_rows: list[dict[str, str]]) -> None:
    rng = random.Random(0)
    some = [row for row in some_rows if row["answer"].count("<<") > 1]
    prompts, solutions = [row["question"] for row in some], [row["answer"] for row in some]
    whole = mean(prompts, solutions)
    assert whole >= 0.9
    assert mean(prompts, [corrupted(solution, rng) for solution in solutions]) <= 0.5
    assert mean(prompts, solutions[1:] + solutions[:1]) <= 0.35
    upside_down = [
        "\n".join([*reversed(solution.split("\n")[:-1]), solution.split("\n")[-1]]) for solution in solutions
    ]
    assert mean(prompts, upside_down) <= 0.6
    bare = [solution[solution.rindex("####") :] for solution in solutions]
    assert mean(prompts, bare) == 0.0


@pytest.mark.slow
def test_distribution_over_gsm8k() -> None:
    """8,792 solutions by people: 89% at 0.8 or more; those that solve for a variable are what is missed."""
    every = rows()
    found = reasoning([row["question"] for row in every], [row["answer"] for row in every])
    values = [value for value in found if value is not None]
    assert len(values) == len(every) == 8792
    assert sum(value >= 0.8 for value in values) / len(values) >= 0.885
    assert sum(value >= 0.5 for value in values) / len(values) >= 0.93
    assert sum(values) / len(values) >= 0.92


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_hostile_completions_and_prompts(hostile: Any) -> None:
    started = time.perf_counter()
    (found,) = reasoning([DUCKS], [hostile.text])
    assert found is not None and 0.0 <= found <= 0.6
    reasoning([hostile.text], [WORK + "#### 18"])
    reasoning([DUCKS], [hostile.text[-8000:] + WORK + "#### 18"])
    assert time.perf_counter() - started < 5.0


@pytest.mark.parametrize("unit", ["16 + 3 = 19\n", "{n} + 16 = {m}\n", "16 + {n} = {m} = {m}, ", "<<16+{n}={m}>>"])
def test_time_is_linear(unit: str) -> None:
    texts = ["".join(unit.format(n=n, m=n + 16) for n in range(count)) + "#### 19" for count in (60, 480)]
    small, large = (min(seconds(text) for _ in range(3)) for text in texts)
    assert large <= 40 * small + 0.01


def seconds(text: str) -> float:
    started = time.perf_counter()
    score(text)
    return time.perf_counter() - started


def test_the_question_counts_where_there_is_one() -> None:
    """Worked examples and dates of a rendered prompt are no numbers of the problem."""
    prompt, question = "Today is 26 Jul 2024. 3 + 4 = 7. Tom has 5 pens and buys 6.", "Tom has 5 pens and buys 6."
    copied, solved = "3 + 4 = 7\n#### 7", "5 + 6 = 11\n#### 11"
    assert reasoning([prompt] * 2, [copied, solved], [question] * 2) == [0.0, 1.0]
    assert reasoning([prompt], [copied])[0] > 0
