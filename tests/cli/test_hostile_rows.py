"""Rows that nobody would write on purpose: refused by file and line, or taken as they are. Whole and streamed alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

GOOD = b'{"question": "What is 1+1?", "answer": "2"}'
MEGABYTE = b'{"question": "' + b"word " * 200_000 + b'", "answer": "2"}'
SKIP = "correct the row, or leave bad rows out with `--set data.skip_bad_rows=true`"

READING = {"whole": (), "stream": ("--set", "data.streaming=true", "data.shuffle_buffer=4")}

REFUSED = {
    "invalid UTF-8": (b'{"question": "\xff\xfe"}', "not UTF-8 (invalid start byte at byte 14)"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not UTF-8 (invalid start byte at byte 0)"),
    "NUL": (b'{"question": "a\0b", "answer": "2"}', "not JSON (Invalid control character at at column 16)"),
    "only NUL": (b"\0\0\0", "not JSON (Expecting value at column 1)"),
    "key twice": (b'{"question": "a", "answer": "1", "answer": "2"}', "not JSON (key `answer` stands twice)"),
    "key twice, deep": (b'{"question": "a", "m": {"b": 1, "b": 2}}', "not JSON (key `b` stands twice)"),
    "BOM in the middle": (
        b"\xef\xbb\xbf" + GOOD,
        "not JSON (Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1)",
    ),
    "null prompt": (b'{"question": null, "answer": "2"}', "column `question` is missing"),
    "nested null prompt": (
        b'{"question": {"text": null}, "answer": "2"}',
        "column `question` is {'text': None}, not the text of a prompt",
    ),
    "null row": (b"null", "a NoneType, not an object with columns"),
    "cut off": (GOOD[:-3], "not JSON (Unterminated string starting at at column 40)"),
}

SURVIVED = {
    "BOM": b"\xef\xbb\xbf" + b"\n".join([GOOD] * 4),
    "CRLF": b"\r\n".join([GOOD] * 4) + b"\r\n",
    "blank lines": b"\n\n".join([GOOD] * 4),
    "nested nulls": b"\n".join([b'{"question": "1+1?", "answer": "2", "meta": {"a": [null, {"b": null}]}}'] * 4),
    "a key that only some have": b"\n".join([b'{"question": "?", "answer": "2", "hint": null}', GOOD, GOOD, GOOD]),
    "escaped NUL": b"\n".join([b'{"question": "a\\u0000b", "answer": "2"}'] * 4),
    "a row of a megabyte": b"\n".join([GOOD, GOOD, MEGABYTE, GOOD]),
    "NaN": b"\n".join([b'{"question": "1+1?", "answer": "2", "score": NaN}'] * 4),
}


@pytest.mark.parametrize("reading", READING.values(), ids=READING.keys())
@pytest.mark.parametrize(("row", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_line(
    cli: Callable[..., Any], tmp_path: Path, row: bytes, reason: str, reading: Sequence[str]
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([GOOD, GOOD, row.replace(b"\n", b" "), GOOD]))
    said = cli("data", "show", "--dataset", "rows.jsonl", "--set", "data.num_eval=1", *reading)
    assert (said.code, said.out) == (2, "")
    assert "Traceback" not in said.err
    assert said.err.endswith(f"error: rows.jsonl:3: {reason}\nhint: {SKIP}\n")


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("reading", READING.values(), ids=READING.keys())
@pytest.mark.parametrize("content", SURVIVED.values(), ids=SURVIVED.keys())
def test_shown(cli: Callable[..., Any], tmp_path: Path, content: bytes, reading: Sequence[str]) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    said = cli("data", "show", "--json", "--dataset", "rows.jsonl", "--set", "data.num_eval=1", "seed=1", *reading)
    assert said.code == 0, said.err
    assert json.loads(said.out, parse_constant=no_constant)["num_rows"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("reading", READING.values(), ids=READING.keys())
@pytest.mark.parametrize("content", SURVIVED.values(), ids=SURVIVED.keys())
def test_trained_on(
    cli: Callable[..., Any], tmp_path: Path, small: Sequence[str], content: bytes, reading: Sequence[str]
) -> None:
    """Two steps: a row that is too long for the model is left out."""
    (tmp_path / "rows.jsonl").write_bytes(content)
    said = cli("train", "--dataset", "rows.jsonl", *small, "--set", "data.num_eval=1", "seed=1", *reading)
    assert said.code == 0, said.err


@pytest.mark.parametrize("reading", READING.values(), ids=READING.keys())
@pytest.mark.parametrize("content", [b"", b"\n\r\n", b"\xef\xbb\xbf"], ids=["no byte", "blank", "only a BOM"])
def test_an_empty_file(
    refused: Callable[..., tuple[str, str]], tmp_path: Path, content: bytes, reading: Sequence[str]
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert refused("data", "show", "--dataset", "rows.jsonl", *reading) == (
        "rows.jsonl is empty",
        "give a dataset with at least one row",
    )


def test_a_bad_row_in_the_middle_of_a_stream_stops_the_run_and_its_steps_are_saved(
    cli: Callable[..., Any], tmp_path: Path, small: Sequence[str]
) -> None:
    rows = [GOOD] * 8
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*rows, b"{'question'"]))
    flags = ("--dataset", "rows.jsonl", *small, "--set", "data.num_eval=2", "data.streaming=true", "max_steps=9")
    said = cli("train", *flags, "--set", "data.shuffle_buffer=1", "--max-steps", "9", "--output", "run")
    assert said.code == 2
    reason = "rows.jsonl:9: not JSON (Expecting property name enclosed in double quotes at column 2)"
    assert said.err.endswith(f"error: {reason}\nhint: {SKIP}\n")
    assert "step 2 is saved; `grpoforge train --resume " in said.err
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*rows, GOOD]))
    assert cli("train", "--resume", "run", "--max-steps", "4").code == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4
