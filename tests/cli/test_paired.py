"""Paired sampling by the real command line: what it draws, measures, stacks on and refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet


@pytest.fixture
def run(cli: Callable[..., Any], small: Sequence[str], tmp_path: Path) -> Path:
    """A finished run of two steps of two pairs each."""
    flags = ("--set", "trackers=[{name: jsonl}, {name: rollouts}]", "--set", "sampler.num_sample_pairs=2")
    said = cli("train", "tiny-math", "paired", *small, *flags, "--output", "run")
    assert said.code == 0, said.err
    return tmp_path / "run"


def test_it_reports_its_pairs_and_its_temperatures(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    names = {"paired/gap_mean", "paired/tie_ratio", "paired/win_rate_cold", "reward_T/0.7/mean", "reward_T/1.3/mean"}
    assert len(steps) == 2 and all(names <= set(step) for step in steps)
    assert steps[0]["invariant/ratio_dev_step0"] < 1e-5 and steps[0]["invariant/kl_step0"] < 1e-5
    for step in steps:
        assert step["reward"] == pytest.approx((step["reward_T/0.7/mean"] + step["reward_T/1.3/mean"]) / 2)


def test_the_rollouts_are_cold_and_hot_in_turn_and_their_shares_add_up(run: Path) -> None:
    for file in sorted((run / "rollouts").glob("*.parquet")):
        rows = parquet.read_table(file).to_pylist()
        assert [row["temperature"] for row in rows] == [0.7, 1.3] * 2
        assert [row["prompt_index"] for row in rows[0::2]] == [row["prompt_index"] for row in rows[1::2]]
        for cold, hot in zip(rows[0::2], rows[1::2], strict=True):
            gap = sum(cold[f"{name}/weighted"] - hot[f"{name}/weighted"] for name in ("math", "brevity"))
            expected = gap / 2 if abs(gap) >= 0.1 else 0.0
            assert cold["advantage"] == pytest.approx(expected, abs=1e-12) == -hot["advantage"]
            assert math.fsum(cold[f"{name}/share"] for name in ("math", "brevity")) == pytest.approx(
                expected, abs=1e-12
            )


def test_its_evaluation_samples_in_pairs(cli: Callable[..., Any], run: Path, small: Sequence[str]) -> None:
    said = cli("eval", "run", "--num-problems", "2", "--samples", "2", "--json")
    assert said.code == 0, said.err
    assert {"eval_pass@1", "eval_mean@2"} <= set(json.loads(said.out)["metrics"])
    said = cli("eval", "run", "--num-problems", "2", "--samples", "3")
    assert said.code == 2 and said.out == ""
    message, _, hint = said.err.partition("error: ")[2].rstrip("\n").partition("\nhint: ")
    assert message == ("`eval.samples` is 3 (from --samples), and sampler `paired` draws 2 completions at a time")
    assert hint == "use 2 or 4"


def test_another_batch_needs_another_number_of_pairs(refused: Callable[..., tuple[str, str]]) -> None:
    message, hint = refused(
        "train", "tiny-math", "paired", "--set", "batch.prompts_per_step=32", "--set", "batch.minibatch_size=64"
    )
    assert message == (
        "sampler option `num_sample_pairs` is 64, and a step of 32 prompts x 2 completions has 32 pairs "
        "(from recipe paired)"
    )
    assert hint.startswith("use `--set sampler.num_sample_pairs=32`")


def test_it_stacks_on_a_task_and_another_advantage_may_take_its_place(cli: Callable[..., Any]) -> None:
    said = cli("train", "tiny-math", "paired", "--dry-run")
    assert said.code == 0, said.err
    assert "64 prompts x 2 completions" in said.out + said.err
    said = cli("train", "tiny-math", "paired", "--advantage", "group", "--dry-run")
    assert said.code == 0, said.err
    assert "with 2 completions per prompt advantage `group` keeps only the sign of their gap in reward" in said.err
