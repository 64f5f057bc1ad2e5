"""A reward file written for TRL works unchanged: ``--reward ./rewards.py:my_func:0.5``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

FIXTURE = Path(__file__).parents[1] / "fixtures" / "rewards" / "trl_style.py"
ROWS = [{"question": f"What is {n}+1?", "answer": str(n + 1), "level": "hard" if n % 4 else "easy"} for n in range(8)]


@pytest.fixture
def metrics(
    cli: Callable[..., Any], small: Sequence[str], dataset: Callable[..., str], tmp_path: Path
) -> Callable[..., list[dict[str, Any]]]:
    """Trains two steps with these flags; returns the recorded metrics of the steps."""
    shutil.copy(FIXTURE, tmp_path / "rewards.py")
    dataset(*ROWS)

    def train(*flags: str, name: str = "run") -> list[dict[str, Any]]:
        said = cli("train", "--dataset", "train.jsonl", *small, *flags, "--output", name)
        assert said.code == 0, said.err
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [step for step in map(json.loads, lines) if "reward" in step]

    return train


def test_a_function_with_columns_that_abstains_on_some_rows(metrics: Callable[..., Any], tmp_path: Path) -> None:
    steps = metrics("--reward", "./rewards.py:my_func:0.5", "--reward", "math")
    assert len(steps) == 2
    for step in steps:
        assert step["rewards/my_func/unscored"] in (0.0, 0.5, 1.0)
        assert "rewards/math/mean" in step
    assert any(step["rewards/my_func/unscored"] > 0 for step in steps)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["rewards"][0]["name"] == f"{tmp_path}/rewards.py:my_func"
    assert run["config"]["rewards"][0]["weight"] == 0.5


@pytest.mark.parametrize("function", ["my_async_func", "without_kwargs"])
def test_other_forms(metrics: Callable[..., Any], function: str) -> None:
    steps = metrics("--reward", f"./rewards.py:{function}", "--set", "eval.reward=")
    assert [step[f"rewards/{function}/unscored"] for step in steps] == [0.0, 0.0]


def test_a_reward_that_seeds_everything_and_prints_changes_no_sample(
    metrics: Callable[..., Any], tmp_path: Path
) -> None:
    """Sampling has seeds of its own: global generators do not reach the trajectory."""
    (tmp_path / "rewards.py").write_text(
        "import random, torch\n"
        "def quiet(completions):\n    return [float(len(text)) for text in completions]\n"
        "def loud(completions):\n    torch.manual_seed(1); random.seed(1); torch.rand(5); print('loud')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    quiet = metrics("--reward", "./rewards.py:quiet", name="quiet")
    loud = metrics("--reward", "./rewards.py:loud", name="loud")
    for one, other in zip(quiet, loud, strict=True):
        for key in ("reward", "loss", "grad_norm", "completions/mean_length"):
            assert one[key] == other[key], key
