from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from grpoforge.declarations import declared
from grpoforge_plugins.rewards.math import Math

CHECKOUT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("GRPOFORGE_SHARED", CHECKOUT.parent / "shared"))
HOSTILE_FILE = runpy.run_path(str(CHECKOUT / "tests/hostile_completions.py"))
HOSTILE: tuple[Any, ...] = HOSTILE_FILE["HOSTILE"]


def _gsm8k(split: str) -> list[str]:
    lines = (SHARED / "data/gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"] for line in lines]


@pytest.mark.parametrize(("split", "num_rows"), [("train", 7473), ("test", 1319)])
def test_every_gsm8k_solution_is_right_and_none_is_with_another_number(split: str, num_rows: int) -> None:
    solutions = _gsm8k(split)
    assert len(solutions) == num_rows
    assert Math()(solutions, solutions) == [1.0] * num_rows
    parts = [solution.rpartition("#### ") for solution in solutions]
    changed = [f"{work}#### {int(number.replace(',', '')) + 1:,}" for work, _, number in parts]
    assert Math()(changed, solutions) == [0.0] * num_rows
    # The formats that models use for the same answer.
    phrased = [f"{work}A: {number}" for work, _, number in parts]
    assert Math()(phrased, solutions) == [1.0] * num_rows
    boxed = [rf"{work}The final answer is $\boxed{{{number}}}$." for work, _, number in parts]
    assert Math()(boxed, [number for _, _, number in parts]) == [1.0] * num_rows


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("#### 18", 1.0),
        ("#### 18.0", 1.0),
        ("#### $18 per day", 1.0),
        ("#### 36/2", 1.0),
        ("#### 18.0000000001", 0.0),
        ("#### -18", 0.0),
        ("#### 18\n#### 19", 0.0),
        ("She has 16 - 7 = <<16-7=9>>9 eggs, 2 * 9 = $<<2*9=18>>18 per day\nA: 18", 1.0),
        ("She has 16 - 3 = <<16-3=13>>13 eggs, 13 * 2 = $<<13*2=26>>26\nA: 26", 0.0),
        ("She makes 18", 0.0),
        ("", 0.0),
    ],
)
def test_reward_against_eighteen(completion: str, reward: float) -> None:
    assert Math()([completion], ["… #### 18"]) == [reward]


def test_lenient_takes_the_last_number_only_where_none_is_stated() -> None:
    completions = ["She makes 18 dollars.", "#### 18\n(20 minutes)", "18, or rather 19", "none"]
    answer = ["18", 18, 18.0, "#### 18"]
    assert Math()(completions, answer) == [0.0, 1.0, 0.0, 0.0]
    assert Math(extraction="lenient")(completions, answer) == [1.0, 1.0, 0.0, 0.0]


def test_row_without_a_readable_reference_is_not_scored() -> None:
    assert Math()(["#### 18"] * 4, ["unknown", None, "42 or 43", "18"]) == [None, None, None, 1.0]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_hostile_completions(hostile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Math()([hostile.text], [hostile.reference]) == [hostile.reward]
    Math(extraction="lenient")([hostile.text], [hostile.reference])
    Math()(["#### 42"], [hostile.text])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18", "18"),
        ("#### 18.00", "18"),
        ("so \\boxed{\\frac{6}{8}}", "3/4"),
        ("A: -0.5", "-1/2"),
        ("#### 18\n#### 19", None),
        ("She makes 18 dollars", None),
        ("", None),
    ],
)
def test_answer_in_one_written_form(text: str, answer: str | None) -> None:
    answer_of = declared(Math(), "answer_of")
    assert answer_of(text) == answer


def test_answer_of_follows_the_options() -> None:
    assert declared(Math(extraction="lenient"), "answer_of")("She makes 1,018 dollars") == "1018"


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_the_answer_of_a_right_completion_is_the_reference(hostile: Any) -> None:
    assert (Math().answer_of(hostile.text) == hostile.reference.replace(",", "")) is (hostile.reward == 1.0)


def test_hostile_list_is_whole() -> None:
    names = [hostile.name for hostile in HOSTILE]
    assert len(set(names)) == len(names) >= 68
    assert sum(HOSTILE_FILE["CANARY"] in hostile.text for hostile in HOSTILE) == 3
