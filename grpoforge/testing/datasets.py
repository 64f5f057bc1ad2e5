"""What a dataset promises: rows with text keys, the same every time, and splits that share no row."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from grpoforge.sources import BadRow, Row
from grpoforge.testing.general import deterministic, quick, travels
from grpoforge.testing.kit import Broken, NotApplicable, Refused, Rule, Subject, foreign, rule

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class DatasetSubject(Subject):
    """A dataset, asked for its splits."""

    seconds: ClassVar[float] = 60.0

    def question(self) -> tuple[str, ...]:
        return tuple(self.declared("splits", ("train", "test")))

    def answer(self, built: Any, question: Sequence[str]) -> list[list[Mapping[str, Any]]]:
        """The rows of each split.

        Raises:
            NotApplicable: the dataset says that it cannot be had here: no network, no file.
        """
        splits = []
        for split in question:
            try:
                with foreign():
                    splits.append([_columns_of(row, split, number) for number, row in enumerate(built(split))])
            except Refused as refusal:
                raise NotApplicable(str(refusal)) from refusal
        return splits

    def splits(self) -> dict[str, Rows]:
        """The rows of every split, by its name."""
        return dict(zip(self.question(), self.ask(), strict=True))


def _columns_of(row: Any, split: str, number: int) -> Any:
    if isinstance(row, BadRow):
        raise Broken(f"`{split}` row {number} ({row.origin}) cannot be used: {row.reason}")
    return row.columns if isinstance(row, Row) else row


@rule("return a list of dicts, with column names as keys, for `train` and for every other split", decisive=True)
def returns(subject: DatasetSubject) -> str:
    """Every split has rows, and a row is a dict whose keys are text."""
    sizes = []
    for split, rows in subject.splits().items():
        if not rows:
            raise Broken(f"`{split}` has no rows")
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
                raise Broken(f"`{split}` row {number} is a {type(row).__name__}, not a dict with text keys")
        sizes.append(f"{len(rows)} to {split}")
    return ", ".join(sizes)


@rule("give every row every column; where there is no value, None says so")
def columns(subject: DatasetSubject) -> str:
    """Every row of every split has the same columns, and one of them is text to ask."""
    splits = subject.splits()
    first = splits["train"][0]
    for split, rows in splits.items():
        for number, row in enumerate(rows):
            if set(row) != set(first):
                raise Broken(f"`{split}` row {number} has {sorted(row)}, row 0 of `train` {sorted(first)}")
    if not any(isinstance(value, str) and value.strip() for value in first.values()):
        raise Broken("no column of the first row is text")
    return ", ".join(sorted(first))


@rule("make the splits from different material, or divide one list by its index")
def splits_apart(subject: DatasetSubject) -> str:
    """No row of a split is in another one: what is measured was not trained on."""
    splits = {split: [_key(row) for row in rows] for split, rows in subject.splits().items()}
    for earlier, later in itertools.combinations(splits, 2):
        seen = set(splits[earlier])
        both = sum(key in seen for key in splits[later])
        if both:
            raise Broken(f"{both} of {len(splits[later])} rows of `{later}` are in `{earlier}` too")
    train = splits["train"]
    repeats = sum(count - 1 for count in Counter(train).values())
    return f"nothing in common; {repeats} of {len(train)} rows of `train` repeat another"


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row), sort_keys=True, default=repr)


RULES: tuple[Rule[DatasetSubject], ...] = (travels, returns, columns, deterministic, splits_apart, quick)
