"""Where rows come from: JSONL and Parquet files, folders saved by ``datasets``, and the hub.

Every row keeps its origin (``train.jsonl:17``), so that a bad one can be named.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from grpoforge.errors import DataError, first_line, suggest

ROWS_AT_A_TIME = 1000
"""Rows of a Parquet file that are decoded together."""


@dataclass(frozen=True, slots=True)
class Row:
    """One problem: its columns, and where it stands."""

    columns: Mapping[str, Any]
    origin: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be read, and why."""

    origin: str
    reason: str


def is_path(name: str) -> bool:
    """True when ``name`` means a file or folder rather than a registered dataset or a hub id.

    A folder called like a dataset does not hide it: write ``./name`` for the folder.
    """
    looks_local = name.startswith((".", "/", "~")) or name.endswith((".jsonl", ".json", ".parquet"))
    return looks_local or os.path.isfile(name) or ("/" in name and os.path.exists(name))


def read_path(name: str, split: str = "train") -> list[Row | BadRow]:
    """The rows of a ``.jsonl`` or ``.parquet`` file, or of ``split`` of a folder saved by ``datasets``.

    Raises:
        DataError: missing, unreadable, or of a kind that is not known.
    """
    return list(iterate_path(name, split))


def iterate_path(name: str, split: str = "train") -> Iterator[Row | BadRow]:
    """What `read_path` returns, read as it is asked for; a ``.json`` file that is one array is read whole.

    Raises:
        DataError: see `read_path`; what makes a file unreadable may come to light in the middle.
    """
    path = Path(os.path.expanduser(name))
    if not os.path.exists(path):
        raise DataError(f"there is no dataset at {name}", _nearest_file(path))
    if path.is_dir():
        return _from_datasets_folder(path, split)
    if path.suffix == ".parquet":
        return _from_parquet(path)
    if path.suffix in (".jsonl", ".json"):
        return iter(_from_array(path)) if is_array(path) else _from_lines(path)
    raise DataError(f"cannot tell what {name} holds", "give a .jsonl or .parquet file, or a folder saved by `datasets`")


def _nearest_file(path: Path) -> str:
    neighbors = [file.name for file in path.parent.glob("*") if file.suffix in (".jsonl", ".json", ".parquet")]
    return f"its folder: {suggest(path.name, neighbors)}" if neighbors else "check the path (`--dataset FILE`)"


def is_array(path: Path) -> bool:
    """True for a ``.json`` file that is one array of objects, not one object per line.

    Raises:
        DataError: it cannot be read.
    """
    if path.suffix != ".json":
        return False
    with _readable(path) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _from_array(path: Path) -> list[Row | BadRow]:
    with _readable(path) as file:
        value = _parse_json(file.read().removeprefix(codecs.BOM_UTF8))
    if isinstance(value, list):
        return numbered(value, path.name)
    raise DataError(f"{path} is no JSON array: {value}", "correct the file, or write one object per line")


def _from_lines(path: Path) -> Iterator[Row | BadRow]:
    """One object per line. Only a newline ends a line: U+2028 may stand inside a JSON string."""
    with _readable(path) as file:
        for number, line in enumerate(file, start=1):
            content = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).removesuffix(b"\n")
            if content.strip():
                yield _json_row(content, f"{path.name}:{number}")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as failure:
        raise DataError(f"cannot read {path}: {failure.strerror}", "check the file's permissions") from None


def _json_row(line: bytes, origin: str) -> Row | BadRow:
    value = _parse_json(line)
    if isinstance(value, _NotJson):
        return BadRow(origin, str(value))
    if not isinstance(value, dict):
        return BadRow(origin, f"a {type(value).__name__}, not an object with columns")
    return Row(value, origin)


class _NotJson(str):
    """Why a text is not the JSON that a dataset may hold."""

    __slots__ = ()


def _parse_json(content: bytes) -> Any:
    """The value of a JSON text, or why there is none."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
        if b"\\u" in content:
            # An escaped half of a surrogate pair is no character: tokenizers and files refuse it.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as failure:
        return _NotJson(f"not UTF-8 ({failure.reason} at byte {failure.start})")
    except UnicodeEncodeError as failure:
        return _NotJson(f"not JSON (\\u{ord(failure.object[failure.start]):04x} is half a character)")
    except json.JSONDecodeError as failure:
        return _NotJson(f"not JSON ({failure.msg} at {_place(failure)})")
    except RecursionError:
        return _NotJson("not JSON (nested too deep)")
    except ValueError as failure:
        return _NotJson(f"not JSON ({str(failure).partition(';')[0]})")
    return value


def _place(failure: json.JSONDecodeError) -> str:
    line = f"line {failure.lineno} " if failure.lineno > 1 else ""
    return f"{line}column {failure.colno}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key `{next(name for name in names if names.count(name) > 1)}` stands twice")
    return values


def _from_parquet(path: Path) -> Iterator[Row | BadRow]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=ROWS_AT_A_TIME)
            yield from number_rows((row for batch in batches for row in batch.to_pylist()), path.name)
    except (ArrowException, OSError) as failure:
        raise DataError(f"cannot read {path}: {first_line(failure)}", "give a Parquet file") from None


def _from_datasets_folder(path: Path, split: str) -> Iterator[Row | BadRow]:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError) as failure:
        raise DataError(
            f"cannot read the dataset folder {path}: {first_line(failure)}",
            "give a folder written by `Dataset.save_to_disk`, or a .jsonl or .parquet file",
        ) from None
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
    # Rows to train on may have any name; what is asked for to evaluate on is never anything else.
    if split not in splits and split != "train":
        raise DataError(
            f"the dataset folder {path} has no split `{split}`; it has: {', '.join(splits)}",
            "give a folder written by `DatasetDict.save_to_disk` that has one",
        )
    return number_rows(splits.get(split, next(iter(splits.values()))), path.name)


def read_hub(name: str, split: str, config: str | None = None) -> list[Row | BadRow]:
    """The rows of a split of a dataset on the hub.

    Raises:
        DataError: it cannot be had (no network, no such dataset or split).
    """
    return list(iterate_hub(name, split, config, streaming=False))


def iterate_hub(name: str, split: str, config: str | None = None, *, streaming: bool = True) -> Iterator[Row | BadRow]:
    """What `read_hub` returns; with ``streaming`` nothing is downloaded before it is asked for.

    Raises:
        DataError: see `read_hub`.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split, streaming=streaming)
        yield from number_rows(rows, f"{name}/{split}")
    except Exception as failure:  # the boundary: the hub client raises whatever its transports raise
        raise DataError(
            f"cannot load the dataset `{name}` (split {split}): {first_line(failure)}",
            "check the name and the network, or give a local file with `--dataset FILE.jsonl`",
        ) from None


def numbered(rows: Iterable[Any], name: str) -> list[Row | BadRow]:
    """Rows with ``name:number`` as their origin, counted from 1; what has an origin already keeps it."""
    return list(number_rows(rows, name))


def number_rows(rows: Iterable[Any], name: str) -> Iterator[Row | BadRow]:
    """What `numbered` returns, one by one."""
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Row | BadRow):
            yield row
        elif isinstance(row, Mapping):
            yield Row(row, f"{name}:{number}")
        else:
            yield BadRow(f"{name}:{number}", f"a {type(row).__name__}, not columns")
