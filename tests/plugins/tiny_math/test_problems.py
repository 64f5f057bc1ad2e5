"""The word-problem generator: splits, determinism, arithmetic, format, coverage."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpoforge_plugins.tiny_math.problems import (
    HELD_OUT_ONE_IN,
    ITEMS,
    KINDS,
    NAMES,
    generate,
    normal_form,
    sample_problems,
    split_of,
    strip_annotations,
    work_out,
)

PLUGINS = Path(__file__).resolve().parents[3] / "plugins" / "grpoforge_plugins"
ANNOTATED = re.compile(r"(\d+) ([+*-]) (\d+) = <<(\d+)([+*-])(\d+)=(\d+)>>(\d+)")


def recompute(left: int, op: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def test_every_question_lies_in_the_split_it_was_asked_for() -> None:
    for split in ("train", "test"):
        for seed in range(3):
            for row in generate(split, 1000, seed):
                assert split_of(row["question"]) == split


def test_train_and_test_share_no_question_and_no_normal_form() -> None:
    train = {row["question"] for seed in range(3) for row in generate("train", 2000, seed)}
    test = {row["question"] for seed in range(3) for row in generate("test", 1000, seed)}
    assert train & test == set()
    assert {normal_form(q) for q in train} & {normal_form(q) for q in test} == set()


def test_split_ignores_names_things_case_and_white_space_but_not_numbers() -> None:
    question = "Tom has 12 apples. Tom finds 5 more. How many apples does Tom have now?"
    renamed = "Ivy has 12  pens.\nIvy finds 5 more. How many pens does Ivy have now?"
    assert normal_form(renamed) == normal_form(question)
    assert normal_form(question) == (
        "someone has 12 thing. someone finds 5 more. how many thing does someone have now?"
    )
    splits = {split_of(question.replace("12", str(number))) for number in range(10, 60)}
    assert splits == {"train", "test"}


def test_about_one_question_in_five_is_held_out() -> None:
    story = "{name} has {n} {item}. {name} finds {m} more."
    forms = [story.format(name="Tom", item="pens", n=n, m=m) for n in range(40) for m in range(40)]
    share = sum(split_of(form) == "test" for form in forms) / len(forms)
    assert abs(share - 1 / HELD_OUT_ONE_IN) < 0.04


def test_no_question_comes_twice_in_a_call() -> None:
    for split in ("train", "test"):
        questions = [row["question"] for row in generate(split, 4000, 5)]
        assert len(set(questions)) == 4000


def test_same_arguments_same_rows_and_another_seed_other_rows() -> None:
    assert generate("train", 50, 7) == generate("train", 50, 7)
    assert generate("train", 20, 7) == generate("train", 50, 7)[:20]
    assert generate("train", 50, 7) != generate("train", 50, 8)


def run_alone(code: str, hash_seed: str = "0") -> str:
    """Run `code` in an interpreter that finds `tiny_math` by itself, without the plugins around it."""
    program = f"import sys; sys.path.append({str(PLUGINS)!r}); {code}"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    return run.stdout.decode().strip()


def test_rows_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import hashlib, json, tiny_math;"
        "print(hashlib.sha256(json.dumps(tiny_math.generate('test', 100, 3)).encode()).hexdigest())"
    )
    here = hashlib.sha256(json.dumps(generate("test", 100, 3)).encode()).hexdigest()
    assert {run_alone(code, "0"), run_alone(code, "1")} == {here}


def test_package_imports_without_torch() -> None:
    assert run_alone("import tiny_math; print('torch' in sys.modules)") == "False"


def test_every_answer_is_right_and_in_gsm8k_format() -> None:
    for row in generate("train", 2000, 0) + generate("test", 2000, 0):
        assert set(row) == {"question", "answer"}
        *lines, last = row["answer"].split("\n")
        assert 1 <= len(lines) <= 2
        for line in lines:
            [match] = ANNOTATED.findall(line)
            assert match[:3] == match[3:6]
            assert recompute(int(match[0]), match[1], int(match[2])) == int(match[6]) == int(match[7]) > 0
        assert last == f"#### {match[7]}"


def test_steps_use_the_numbers_of_the_story_and_chain() -> None:
    for problem in sample_problems("test", 1000, 2):
        given = {int(number) for number in re.findall(r"\d+", problem.question)}
        assert given == set(problem.numbers.values())
        for step in problem.steps:
            assert {step.left, step.right} <= given
            given.add(step.result)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_kind_and_both_step_counts_occur(split: str) -> None:
    problems = sample_problems(split, 1000, 0)
    counts = {kind.name: sum(p.kind is kind for p in problems) for kind in KINDS}
    assert len(counts) == len(KINDS) == 16
    assert min(counts.values()) >= 30
    assert {len(problem.steps) for problem in problems} == {1, 2}
    operations = {step.op for problem in problems for step in problem.steps}
    assert operations == {"+", "-", "*"}


def test_stripping_the_annotations_gives_the_plain_solution() -> None:
    for problem in sample_problems("train", 200, 1):
        assert strip_annotations(problem.row()["answer"]) == problem.solution()
        assert "<<" not in problem.solution()


def test_worked_example() -> None:
    [kind] = [kind for kind in KINDS if kind.name == "bags_and_fewer"]
    words = {"name": "Mia", "friend": "Tom", "item": "eggs"}
    numbers = {"a": 6, "b": 5, "c": 9}
    right = work_out(kind, numbers, words)
    assert [(s.left, s.op, s.right, s.result) for s in right] == [(6, "*", 5, 30), (30, "-", 9, 21)]
    assert right[0].text(annotated=True) == "The bags hold 6 * 5 = <<6*5=30>>30 eggs."
    assert right[1].text(annotated=False) == "Mia still has 30 - 9 = 21 eggs."
    assert work_out(kind, numbers, words, ("*", "+"))[-1].result == 39


def test_unknown_split_and_negative_count_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        generate("dev", 1, 0)
    with pytest.raises(ValueError, match="got -1"):
        generate("train", -1, 0)
    assert generate("train", 0, 0) == []


def test_names_and_items_do_not_repeat() -> None:
    assert len(set(NAMES)) == len(NAMES) and len(set(ITEMS)) == len(ITEMS)
