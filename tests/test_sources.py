"""Rows from files: what is read, and how what cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.errors import DataError
from grpoforge.sources import BadRow, Row, is_path, numbered, read_hub, read_path


def rows_of(tmp_path: Path, content: bytes, name: str = "rows.jsonl") -> list[Row | BadRow]:
    (tmp_path / name).write_bytes(content)
    return read_path(str(tmp_path / name))


def test_rows_know_their_line(tmp_path: Path) -> None:
    assert rows_of(tmp_path, b'{"a": 1}\n\n  \n{"a": 2}') == [
        Row({"a": 1}, "rows.jsonl:1"),
        Row({"a": 2}, "rows.jsonl:4"),
    ]


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    assert rows_of(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n') == [
        Row({"a": 1}, "rows.jsonl:1"),
        Row({"a": 2}, "rows.jsonl:2"),
    ]
    assert rows_of(tmp_path, b"\xef\xbb\xbf") == []


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    text = f"one{separator}two"
    content = json.dumps({"a": text}, ensure_ascii=ord(separator) < 32).encode()
    assert rows_of(tmp_path, content) == [Row({"a": text}, "rows.jsonl:1")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        (b"[1]", "a list, not an object with columns"),
        (b'"text"', "a str, not an object with columns"),
        (b"null", "a NoneType, not an object with columns"),
        (b'{"a": "\xe9"}', "not UTF-8 (invalid continuation byte at byte 7)"),
        (b'{"a": "\x00"}', "not JSON (Invalid control character at at column 8)"),
        (b'{"a": 1, "a": 2}', "not JSON (key `a` stands twice)"),
        (b'{"a": {"b": 1, "b": 2}}', "not JSON (key `b` stands twice)"),
        (b'{"a": "\\ud83d"}', "not JSON (\\ud83d is half a character)"),
        (b"[" * 100_000, "not JSON (nested too deep)"),
        (
            b'{"a": ' + b"9" * 4301 + b"}",
            "not JSON (Exceeds the limit (4300 digits) for integer string conversion: value has 4301 digits)",
        ),
    ],
)
def test_bad_rows_are_kept_with_their_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    assert rows_of(tmp_path, b'{"a": 1}\n' + line) == [Row({"a": 1}, "rows.jsonl:1"), BadRow("rows.jsonl:2", reason)]


def test_characters_in_two_escapes_and_escaped_nul_are_text(tmp_path: Path) -> None:
    assert rows_of(tmp_path, b'{"a": "\\ud83d\\ude00", "b": "\\u0000"}') == [
        Row({"a": "😀", "b": "\0"}, "rows.jsonl:1")
    ]


def test_a_long_integer_is_exact(tmp_path: Path) -> None:
    assert rows_of(tmp_path, b'{"a": ' + b"9" * 400 + b"}") == [Row({"a": 10**400 - 1}, "rows.jsonl:1")]


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,a1\\ud8 \n\r', max_size=60).map(str.encode))
def test_nothing_escapes_from_a_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    for row in rows_of(tmp_path_factory.mktemp("rows"), content):
        assert row.origin.startswith("rows.jsonl:")


def test_a_json_array(tmp_path: Path) -> None:
    content = json.dumps([{"a": 1}, 2], indent=2).encode()
    assert rows_of(tmp_path, content, "rows.json") == [
        Row({"a": 1}, "rows.json:1"),
        BadRow("rows.json:2", "a int, not columns"),
    ]


def test_a_json_array_that_is_cut_off(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, b'[\n {"a": 1}', "rows.json")
    assert (
        caught.value.message
        == f"{tmp_path}/rows.json is no JSON array: not JSON (Expecting ',' delimiter at line 2 column 10)"
    )
    assert caught.value.hint == "correct the file, or write one object per line"


def test_lines_in_a_json_file(tmp_path: Path) -> None:
    assert rows_of(tmp_path, b'{"a": 1}\n{"a": 2}', "rows.json")[1] == Row({"a": 2}, "rows.json:2")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"a": [1, None], "b": ["x", "y"]}), tmp_path / "rows.parquet")
    assert read_path(str(tmp_path / "rows.parquet")) == [
        Row({"a": 1, "b": "x"}, "rows.parquet:1"),
        Row({"a": None, "b": "y"}, "rows.parquet:2"),
    ]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"nothing at all"])
def test_a_damaged_parquet_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, content, "rows.parquet")
    assert caught.value.message.startswith(f"cannot read {tmp_path}/rows.parquet: ")
    assert caught.value.hint == "give a Parquet file"


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"a": 1}, {"a": 2}]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list([{"a": 3}])}).save_to_disk(tmp_path / "split")
    assert [row.columns for row in read_path(str(tmp_path / "one")) if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]
    assert read_path(str(tmp_path / "split")) == [Row({"a": 3}, "split:1")]


def test_a_missing_file_and_its_neighbor(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError) as caught:
        read_path(str(tmp_path / "trian.jsonl"))
    assert caught.value.message == f"there is no dataset at {tmp_path}/trian.jsonl"
    assert caught.value.hint == "its folder: did you mean `train.jsonl`?"


@pytest.mark.parametrize("name", ["a\0b.jsonl", "n" * 300 + ".jsonl", "~nobody-of-this-name/rows.jsonl"])
def test_names_that_no_file_can_have(name: str) -> None:
    assert is_path(name)
    with pytest.raises(DataError, match="there is no dataset at"):
        read_path(name)


def test_the_error_of_the_hub_is_one_line() -> None:
    with pytest.raises(DataError) as caught:
        read_hub("a/b/c", "train")
    assert caught.value.message.startswith("cannot load the dataset `a/b/c` (split train): ")
    assert "\n" not in caught.value.message
    assert caught.value.hint == "check the name and the network, or give a local file with `--dataset FILE.jsonl`"


def test_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-math").mkdir()
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    (tmp_path / "rows").write_text("")
    paths = ["./x", "../x", "/x", "~/x", "x.jsonl", "x.json", "x.parquet", "rows", "openai/gsm8k"]
    assert [name for name in [*paths, "tiny-math", "org/name", "x.csv"] if is_path(name)] == paths


def test_numbered() -> None:
    assert numbered([{"a": 1}, "b"], "set/train") == [
        Row({"a": 1}, "set/train:1"),
        BadRow("set/train:2", "a str, not columns"),
    ]
