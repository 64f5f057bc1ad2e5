"""Outcomes as a Parquet file, one row per problem, that anybody can read; and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpoforge.errors import ConfigError, DataError, RunFailed, first_line
from grpoforge.outcomes import VERDICTS, Outcome
from grpoforge.sanitize import sanitize

ABOUT = b"grpoforge"
"""Key of the file's metadata: what was measured and how, as JSON."""
GREEDY = "greedy_"


def check_output(path: Path) -> None:
    """Refuse, before anything is measured, a file that cannot be written.

    Raises:
        ConfigError: another ending than ``.parquet``, a folder of that name, or no folder to put it in.
    """
    if path.suffix != ".parquet":
        raise ConfigError(f"`--output {path}` is no Parquet file", f"call it `{path}.parquet`")
    if path.is_dir():
        raise ConfigError(f"`--output {path}` is a folder", "name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"`--output {path}`: there is no folder {path.parent}", "make it, or name another file")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"`--output {path}`: nothing can be written to {path.parent}", "name another file")


def write_results(path: Path, outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> None:
    """Write ``outcomes`` to ``path``, which is whole or, when that fails, what it was.

    Text is made safe to show, as in the rollouts of a run.

    Raises:
        RunFailed: the disk refuses.
    """
    import pyarrow
    from pyarrow import parquet

    schema = _schema(pyarrow).with_metadata({ABOUT: json.dumps(about).encode()})
    table = pyarrow.Table.from_pylist([_row(outcome) for outcome in outcomes], schema=schema)
    unfinished = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        parquet.write_table(table, unfinished, compression="zstd")
        unfinished.replace(path)
    except OSError as error:
        raise RunFailed(
            f"{path} could not be written: {error.strerror or error}", "check the disk, or choose another `--output`"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_results(path: Path) -> tuple[tuple[Outcome, ...], dict[str, Any]]:
    """The outcomes in the file that `write_results` wrote, by number, and what was said about them.

    Raises:
        DataError: the file is missing, damaged, or another kind of file.
    """
    import pyarrow
    from pyarrow import parquet

    if not path.is_file():
        raise DataError(
            f"there are no results at {path}", "write some with `grpoforge eval MODEL --output FILE.parquet`"
        )
    try:
        table = parquet.read_table(path)
        about = dict(json.loads((table.schema.metadata or {})[ABOUT]))
        outcomes = [_outcome(row) for row in table.to_pylist()]
        if len({len(outcome.samples) for outcome in outcomes}) > 1:
            raise ValueError("the problems have not equally many samples")
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as failure:
        raise DataError(
            f"{path} holds no results of `grpoforge eval`: {type(failure).__name__}: {first_line(failure)}",
            "give a file that `grpoforge eval MODEL --output FILE.parquet` wrote",
        ) from failure
    return tuple(sorted(outcomes, key=lambda outcome: outcome.index)), about


def _row(outcome: Outcome) -> dict[str, Any]:
    values: dict[str, Any] = _shown(asdict(outcome))
    greedy = values.pop("greedy")
    del greedy["temperature"]  # it has no say in what is most probable
    return values | {GREEDY + name: value for name, value in greedy.items()}


def _shown(value: Any) -> Any:
    """``value`` with every text in it made safe to show."""
    if isinstance(value, str):
        return sanitize(value)
    if isinstance(value, Mapping):
        return {name: _shown(one) for name, one in value.items()}
    return [_shown(one) for one in value] if isinstance(value, list | tuple) else value


def _outcome(row: Mapping[str, Any]) -> Outcome:
    greedy = {name.removeprefix(GREEDY): value for name, value in row.items() if name.startswith(GREEDY)}
    rest = {name: value for name, value in row.items() if not name.startswith(GREEDY)}
    outcome = Outcome.from_dict({**rest, "greedy": {**greedy, "temperature": 1.0}})
    for one in (outcome.greedy, *outcome.samples):
        if one.verdict not in VERDICTS:
            raise ValueError(f"`{one.verdict}` is no verdict")
    return outcome


def _schema(pyarrow: Any) -> Any:
    # Stated, not inferred: a column of nothing but nulls, or of no samples, would be inferred as another type.
    text, number = pyarrow.string(), pyarrow.int64()
    attempt = [("completion", text), ("answer", text), ("verdict", text), ("num_tokens", number)]
    attempt.append(("finish_reason", text))
    columns = [("index", number), *((name, text) for name in ("origin", "problem", "question", "gold"))]
    columns += [(GREEDY + name, kind) for name, kind in attempt]
    sample = pyarrow.struct([*attempt, ("temperature", pyarrow.float64())])
    return pyarrow.schema([*columns, ("samples", pyarrow.list_(sample))])
