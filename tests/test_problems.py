"""Which rows a run trains on, which it evaluates on, and what becomes of their columns."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpoforge.config import Config
from grpoforge.errors import ConfigError, DataError, GrpoforgeError
from grpoforge.layers import build
from grpoforge.parts import choose_measured
from grpoforge.plugins import PluginHost, load_plugins
from grpoforge.problems import load_eval_rows, load_examples, load_problems
from grpoforge.sources import Row

PLUGIN = '''
from pathlib import Path

from grpoforge import hookimpl
from grpoforge.declarations import declares


def _rows(split):
    with Path(__file__).with_suffix(".asked").open("a") as file:
        file.write(split + " ")
    return [{"question": f"{split} {number}?", "answer": str(number)} for number in range(30)]


@declares(splits=("train", "validation", "test"))
def three(split):
    """Says what it was asked for."""
    return _rows(split)


def two(split):
    """Says what it was asked for, and declares nothing."""
    return _rows(split)


def endless(split):
    """One row after the other, for ever."""
    number = 0
    while True:
        yield {"question": f"{split} {number}?", "answer": str(number)}
        number += 1


@hookimpl
def register_datasets(register):
    register("three", three)
    register("two", two)
    register("endless", endless)
'''


@pytest.fixture
def host(tmp_path: Path) -> PluginHost:
    """All plugins and the datasets `three`, `two` and `endless`."""
    (tmp_path / "mine.py").write_text(PLUGIN)
    return load_plugins([tmp_path / "mine.py"])


@pytest.fixture
def asked(tmp_path: Path) -> Callable[[], list[str]]:
    """The splits that a dataset was asked for."""
    return lambda: (tmp_path / "mine.asked").read_text().split()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def write(*rows: dict[str, Any], name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return name

    return write


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, also after the command line has taken the logger over."""
    monkeypatch.setattr(logging.getLogger("grpoforge"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="grpoforge"):
        yield caplog


def config(**values: Any) -> Config:
    return build([("mine.yaml", values)])


def problems(host: PluginHost, values: Config) -> Any:
    return load_problems(values, host, choose_measured(values, host)[0])


def refusal(function: Any, *arguments: Any) -> tuple[str, str]:
    with pytest.raises(GrpoforgeError) as caught:
        function(*arguments)
    return caught.value.message, caught.value.hint


def numbers(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"q{number}", "answer": str(number)} for number in range(first, first + count)]


def test_training_evaluates_on_the_validation_split_and_leaves_the_test_split_alone(
    host: PluginHost, asked: Callable[[], list[str]]
) -> None:
    values = config(data={"dataset": "three", "num_eval": 5})
    found = problems(host, values)
    assert found.held_out[0].columns["question"] == "validation 0?"
    assert (len(found.train), len(found.held_out)) == (30, 5)
    assert asked() == ["train", "validation"]


def test_eval_reads_the_test_split_and_nothing_else(host: PluginHost, asked: Callable[[], list[str]]) -> None:
    rows = load_eval_rows(config(data={"dataset": "three"}), host, ())
    assert [row.origin for row in rows][:2] == ["three/test:1", "three/test:2"]
    assert asked() == ["test"]


def test_a_dataset_that_declares_nothing_is_asked_for_its_test_split(
    host: PluginHost, asked: Callable[[], list[str]]
) -> None:
    problems(host, config(data={"dataset": "two"}))
    assert asked() == ["train", "test"]


def test_a_registered_dataset_that_only_evaluates_keeps_its_test_split_too(
    host: PluginHost, file: Callable[..., str], asked: Callable[[], list[str]]
) -> None:
    problems(host, config(data={"dataset": file(*numbers(20)), "eval_dataset": "three"}))
    assert asked() == ["validation"]


def test_rewards_read_the_column_that_is_named(host: PluginHost, file: Callable[..., str]) -> None:
    rows = [{"ask": f"q{n}", "gold": str(n), "answer": "worked"} for n in range(20)]
    data = {"dataset": file(*rows), "prompt": "ask", "answer": "gold", "num_eval": 2}
    found = problems(host, config(data=data))
    for row in (*found.train, *found.held_out):
        assert row.columns["answer"] == row.columns["gold"] == row.columns["ask"][1:]


