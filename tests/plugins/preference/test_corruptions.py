"""Spoiled solutions: wrong in the way that their kind says, and right otherwise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge.errors import DataError
from grpoforge_plugins.preference.corruptions import (
    KINDS,
    corrupted_pairs,
    dropped_step,
    foreign_step,
    make_pairs,
    other_solution,
    read_solution,
    wrong_number,
)
from grpoforge_plugins.preference.pairs import read_pairs

CLIPS = read_solution(
    "How many clips?",
    "She sold 48/2 = <<48/2=24>>24 clips in May.\nTogether that is 48+24 = <<48+24=72>>72 clips.\n#### 72",
)
WAGE = read_solution(
    "How much?", "She earns 12/60 = $<<12/60=0.2>>0.2 a minute.\nIn 50: 0.2*50 = $<<0.2*50=10>>10.\n#### 10"
)
WORDS = read_solution("Which?", "There is nothing to calculate.\n#### 3")


def test_a_solution_is_read_without_its_annotations() -> None:
    assert CLIPS.steps == ("She sold 48/2 = 24 clips in May.", "Together that is 48+24 = 72 clips.")
    assert CLIPS.results == ("24", "72") and CLIPS.answer == "#### 72"
    assert WORDS.results == ("",)


def test_a_wrong_number_is_one_result_where_it_is_worked_out() -> None:
    found = {wrong_number(CLIPS, WAGE, random.Random(seed)) for seed in range(60)}
    assert CLIPS.solution not in found and len(found) > 20
    for text in found:
        assert text is not None
        first, second, last = text.split("\n")
        assert (
            last == "#### 72"
            and first.startswith("She sold 48/2 = ")
            and second.startswith("Together that is 48+24 = ")
        )
        assert (first != CLIPS.steps[0]) + (second != CLIPS.steps[1]) == 1, text
    decimals = {wrong_number(WAGE, CLIPS, random.Random(seed)) for seed in range(60)}
    assert all(text and "$-" not in text for text in decimals)
    assert wrong_number(WORDS, CLIPS, random.Random(0)) is None


def test_the_other_kinds() -> None:
    dice = random.Random(0)
    assert dropped_step(CLIPS, WAGE, dice) == "Together that is 48+24 = 72 clips.\n#### 72"
    assert dropped_step(WORDS, WAGE, dice) is None, "its only step is its last"
    assert other_solution(CLIPS, WAGE, dice) == WAGE.solution
    lines = str(foreign_step(CLIPS, WAGE, dice)).split("\n")
    assert len(lines) == 4 and len({*lines} & {*WAGE.steps}) == 1
    assert [line for line in lines if line not in WAGE.steps] == CLIPS.solution.split("\n")


def test_equal_arguments_give_equal_pairs_and_kinds_take_turns() -> None:
    problems = [CLIPS, WAGE, CLIPS, WAGE]
    pairs = corrupted_pairs(problems, seed=1)
    assert pairs == corrupted_pairs(problems, seed=1) != corrupted_pairs(problems, seed=2)
    assert [pair.kind for pair in pairs] == list(KINDS)
    assert [pair.chosen for pair in pairs] == [one.solution for one in problems]
    assert len(corrupted_pairs([CLIPS, WAGE], seed=1, per_problem=4)) == 8
    assert {pair.kind for pair in corrupted_pairs(problems, seed=1, kinds=["wrong_number"])} == {"wrong_number"}


@pytest.fixture
def problems(tmp_path: Path) -> Callable[..., Path]:
    def write(*answers: Any) -> Path:
        path = tmp_path / "solved.jsonl"
        path.write_text("".join(json.dumps({"question": "Why?", "answer": answer}) + "\n" for answer in answers))
        return path

    return write


def test_a_file_of_problems_becomes_a_file_of_pairs(tmp_path: Path, problems: Callable[..., Path]) -> None:
    source = problems("1+1 = <<1+1=2>>2\n#### 2", "2+2 = <<2+2=4>>4\n3+4 = <<3+4=7>>7\n#### 7")
    report = make_pairs(source, tmp_path / "pairs.jsonl", kinds=["wrong_number", "other_solution"], per_problem=2)
    assert report["pairs"] == 4 and report["kinds"] == {"other_solution": 2, "wrong_number": 2}
    read = read_pairs(tmp_path / "pairs.jsonl")
    assert [one.chosen for one in read] == ["1+1 = 2\n#### 2"] * 2 + ["2+2 = 4\n3+4 = 7\n#### 7"] * 2


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        (["#### 2", "x\n#### 2"], "solved.jsonl:1: column `answer` does not end with a line `#### NUMBER`"),
        (["x\n#### 2", 7], "solved.jsonl:2: column `answer` does not end with a line `#### NUMBER`"),
        (["x\n#### 2"], "solved.jsonl has one problem"),
    ],
)
def test_problems_without_a_solution_are_named(
    tmp_path: Path, problems: Callable[..., Path], answers: list[Any], complaint: str
) -> None:
    with pytest.raises(DataError) as refused:
        make_pairs(problems(*answers), tmp_path / "pairs.jsonl")
    assert refused.value.message.endswith(complaint)
    assert refused.value.hint
