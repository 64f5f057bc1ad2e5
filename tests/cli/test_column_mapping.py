"""Any dataset by the names of its columns, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from grpoforge.cli.main import _spread_settings
from grpoforge.yaml_source import parse_yaml

ROWS = [{"problem": f"What is {n}+1?", "gold": n + 1, "answer": "see gold"} for n in range(12)]
MAPPING = ("--set", "data.prompt=problem", "data.answer=gold")


def test_a_plan(cli: Callable[..., Any], dataset: Callable[..., str], small: Sequence[str]) -> None:
    said = cli("train", "--dataset", dataset(*ROWS), *MAPPING, *small, "--dry-run")
    assert said.code == 0, said.err
    data = parse_yaml(said.out, "the plan")["data"]
    assert (data["prompt"], data["answer"]) == ("problem", "gold")
    assert "# data          10 problems to train on, 2 to evaluate on" in said.out


def test_a_step_is_rewarded_by_the_named_column(
    cli: Callable[..., Any], dataset: Callable[..., str], small: Sequence[str], tmp_path: Path
) -> None:
    said = cli(
        *("train", "--dataset", dataset(*ROWS), *MAPPING, *small, "--max-steps", "1", "--output", "run"),
        *("--set", "trackers=[{name: jsonl},{name: rollouts}]", "sampler.max_completion_length=32"),
    )
    assert said.code == 0, said.err
    rollouts = parquet.read_table(tmp_path / "run/rollouts/step-000001.parquet").to_pylist()
    assert len(rollouts) == 4
    for row in rollouts:
        columns = json.loads(row["columns"])
        assert columns["answer"] == columns["gold"]
        assert columns["problem"] in row["prompt"]
        # `see gold` is no number, so a reward that read the old column would have scored nothing.
        assert row["math/raw"] in (0.0, 1.0)


def test_without_the_mapping_it_is_said_what_is_missing(
    refused: Callable[..., tuple[str, str]], dataset: Callable[..., str]
) -> None:
    message, hint = refused("train", "--dataset", dataset(*ROWS), "--set", "data.prompt=problm", "data.answer=gold")
    assert message == "train.jsonl has no column `problm`; it has: answer, gold, problem"
    assert hint == "did you mean `problem`?; rename one with `--set data.rename.OLD=problm`"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("train --set a.b=1 c.d=2 e=3", "train --set a.b=1 --set c.d=2 --set e=3"),
        ("train -s a=1 b=2 --seed 1", "train -s a=1 --set b=2 --seed 1"),
        ("train --set a=1 --set b=2", "train --set a=1 --set b=2"),
        ("train --set a=1 recipe.yaml", "train --set a=1 recipe.yaml"),
        ("eval --set a=1 runs/x=1", "eval --set a=1 runs/x=1"),
        ("eval --reward a=b c=d", "eval --reward a=b c=d"),
        ("train --set", "train --set"),
    ],
)
def test_several_settings_may_follow_one_flag(given: str, meant: str) -> None:
    assert _spread_settings(given.split()) == meant.split()