def test_rows_that_only_evaluate_may_know_the_name_of_rewards(host: PluginHost, file: Callable[..., str]) -> None:
    train = file(*[{"question": f"q{n}", "gold": str(n)} for n in range(20)])
    data = {"dataset": train, "eval_dataset": file(*numbers(3), name="test.jsonl"), "answer": "gold"}
    assert [row.columns["answer"] for row in problems(host, config(data=data)).held_out] == ["0", "1", "2"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_named_column_is_not_there(host: PluginHost, file: Callable[..., str], streaming: bool) -> None:
    data = {"dataset": file(*numbers(20)), "answer": "anwser", "streaming": streaming}
    assert refusal(problems, host, config(data=data, max_steps=1)) == (
        "`data.answer` is `anwser` (from mine.yaml), and rows.jsonl has no such column; it has: answer, question",
        "did you mean `answer`?",
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_the_named_column_without_a_value(host: PluginHost, file: Callable[..., str], streaming: bool) -> None:
    rows = [{"question": "a", "gold": "1"}, {"question": "b", "gold": None}]
    data = {"dataset": file(*rows), "answer": "gold", "streaming": streaming}
    message, hint = refusal(problems, host, config(data=data, max_steps=1))
    assert message == "rows.jsonl:2: column `gold` is missing"
    assert "data.skip_bad_rows" in hint


def test_every_row_has_every_column(host: PluginHost, file: Callable[..., str]) -> None:
    rows = [*numbers(9), {"question": "q9", "answer": "9", "hint": {"a": None}}]
    found = problems(host, config(data={"dataset": file(*rows), "num_eval": 1}))
    hints = {row.columns["question"]: row.columns["hint"] for row in (*found.train, *found.held_out)}
    assert hints == {f"q{number}": None for number in range(9)} | {"q9": {"a": None}}


def stream_config(dataset: str, **data: Any) -> Config:
    return config(data={"dataset": dataset, "streaming": True, "num_eval": 4, **data}, max_steps=5)


def test_a_stream_holds_its_first_rows_out(host: PluginHost, file: Callable[..., str]) -> None:
    found = problems(host, stream_config(file(*numbers(20)), shuffle_buffer=7))
    assert found.train == ()
    assert [row.columns["question"] for row in found.held_out] == ["q0", "q1", "q2", "q3"]
    assert [row.columns["question"] for row in found.stream.open()] == [f"q{number}" for number in range(4, 20)]
    assert (found.stream.buffer, found.stream.columns) == (7, ("answer", "question"))
    assert [row.origin for row in load_eval_rows(stream_config("rows.jsonl"), host, ())] == [
        f"rows.jsonl:{number}" for number in range(1, 5)
    ]


def test_a_stream_beside_evaluation_rows_is_whole(host: PluginHost, file: Callable[..., str]) -> None:
    evaluation = file(*numbers(3), name="test.jsonl")
    found = problems(host, stream_config(file(*numbers(20)), eval_dataset=evaluation))
    assert len(list(found.stream.open())) == 20
    assert [row.origin for row in found.held_out] == ["test.jsonl:1", "test.jsonl:2", "test.jsonl:3"]


def test_a_dataset_that_yields_is_streamed(host: PluginHost) -> None:
    found = problems(host, stream_config("endless"))
    assert [row.columns["question"] for row in found.held_out] == [f"test {number}?" for number in range(4)]
    rows = found.stream.open()
    assert [next(rows).columns["question"] for _ in range(2)] == ["train 0?", "train 1?"]


def test_a_stream_of_parquet_and_of_datasets(host: PluginHost, tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    datasets.disable_progress_bars()
    parquet.write_table(pa.Table.from_pylist(numbers(2500)), tmp_path / "rows.parquet", row_group_size=700)
    datasets.Dataset.from_list(numbers(50)).save_to_disk(tmp_path / "saved")
    for name, count in (("rows.parquet", 2500), ("saved", 50)):
        rows = list(problems(host, stream_config(f"{tmp_path}/{name}")).stream.open())
        assert [row.columns["answer"] for row in rows] == [str(number) for number in range(4, count)]
        assert rows[0].origin == f"{name}:5"


def test_a_stream_needs_a_number_of_steps(host: PluginHost, file: Callable[..., str]) -> None:
    values = config(data={"dataset": file(*numbers(20)), "streaming": True})
    message, hint = refusal(problems, host, values)
    assert message == (
        "`data.streaming` is true (from mine.yaml), so how many rows rows.jsonl has is not known, "
        "and `epochs` is no number of steps"
    )
    assert hint == "say how many steps to take: `--max-steps N`"
    with pytest.raises(ConfigError):
        problems(host, values)


def test_an_array_is_no_stream(host: PluginHost, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(numbers(3)))
    message, hint = refusal(problems, host, stream_config(f"{tmp_path}/rows.json"))
    assert message == f"{tmp_path}/rows.json is one JSON array, which cannot be read row by row (from mine.yaml)"
    assert hint == "write one object per line, or leave out `data.streaming`"


def test_a_stream_that_lacks_a_column(host: PluginHost, file: Callable[..., str]) -> None:
    message, hint = refusal(problems, host, stream_config(file({"query": "a", "answer": "1"})))
    assert message == "rows.jsonl has no column `question`; it has: answer, query"
    assert "data.rename.OLD=question" in hint


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_file(host: PluginHost, file: Callable[..., str], streaming: bool) -> None:
    values = config(data={"dataset": file(), "streaming": streaming}, max_steps=1)
    assert refusal(problems, host, values) == ("rows.jsonl is empty", "give a dataset with at least one row")


def test_examples_come_from_training_rows_only(host: PluginHost, file: Callable[..., str]) -> None:
    values = config(data={"dataset": file(*numbers(30)), "num_eval": 10, "few_shot": 15})
    found = problems(host, values)
    train = {(row.columns["question"], row.columns["answer"]) for row in found.train}
    assert len(found.examples) == 16
    assert {(one.prompt, one.solution) for one in found.examples} <= train
    assert load_examples(values, host, ()) == found.examples
    assert load_examples(config(data={"dataset": "./nowhere.jsonl"}), host, ()) == ()


def test_examples_of_a_stream_come_from_what_fills_its_buffer(host: PluginHost, file: Callable[..., str]) -> None:
    found = problems(host, stream_config(file(*numbers(50)), shuffle_buffer=6, few_shot=3))
    assert {one.prompt for one in found.examples} <= {f"q{number}" for number in range(4, 10)}


def test_examples_show_the_worked_solution(host: PluginHost, file: Callable[..., str]) -> None:
    rows = [row | {"solution": f"long {row['answer']}", "other": "x"} for row in numbers(20)]
    name = file(*rows)
    shown = problems(host, config(data={"dataset": name, "num_eval": 1, "few_shot": 1})).examples
    assert all(one.solution == f"long {one.prompt[1:]}" for one in shown)
    chosen = {"dataset": name, "num_eval": 1, "few_shot": 1, "solution": "other"}
    assert {one.solution for one in problems(host, config(data=chosen)).examples} == {"x"}
    assert refusal(problems, host, config(data=chosen | {"solution": "othr"})) == (
        "`data.few_shot` shows the column `othr` (from mine.yaml), and rows.jsonl has no such column; "
        "it has: answer, other, question, solution",
        "name the column of the worked solutions with `--set data.solution=COLUMN`",
    )


def test_a_bad_row_of_a_stream_is_met_when_it_is_read(host: PluginHost, file: Callable[..., str], logged: Any) -> None:
    name = file(*numbers(8))
    with Path(name).open("a") as rows:
        rows.write("\n{'bad'\n" + json.dumps(numbers(1, first=9)[0]))
    stream = problems(host, stream_config(name)).stream
    with pytest.raises(DataError) as caught:
        list(stream.open())
    assert caught.value.message.startswith("rows.jsonl:9: not JSON")
    skipping = problems(host, stream_config(name, skip_bad_rows=True)).stream
    kept: list[Row] = list(skipping.open())
    assert [row.origin for row in kept] == [f"rows.jsonl:{number}" for number in (5, 6, 7, 8, 10)]
    assert any("left out rows.jsonl:9: not JSON" in message for message in logged.messages)
