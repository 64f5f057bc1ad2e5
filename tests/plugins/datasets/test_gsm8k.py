"""GSM8K: what becomes of a row, the split that a seed decides, and the real 7,473 + 1,319 rows."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.declarations import declared
from grpoforge.errors import ConfigError, DataError
from grpoforge.sources import BadRow, Row
from grpoforge_plugins.datasets.gsm8k import gsm8k, plain_number, prepare_for_grpo
from grpoforge_plugins.rewards.answers import parse_number
from grpoforge_plugins.rewards.math import Math

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The folder with GSM8K that no package may carry."""
    shared = Path(os.environ.get("GRPOFORGE_SHARED", ROOT.parent / "shared"))
    path = shared / "data/gsm8k"
    assert (path / "train.jsonl").is_file(), f"{shared} has no data/gsm8k; set GRPOFORGE_SHARED"
    return path


def problem(number: int, answer: str = "") -> dict[str, str]:
    return {"question": f"What is {number}?", "answer": answer or f"It is <<{number}>>{number}.\n#### {number}"}


def write(path: Path, count: int, first: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(json.dumps(problem(number)) for number in range(first, first + count)))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with 40 problems to train on and 5 to test on."""
    write(tmp_path / "small/train.jsonl", 40)
    return write(tmp_path / "small/test.jsonl", 5, first=100).parent


def good(rows: list[Row | BadRow]) -> list[dict[str, Any]]:
    assert all(isinstance(row, Row) for row in rows), [row for row in rows if isinstance(row, BadRow)]
    return [dict(row.columns) for row in rows if isinstance(row, Row)]


def questions(rows: list[Row | BadRow]) -> list[str]:
    return [row["question"] for row in good(rows)]


def test_a_problem_with_its_solution_and_its_final_answer() -> None:
    assert prepare_for_grpo([problem(0, "4+4=<<4+4=8>>8\n#### 1,008")]) == [
        Row({"question": "What is 0?", "solution": "4+4=<<4+4=8>>8\n#### 1,008", "answer": "1008"}, "row:1")
    ]


@pytest.mark.parametrize(
    ("final", "answer"),
    [
        *[(" 72", "72"), ("72 ", "72"), (" $1,080", "1080"), (" -5", "-5"), (" 3.50", "3.5"), (" 0.05", "0.05")],
        *[(" -.5", "-0.5"), (" 1/3", "1/3"), (" 6/4", "1.5"), (" 20%", "20"), (" 18.0", "18")],
    ],
)
def test_final_answers_in_plain_digits(final: str, answer: str) -> None:
    assert good(prepare_for_grpo([problem(0, f"So.\n####{final}")]))[0]["answer"] == answer


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**7))
def test_a_number_in_digits_is_that_number(number: Fraction) -> None:
    written = plain_number(number)
    assert Fraction(written) == number == parse_number(written)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            problem(0, "It is 7."),
            "column `answer` has no `####` before a final answer: it ends in 'It is 7.'",
        ),
        (problem(0, "7\n#### seven"), "the final answer after `####` is 'seven', not a number"),
        (problem(0, "7\n####"), "the final answer after `####` is '', not a number"),
        (problem(0, "7\n#### 7\nor 8"), "the final answer after `####` is '7\\nor 8', not a number"),
        (problem(0, "#### " + "9" * 500), "the final answer after `####` is '" + "9" * 38 + "…, not a number"),
        ({"question": "?"}, "column `answer` is None, not text"),
        ({"question": "?", "answer": {"value": None}}, "column `answer` is {'value': None}, not text"),
        ({"question": " ", "answer": "#### 7"}, "column `question` is ' ', not text"),
        ({"question": 7, "answer": "#### 7"}, "column `question` is 7, not text"),
        ("text", "a str, not columns"),
    ],
)
def test_rows_without_a_readable_final_answer(row: Any, reason: str) -> None:
    assert prepare_for_grpo([problem(1), row], source="x.jsonl")[1] == BadRow("x.jsonl:2", reason)


def test_a_bad_row_of_the_file_stays_what_it_is() -> None:
    assert prepare_for_grpo([BadRow("x:3", "not JSON")]) == [BadRow("x:3", "not JSON")]


def test_it_declares_its_splits() -> None:
    assert declared(gsm8k, "splits") == ("train", "validation", "test")


def test_every_training_row_is_in_exactly_one_split(small: Path) -> None:
    train, validation = (gsm8k(split, path=str(small), num_validation=7) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (33, 7)
    assert sorted(questions(train) + questions(validation)) == sorted(f"What is {n}?" for n in range(40))
    assert questions(gsm8k("test", path=str(small))) == [f"What is {n}?" for n in range(100, 105)]


def test_the_split_is_that_of_its_seed_whatever_the_order_and_the_format(small: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    expected = set(questions(gsm8k("validation", path=str(small), num_validation=7)))
    assert expected == set(questions(gsm8k("validation", path=str(small), num_validation=7)))
    assert expected != set(questions(gsm8k("validation", path=str(small), num_validation=7, split_seed=1)))
    larger = set(questions(gsm8k("validation", path=str(small), num_validation=9)))
    assert expected < larger
    rows = [problem(number) for number in reversed(range(40))]
    (tmp_path / "hub/main").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "hub/main/train-00000-of-00001.parquet")
    parquet.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "hub/main/test-00000-of-00001.parquet")
    assert set(questions(gsm8k("validation", path=str(tmp_path / "hub"), num_validation=7))) == expected
    assert len(gsm8k("test", path=str(tmp_path / "hub"))) == 1


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    train = datasets.Dataset.from_list([problem(number) for number in range(4)])
    test = datasets.Dataset.from_list([problem(9)])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    assert len(gsm8k("train", path=str(tmp_path / "both"), num_validation=1)) == 3
    assert questions(gsm8k("test", path=str(tmp_path / "both"))) == ["What is 9?"]
    train.save_to_disk(tmp_path / "one")
    with pytest.raises(DataError) as caught:
        gsm8k("test", path=str(tmp_path / "one"))
    assert caught.value.message == f"the dataset folder {tmp_path}/one has no split `test`; it has: train"


def test_a_file_holds_training_problems_and_no_test(small: Path) -> None:
    path = str(small / "train.jsonl")
    assert len(gsm8k("train", path=path, num_validation=1)) == 39
    with pytest.raises(DataError) as caught:
        gsm8k("test", path=path)
    assert caught.value.message == (
        f"option `path` of dataset `gsm8k` is the file {path}, which holds training problems and no test split"
    )
    assert "--dataset test.jsonl" in caught.value.hint


@pytest.mark.parametrize("count", [0, -1, 40, 1000])
def test_sizes_that_leave_nothing(small: Path, count: int) -> None:
    with pytest.raises(ConfigError) as caught:
        gsm8k("train", path=str(small), num_validation=count)
    assert caught.value.message == (
        f"option `num_validation` of dataset `gsm8k` is {count}, and there are 40 training problems"
    )
    assert caught.value.hint == "use at least 1 and less than 40"


def test_without_a_network_the_hint_is_the_local_folder() -> None:
    with pytest.raises(DataError) as caught:
        gsm8k("train")
    assert caught.value.message.startswith("cannot load the dataset `openai/gsm8k` (split train): ")
    assert caught.value.hint == "check the network, or name a local folder with `--set data.options.path=FOLDER`"


def test_bad_rows_are_named_by_line_where_training_reads_them(small: Path) -> None:
    with (small / "train.jsonl").open("a") as file:
        file.write('\n{"question": "?", "answer": "none"}\n{"question"')
    train = gsm8k("train", path=str(small), num_validation=7)
    assert [(row.origin, row.reason.partition(":")[0]) for row in train if isinstance(row, BadRow)] == [
        ("train.jsonl:41", "column `answer` has no `####` before a final answer"),
        ("train.jsonl:42", "not JSON (Expecting '"),
    ]
    assert len(questions(gsm8k("validation", path=str(small), num_validation=7))) == 7


def test_the_real_rows(folder: Path) -> None:
    splits = {split: gsm8k(split, path=str(folder)) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6961, "validation": 512, "test": 1319}
    asked = {split: set(questions(rows)) for split, rows in splits.items()}
    assert [len(one) for one in asked.values()] == [6961, 512, 1319]
    assert len(asked["train"] | asked["validation"] | asked["test"]) == 6961 + 512 + 1319


def test_every_real_gold_answer_is_read_as_it_is_written(folder: Path) -> None:
    for name, count in (("train", 7473), ("test", 1319)):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").open(encoding="utf-8")]
        rows = good(prepare_for_grpo(lines))
        assert len(rows) == count
        # Another reading: every gold answer of GSM8K is an integer after the last `#### `, grouped by commas.
        gold = [re.fullmatch(r"-?[0-9,]+", line["answer"].rpartition("#### ")[2]) for line in lines]
        assert [row["answer"] for row in rows] == [one[0].replace(",", "") for one in gold if one]
        assert [row["solution"] for row in rows] == [line["answer"] for line in lines]
        assert Math()([line["answer"] for line in lines], [row["answer"] for row in rows]) == [1.0] * count


def digest(rows: list[Row | BadRow]) -> str:
    return hashlib.sha256("\n".join(questions(rows)).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "af65f0cc501edcc9"), ({"split_seed": 1}, "201e08d4b3a01d7b"), ({"num_validation": 100}, "88ca95278b00e91a")],
)
def test_the_validation_rows_never_change(folder: Path, options: dict[str, int], expected: str) -> None:
    """Pinned: figures measured on the validation split stay comparable."""
    read: Callable[..., list[Row | BadRow]] = gsm8k
    assert digest(read("validation", path=str(folder), **options)) == expected
