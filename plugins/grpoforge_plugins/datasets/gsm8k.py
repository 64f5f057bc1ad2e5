"""GSM8K (2110.14168): grade-school word problems with worked solutions, from the hub or from local files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from grpoforge.declarations import declares
from grpoforge.errors import ConfigError, DataError
from grpoforge.sources import BadRow, Row, number_rows, read_hub, read_path
from grpoforge_plugins.rewards.answers import parse_number

__all__ = ["gsm8k", "prepare_for_grpo"]

HUB_ID = "openai/gsm8k"
MARKER = "####"


@declares(splits=("train", "validation", "test"))
def gsm8k(
    split: Literal["train", "validation", "test"],
    *,
    path: Annotated[str | None, "file or folder to read instead of the hub"] = None,
    config: Annotated[Literal["main", "socratic"], "of the hub's dataset: how solutions are worked"] = "main",
    num_validation: Annotated[int, "training problems set aside to evaluate on while training"] = 512,
    split_seed: Annotated[int, "sets others aside"] = 0,
) -> list[Row | BadRow]:
    """GSM8K as question, worked solution and final answer; only `grpoforge eval` reads the test split.

    A local `path` is a folder with `train*.jsonl` and `test*.jsonl` (or Parquet), a folder saved by `datasets`, or a
    file, which holds training problems. `validation` is `num_validation` of the training problems, the others are
    `train`. Which ones is decided by `split_seed` and the question alone: the order and the format of the rows change
    nothing. A row without a final answer is in `train`, where it is refused by file and line.
    """
    if split == "test":
        return prepare_for_grpo(_read(path, config, "test"))
    rows = prepare_for_grpo(_read(path, config, "train"))
    held = _set_aside(rows, num_validation, split_seed)
    return [row for index, row in enumerate(rows) if (index in held) == (split == "validation")]


def prepare_for_grpo(rows: Iterable[Mapping[str, Any] | Row | BadRow], *, source: str = "row") -> list[Row | BadRow]:
    """Each problem with its reference solution and its final answer.

    Columns: ``question``; ``solution``, as written, calculator annotations ``<<48/2=24>>`` and all; ``answer``, the
    number after ``####`` in plain digits (``1,080`` is ``1080``, ``$3.50`` is ``3.5``, ``1/3`` stays).

    Args:
        rows: GSM8K's: ``question``, and ``answer`` with the solution that ends in ``#### 72``.
        source: what plain mappings are called in messages: ``source:17``.

    Returns:
        As many rows as there are, in order. One without a question or a readable final answer is a `BadRow` that says
        where it stands and why: the program stops there, or leaves it out with ``data.skip_bad_rows``.
    """
    return [_prepared(row) for row in number_rows(rows, source)]


def _prepared(row: Row | BadRow) -> Row | BadRow:
    if isinstance(row, BadRow):
        return row
    for name in ("question", "answer"):
        value = row.columns.get(name)
        if not isinstance(value, str) or not value.strip():
            return BadRow(row.origin, f"column `{name}` is {_shown(value)}, not text")
    solution = row.columns["answer"]
    _, marker, final = solution.rpartition(MARKER)
    if not marker:
        return BadRow(
            row.origin, f"column `answer` has no `{MARKER}` before a final answer: it ends in {_shown(final[-30:])}"
        )
    number = parse_number(final.strip())
    if number is None:
        return BadRow(row.origin, f"the final answer after `{MARKER}` is {_shown(final.strip())}, not a number")
    columns = {"question": row.columns["question"], "solution": solution, "answer": plain_number(number)}
    return Row(columns, row.origin)


def plain_number(number: Fraction) -> str:
    """``number`` in digits: as a decimal of at most six places where that is exact, else as a fraction."""
    for places in range(7):
        scaled = number * 10**places
        if scaled.denominator == 1:
            digits = str(abs(scaled.numerator)).rjust(places + 1, "0")
            sign = "-" if number < 0 else ""
            return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)
    return f"{number.numerator}/{number.denominator}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _set_aside(rows: list[Row | BadRow], count: int, seed: int) -> set[int]:
    """The indices of the ``count`` rows whose questions have the smallest digests under ``seed``.

    Raises:
        ConfigError: ``count`` leaves nothing to train on, or nothing to evaluate on.
    """
    ranked = sorted(
        (hashlib.sha256(f"{seed}\n{row.columns['question']}".encode()).digest(), index)
        for index, row in enumerate(rows)
        if isinstance(row, Row)
    )
    if ranked and not 1 <= count < len(ranked):
        raise ConfigError(
            f"option `num_validation` of dataset `gsm8k` is {count}, and there are {len(ranked)} training problems",
            f"use at least 1 and less than {len(ranked)}",
        )
    return {index for _, index in ranked[:count]}


def _read(path: str | None, config: str, split: str) -> list[Row | BadRow]:
    if path is None:
        return _read_hub(split, config)
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        return _read_file(path, split)
    for place in (folder, folder / config):
        for ending in (".jsonl", ".parquet"):
            if files := sorted(place.glob(f"{split}*{ending}")):
                return [row for file in files for row in read_path(str(file))]
    return read_path(path, split)


def _read_hub(split: str, config: str) -> list[Row | BadRow]:
    try:
        return read_hub(HUB_ID, split, config)
    except DataError as error:
        hint = "check the network, or name a local folder with `--set data.options.path=FOLDER`"
        raise DataError(error.message, hint) from None


def _read_file(path: str, split: str) -> list[Row | BadRow]:
    if split == "test" and os.path.exists(os.path.expanduser(path)):
        raise DataError(
            f"option `path` of dataset `gsm8k` is the file {path}, which holds training problems and no test split",
            "name the folder that holds both, or the test file: `--dataset test.jsonl`",
        )
    return read_path(path)
