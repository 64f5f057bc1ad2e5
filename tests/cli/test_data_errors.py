"""Datasets that cannot be used, or not all of them: the message, the hint, and that nothing is left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

Refused = Callable[..., tuple[str, str]]

GOOD = {"question": "What is 1+1?", "answer": "2"}
SKIP = "correct the row, or leave bad rows out with `--set data.skip_bad_rows=true`"
DATASETS: dict[str, tuple[Sequence[Any], str, str]] = {
    "empty": ((), "train.jsonl is empty", "give a dataset with at least one row"),
    "blank": ((b" ", b"\r"), "train.jsonl is empty", "give a dataset with at least one row"),
    "one row": (
        (GOOD,),
        "train.jsonl has 1 usable row: too few to train and to evaluate on",
        "give more rows, or another file with `--set data.eval_dataset=FILE`",
    ),
    "no prompt column": (
        ({"query": "?", "answer": "2"},),
        "train.jsonl has no column `question`; it has: answer, query",
        "known: answer, query; rename one with `--set data.rename.OLD=question`",
    ),
    "no column of a reward": (
        ({"question": "?", "solution": "2"},),
        "reward `grpoforge:math` reads the dataset column `answer`, which train.jsonl does not have; "
        "it has: question, solution",
        "rename a column with `--set data.rename.OLD=answer`, or choose other rewards",
    ),
    "bad JSON": (
        (GOOD, b"{'question': 1}"),
        "train.jsonl:2: not JSON (Expecting property name enclosed in double quotes at column 2)",
        SKIP,
    ),
    "no object": ((GOOD, GOOD, b"[1]"), "train.jsonl:3: a list, not an object with columns", SKIP),
    "prompt missing": ((GOOD, {"answer": "2"}), "train.jsonl:2: column `question` is missing", SKIP),
    "prompt null": ((GOOD, GOOD | {"question": None}), "train.jsonl:2: column `question` is missing", SKIP),
    "prompt empty": (
        (GOOD, GOOD | {"question": " \n"}),
        "train.jsonl:2: column `question` is ' \\n', not the text of a prompt",
        SKIP,
    ),
    "prompt a number": (
        (GOOD, GOOD | {"question": 3}),
        "train.jsonl:2: column `question` is 3, not the text of a prompt",
        SKIP,
    ),
    "answer missing": ((GOOD, {"question": "?"}), "train.jsonl:2: column `answer` is missing", SKIP),
    "several": (
        (b"x", GOOD, b"y"),
        "train.jsonl:1: not JSON (Expecting value at column 1) (and 1 more of 3 rows cannot be used)",
        SKIP,
    ),
    "latin-1": (
        (GOOD, b'{"question": "\xe9"}'),
        "train.jsonl:2: not UTF-8 (invalid continuation byte at byte 14)",
        SKIP,
    ),
    "NUL": ((GOOD, b'{"question": "\0"}'), "train.jsonl:2: not JSON (Invalid control character at at column 15)", SKIP),
    "key twice": (
        (b'{"question": "a", "question": "b"}',),
        "train.jsonl:1: not JSON (key `question` stands twice)",
        SKIP,
    ),
    "huge integer": (
        (b'{"question": "a", "answer": ' + b"1" * 5000 + b"}",),
        "train.jsonl:1: not JSON (Exceeds the limit (4300 digits) for integer string conversion: "
        "value has 5000 digits)",
        SKIP,
    ),
    "half a character": ((b'{"question": "\\ud800"}',), "train.jsonl:1: not JSON (\\ud800 is half a character)", SKIP),
    "deep": ((b'{"question": ' + b"[" * 100_000,), "train.jsonl:1: not JSON (nested too deep)", SKIP),
    "ANSI": (
        (GOOD, GOOD | {"question": ["\x1b[31m\u202e" * 20]}),
        "train.jsonl:2: column `question` is ['\\x1b[31m\\u202e\\x1b[31m\\u202e\\x1b[31m\\…, not the text of a prompt",
        SKIP,
    ),
}


@pytest.mark.parametrize(("rows", "message", "hint"), DATASETS.values(), ids=DATASETS.keys())
def test_datasets(refused: Refused, dataset: Callable[..., str], rows: Sequence[Any], message: str, hint: str) -> None:
    assert refused("train", "--dataset", dataset(*rows)) == (message, hint)


def test_a_row_without_a_usable_one_beside_it(refused: Refused, dataset: Callable[..., str]) -> None:
    assert refused("train", "--dataset", dataset(b"x", b"y"), "--set", "data.skip_bad_rows=true") == (
        "none of the 2 rows of train.jsonl can be used; "
        "the first, train.jsonl:1: not JSON (Expecting value at column 1)",
        "correct the dataset",
    )


def test_the_column_of_the_reward_that_only_evaluates(refused: Refused, dataset: Callable[..., str]) -> None:
    name = dataset({"question": "a"}, {"question": "b"})
    assert refused("train", "--dataset", name, "--reward", "format") == (
        "reward `grpoforge:math` (`eval.reward` (from recipe tiny-math)) reads the dataset column `answer`, which "
        "train.jsonl does not have; it has: question",
        "rename a column with `--set data.rename.OLD=answer`, or choose another `eval.reward`",
    )


@pytest.mark.parametrize(
    ("rename", "message", "hint"),
    [
        (
            "{qestion: question}",
            "`data.rename.qestion` is `question`, and train.jsonl has no column `qestion`; it has: answer, query",
            "known: answer, query",
        ),
        (
            "{answer: query}",
            "`data.rename.answer` is `query`, and column `query` of train.jsonl has that name too",
            "choose another name for one of them: `--set data.rename.query=OTHER`",
        ),
    ],
)
def test_renaming(refused: Refused, dataset: Callable[..., str], rename: str, message: str, hint: str) -> None:
    name = dataset({"query": "a", "answer": "b"})
    assert refused("train", "--dataset", name, "--set", f"data.rename={rename}") == (message, hint)


def test_options_of_a_file(refused: Refused, dataset: Callable[..., str]) -> None:
    assert refused("train", "--dataset", dataset(GOOD, GOOD), "--set", "data.options.num_train=3") == (
        "`data.options.num_train` is given (from --set data.options.num_train=3), and the file train.jsonl takes no "
        "options",
        "leave it out; options are for registered datasets, see `grpoforge plugins list --kind dataset`",
    )


def test_a_kind_of_file_that_is_not_known(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("question,answer")
    assert refused("train", "--dataset", "train.csv") == (
        "cannot tell what train.csv holds (from --dataset)",
        "give a .jsonl or .parquet file, or a folder saved by `datasets`",
    )


def test_a_folder_that_is_no_dataset(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    assert refused("train", "--dataset", "rows") == (
        "unknown dataset `rows` (from --dataset)",
        "the folder of that name is `./rows`",
    )
    message, hint = refused("train", "--dataset", "./rows")
    assert message.startswith("cannot read the dataset folder rows: ")
    assert hint == "give a folder written by `Dataset.save_to_disk`, or a .jsonl or .parquet file"


def test_a_template_that_leaves_the_prompt_out(refused: Refused) -> None:
    message, _ = refused("train", "--set", "data.template=Answer me")
    assert message == (
        '`data.template` is `"Answer me"` (from --set data.template=Answer me): `{prompt}` is not in it, '
        "so every problem would look the same"
    )


LIMIT = ("--set", "sampler.max_completion_length=64")
LONG = {"question": "one two three four " * 80, "answer": "2"}


def test_a_long_prompt_that_may_not_be_left_out(refused: Refused, dataset: Callable[..., str]) -> None:
    message, hint = refused(
        "train", "--dataset", dataset(GOOD, LONG, GOOD, GOOD), *LIMIT, "--set", "data.long_prompts=stop"
    )
    assert re.sub(r"\d+ tokens, ", "N tokens, ", message) == (
        "train.jsonl:2: the prompt has N tokens, more than the 192 that a context of 256 leaves beside completions "
        "of 64"
    )
    assert hint == (
        "shorten the prompts, lower `sampler.max_completion_length`, or raise `data.max_prompt_length` if it is set; "
        "`--set data.long_prompts=drop` leaves long prompts out"
    )


def test_all_prompts_too_long(refused: Refused, dataset: Callable[..., str]) -> None:
    message, hint = refused("train", "--dataset", dataset(GOOD, GOOD, GOOD), "--set", "data.max_prompt_length=2")
    assert re.sub(r"\d+ tokens, ", "N tokens, ", message) == (
        "train.jsonl:2: the prompt has N tokens, more than the 2 that `data.max_prompt_length` allows "
        "(2 of 2 prompts are too long)"
    )
    assert hint == (
        "shorten the prompts, lower `sampler.max_completion_length`, or raise `data.max_prompt_length` if it is set"
    )


def test_a_dataset_plugin_that_raises(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from grpoforge import hookimpl\n"
        "def rows(split):\n    raise KeyError('x')\n"
        "@hookimpl\ndef register_datasets(register):\n    register('rows', rows)\n"
    )
    assert refused("train", "--plugin", "mine.py", "--dataset", "rows") == (
        "dataset `mine:rows` raised KeyError: 'x'",
        "it is written in ./mine.py:2",
    )


def test_a_question_never_acts_on_the_terminal(
    cli: Callable[..., Any], dataset: Callable[..., str], small: Sequence[str]
) -> None:
    hostile = "\x1b]0;owned\x07\u202e[bold red]1+1?[/]\x1b[2J"
    rows = [{"question": hostile, "answer": "\x1b[31m2"}] * 4
    said = cli("train", "--dataset", dataset(*rows), *small, "--set", "trackers=[{name: console}]")
    assert said.code == 0, said.err
    for text in (said.out, said.err):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_json_array(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"question": "a"}, 3]))
    message, _ = refused("train", "--dataset", "rows.json", "--reward", "format", "--set", "eval.reward=format")
    assert message == "rows.json:2: a int, not columns"


def test_bad_rows_and_long_prompts_are_left_out_with_a_count(
    cli: Callable[..., Any], dataset: Callable[..., str], small: Sequence[str]
) -> None:
    name = dataset(*[GOOD] * 5, b"not JSON", GOOD | {"question": None}, LONG, LONG)
    said = cli("train", "--dataset", name, *small, "--set", "data.skip_bad_rows=true", "--set", "data.num_eval=1")
    assert said.code == 0, said.err
    assert (
        "warning: left out 2 of 9 rows of train.jsonl that cannot be used; "
        "the first, train.jsonl:6: not JSON (Expecting value at column 1)\n"
    ) in said.err
    assert "warning: train.jsonl:8: the prompt has " in said.err
    assert "that a context of 256 leaves beside completions of 4; left out " in said.err


def test_a_dataset_smaller_than_a_step_trains(
    cli: Callable[..., Any], dataset: Callable[..., str], small: Sequence[str]
) -> None:
    said = cli("train", "--dataset", dataset(GOOD, GOOD), *small)
    assert said.code == 0, said.err
    assert (
        "warning: train.jsonl leaves 1 to train on, fewer than the 2 prompts of a step: problems repeat within a step\n"
    ) in said.err
