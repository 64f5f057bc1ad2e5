"""The file of outcomes: what is in it for anybody, what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from grpoforge.errors import ConfigError, DataError, RunFailed
from grpoforge.outcomes import Attempt, Outcome
from grpoforge.results_file import check_output, read_results, write_results

RIGHT = Attempt(
    completion="7 + 0\n#### 7", answer="7", verdict="right", num_tokens=5, finish_reason="stop", temperature=1.0
)
CUT = dataclasses.replace(RIGHT, completion="well", answer=None, verdict="truncated", finish_reason="length")
OUTCOME = Outcome(
    index=3,
    origin="test.jsonl:4",
    problem="ab" * 32,
    question="how many?",
    gold="7",
    greedy=RIGHT,
    samples=(dataclasses.replace(RIGHT, temperature=0.7), dataclasses.replace(CUT, temperature=0.7)),
)
ABOUT = {"model": "m", "correctness": "math", "seed": 0}


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    earlier = dataclasses.replace(OUTCOME, index=1)
    write_results(path, [OUTCOME, earlier], ABOUT)
    assert read_results(path) == ((earlier, OUTCOME), ABOUT)
    assert [one.name for one in tmp_path.iterdir()] == ["r.parquet"]


def test_it_is_read_without_the_program(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    write_results(tmp_path / "r.parquet", [OUTCOME], ABOUT)
    (row,) = pandas.read_parquet(tmp_path / "r.parquet").to_dict("records")
    samples = row.pop("samples")
    assert row == {
        "index": 3,
        "origin": "test.jsonl:4",
        "problem": "ab" * 32,
        "question": "how many?",
        "gold": "7",
        "greedy_completion": "7 + 0\n#### 7",
        "greedy_answer": "7",
        "greedy_verdict": "right",
        "greedy_num_tokens": 5,
        "greedy_finish_reason": "stop",
    }
    assert list(samples)[1] == {
        "completion": "well",
        "answer": None,
        "verdict": "truncated",
        "num_tokens": 5,
        "finish_reason": "length",
        "temperature": 0.7,
    }


def test_columns_have_their_types_where_there_is_nothing_in_them(tmp_path: Path) -> None:
    write_results(tmp_path / "full.parquet", [OUTCOME], ABOUT)
    bare = dataclasses.replace(OUTCOME, greedy=CUT, samples=())
    write_results(tmp_path / "bare.parquet", [bare], ABOUT)
    full, empty = (parquet.read_schema(tmp_path / f"{name}.parquet") for name in ("full", "bare"))
    assert full == empty
    assert read_results(tmp_path / "bare.parquet")[0] == (bare,)


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    nasty = dataclasses.replace(RIGHT, completion="\x1b[2J\ud800", answer="\u202e7")
    write_results(tmp_path / "r.parquet", [dataclasses.replace(OUTCOME, greedy=nasty, question="\x07?")], ABOUT)
    (found,), _ = read_results(tmp_path / "r.parquet")
    assert (found.greedy.completion, found.greedy.answer) == ("\\x1b[2J\\ud800", "\\u202e7")
    assert found.question == "\\x07?"


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    for name, said, hint in (
        ("r.csv", f"`--output {tmp_path}/r.csv` is no Parquet file", f"call it `{tmp_path}/r.csv.parquet`"),
        ("folder.parquet", f"`--output {tmp_path}/folder.parquet` is a folder", "name a file"),
        (
            "no/r.parquet",
            f"`--output {tmp_path}/no/r.parquet`: there is no folder {tmp_path}/no",
            "make it, or name another file",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            check_output(tmp_path / name)
        assert (error.value.message, error.value.hint) == (said, hint)
    check_output(tmp_path / "r.parquet")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.parquet"
    write_results(path, [OUTCOME], ABOUT)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(RunFailed) as error:
        write_results(path, [], ABOUT)
    assert error.value.message == f"{path} could not be written: No space left on device"
    assert error.value.hint == "check the disk, or choose another `--output`"
    assert read_results(path)[0] == (OUTCOME,)
    assert [one.name for one in tmp_path.iterdir()] == ["r.parquet"]


@pytest.mark.parametrize("damage", ["text", "another table", "no verdict", "ragged"])
def test_files_that_hold_no_results(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "r.parquet"
    if damage == "text":
        path.write_text("not parquet")
    elif damage == "another table":
        parquet.write_table(pyarrow.table({"a": [1]}), path)
    elif damage == "ragged":
        write_results(path, [OUTCOME, dataclasses.replace(OUTCOME, samples=())], ABOUT)
    else:
        judged = dataclasses.replace(RIGHT, verdict="splendid")  # type: ignore[arg-type]
        write_results(path, [dataclasses.replace(OUTCOME, greedy=judged)], ABOUT)
    with pytest.raises(DataError) as error:
        read_results(path)
    assert error.value.message.startswith(f"{path} holds no results of `grpoforge eval`: ")
    assert error.value.hint == "give a file that `grpoforge eval MODEL --output FILE.parquet` wrote"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_results(tmp_path / "r.parquet")
    assert error.value.message == f"there are no results at {tmp_path}/r.parquet"
    assert error.value.hint == "write some with `grpoforge eval MODEL --output FILE.parquet`"


def test_the_guide_describes_every_column(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[1] / "docs/guides/evaluation.md").read_text(encoding="utf-8")
    write_results(tmp_path / "r.parquet", [OUTCOME], ABOUT)
    schema = parquet.read_schema(tmp_path / "r.parquet")
    inner = [f"samples[].{field.name}" for field in schema.field("samples").type.value_type]
    described = re.findall(r"^\| `([a-z_.\[\]]+)` \| (?:int64|string|double|list)", guide, re.MULTILINE)
    assert described == [name for name in schema.names if name != "samples"] + ["samples", *inner]
