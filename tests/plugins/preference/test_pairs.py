"""Pairs from files and from rollouts, and the buffer that keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpoforge.errors import DataError
from grpoforge_plugins.preference.buffer import Buffer
from grpoforge_plugins.preference.pairs import Pair, pairs_of_rollouts, read_pairs, write_pairs

GOOD = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
NAN = float("nan")


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any) -> Path:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pairs = [Pair("p", "c\n1", "r"), Pair("", "é", "", margin=0.5, kind="shorter")]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    read = read_pairs(tmp_path / "pairs.jsonl")
    assert [(one.prompt, one.chosen, one.rejected, one.margin, one.kind) for one in read] == [
        ("p", "c\n1", "r", 0.0, ""),
        ("", "é", "", 0.5, "shorter"),
    ]
    assert [one.origin for one in read] == ["pairs.jsonl:1", "pairs.jsonl:2"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "p", "chosen": "c"}, "column `rejected` is missing"),
        (GOOD | {"chosen": 4}, "column `chosen` is 4, not text"),
        (GOOD | {"rejected": "4"}, "`chosen` and `rejected` are the same text, '4'"),
        (GOOD | {"margin": -1}, "column `margin` is -1, not a number of at least 0"),
        (GOOD | {"margin": "0.5"}, "column `margin` is '0.5', not a number of at least 0"),
        (GOOD | {"kind": 3}, "column `kind` is 3, not text"),
        ("{not json", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[1]", "a list, not an object with columns"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(file: Callable[..., Path], row: Any, complaint: str) -> None:
    with pytest.raises(DataError) as refused:
        read_pairs(file(GOOD, row, GOOD))
    assert refused.value.message == f"pairs.jsonl:2: {complaint}"
    assert refused.value.hint == "a pair has the texts prompt, chosen and rejected, the last two unlike"


def test_a_file_that_is_missing_or_empty_is_refused(tmp_path: Path, file: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="there is no pairs file"):
        read_pairs(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="is empty"):
        read_pairs(file())


def texts(pairs: list[Pair]) -> list[tuple[str, str, float]]:
    return [(pair.chosen, pair.rejected, pytest.approx(pair.margin)) for pair in pairs]


def test_of_a_group_the_best_and_the_worst_are_a_pair(make_rollouts: Any) -> None:
    # Letters: token 2 is a, 3 is b, ... Rewards 0.2, 0.9, 0.1 and one row that nothing scored.
    rollouts = make_rollouts([[5], [6]], [[[2], [3], [4], [5]], [[2], [2], [3], [3]]])
    totals = torch.tensor([[0.2, 0.9, 0.1, NAN], [0.5, 0.5, 0.5, 0.55]], dtype=torch.float64)
    assert texts(pairs_of_rollouts(rollouts, totals, 0.1)) == [("b", "c", 0.8)]
    assert texts(pairs_of_rollouts(rollouts, totals, 0.05)) == [("b", "c", 0.8), ("b", "a", 0.05)]
    # At a threshold of 0 equal rewards still say nothing.
    assert pairs_of_rollouts(rollouts, torch.ones(2, 4), 0.0) == []
    assert pairs_of_rollouts(rollouts, torch.full((2, 4), NAN), 0.0) == []


def test_at_two_temperatures_neighbors_are_pairs(make_rollouts: Any) -> None:
    heat = [[0.7, 1.3, 0.7, 1.3]]
    rollouts = make_rollouts([[5]], [[[2], [3], [4], [5]]], heat)
    totals = torch.tensor([[0.0, 1.0, 0.8, 0.75]], dtype=torch.float64)
    assert texts(pairs_of_rollouts(rollouts, totals, 0.1)) == [("b", "a", 1.0)]
    assert texts(pairs_of_rollouts(rollouts, totals, 0.01)) == [("b", "a", 1.0), ("c", "d", 0.05)]
    unscored = torch.tensor([[NAN, 1.0, 0.8, 0.2]], dtype=torch.float64)
    assert texts(pairs_of_rollouts(rollouts, unscored, 0.1)) == [("c", "d", 0.6)]


def test_two_completions_of_one_text_are_no_pair(make_rollouts: Any) -> None:
    rollouts = make_rollouts([[5]], [[[2, 3], [2, 3]]])
    assert pairs_of_rollouts(rollouts, torch.tensor([[0.0, 1.0]]), 0.1) == []


def test_the_buffer_forgets_the_oldest_and_draws_by_seed_and_number() -> None:
    pairs = [Pair("p", str(number), "r", margin=number / 10) for number in range(10)]
    buffer = Buffer(6, seed=3)
    buffer.add(pairs[:4])
    buffer.add(pairs[4:])
    assert [pair.chosen for pair in buffer.pairs] == ["4", "5", "6", "7", "8", "9"]
    drawn = [[pair.chosen for pair in buffer.draw(4, number)] for number in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1] and len(set(drawn[0])) == 4
    again, other = Buffer(6, seed=3), Buffer(6, seed=4)
    for one in (again, other):
        one.load(json.loads(json.dumps(buffer.rows())))
    assert again.pairs == buffer.pairs
    assert again.draw(4, 1) == buffer.draw(4, 1) != other.draw(4, 1)
    assert len(buffer.draw(99, 1)) == 6
