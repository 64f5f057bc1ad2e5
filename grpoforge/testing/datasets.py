"""What a dataset promises: rows with text keys, the same every time, and a test split of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from grpoforge.testing.general import deterministic, quick, travels
from grpoforge.testing.kit import Broken, NotApplicable, Refused, Rule, Subject, foreign, rule

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class DatasetSubject(Subject):
    """A dataset, asked for its two splits."""

    seconds: ClassVar[float] = 60.0

    def question(self) -> tuple[str, ...]:
        return ("train", "test")

    def answer(self, built: Any, question: Sequence[str]) -> list[list[Mapping[str, Any]]]:
        splits = []
        for split in question:
            with foreign():
                splits.append(list(built(split)))
        return splits

    def splits(self) -> tuple[Rows, Rows]:
        """Rows to train and to test on.

        Raises:
            NotApplicable: the dataset says that it cannot be had here: no network, no file.
        """
        try:
            train, test = self.ask()
        except Refused as refusal:
            raise NotApplicable(str(refusal)) from refusal
        return train, test


@rule("return a list of dicts, with column names as keys, for `train` and for `test`", decisive=True)
def returns(subject: DatasetSubject) -> str:
    """Both splits have rows, and a row is a dict whose keys are text."""
    sizes = []
    for split, rows in zip(subject.question(), subject.splits(), strict=True):
        if not rows:
            raise Broken(f"`{split}` has no rows")
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
                raise Broken(f"`{split}` row {number} is a {type(row).__name__}, not a dict with text keys")
        sizes.append(f"{len(rows)} to {split}")
    return ", ".join(sizes)


@rule("give every row every column; where there is no value, None says so")
def columns(subject: DatasetSubject) -> str:
    """Every row of both splits has the same columns, and one of them is text to ask."""
    train, test = subject.splits()
    expected = set(train[0])
    for split, rows in (("train", train), ("test", test)):
        for number, row in enumerate(rows):
            if set(row) != expected:
                raise Broken(f"`{split}` row {number} has {sorted(row)}, row 0 of `train` {sorted(expected)}")
    if not any(isinstance(value, str) and value.strip() for value in train[0].values()):
        raise Broken("no column of the first row is text")
    return ", ".join(sorted(expected))


@rule("make the splits from different material, or divide one list by its index")
def splits_apart(subject: DatasetSubject) -> str:
    """No row of `test` is in `train`: what is measured was not trained on."""
    train, test = subject.splits()
    seen = {_key(row) for row in train}
    both = sum(_key(row) in seen for row in test)
    if both:
        raise Broken(f"{both} of {len(test)} rows of `test` are in `train` too")
    repeats = sum(count - 1 for count in Counter(map(_key, train)).values())
    return f"nothing in common; {repeats} of {len(train)} rows of `train` repeat another"


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row), sort_keys=True, default=repr)


RULES: tuple[Rule[DatasetSubject], ...] = (returns, columns, deterministic, splits_apart, travels, quick)
