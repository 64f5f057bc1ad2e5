"""Whole runs, small: the embedded model, a handful of problems, two prompts per step."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet

from grpoforge.config import Config
from grpoforge.layers import build
from grpoforge.yaml_source import read_recipe
from grpoforge_plugins.datasets.tiny_math import tiny_math

REWARDS = '''
import random


def digits(completions):
    """Share of the characters that are digits: differs between completions, so there is always a gradient."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def constant(completions):
    return [0.5] * len(completions)


class Drifting:
    """A reward that remembers and rolls dice: only right after resuming when both are restored."""

    def __init__(self, *, rate: float = 0.1):
        self.rate, self.num_calls = rate, 0

    def __call__(self, completions):
        self.num_calls += 1
        dice = [random.random() for _ in completions]
        return [score * (1 + self.rate * self.num_calls) + die for score, die in zip(digits(completions), dice)]

    def state_dict(self):
        return {"num_calls": self.num_calls}

    def load_state_dict(self, state):
        self.num_calls = state["num_calls"]
'''

TIMES = {"step_time", "tokens_per_second", "mem/peak_gb"}


@dataclass(frozen=True)
class Outcome:
    """What must be equal between a run that was interrupted and one that was not."""

    weights: str
    """sha256 of the newest checkpoint's weights."""
    metrics: list[dict[str, Any]]
    """Every line but for times."""
    rollouts: dict[str, str]

    @classmethod
    def of(cls, run: Path) -> Outcome:
        newest = max((run / "checkpoints").glob("step-*"))
        (weights,) = newest.glob("*model*.safetensors")
        return cls(
            weights=hashlib.sha256(weights.read_bytes()).hexdigest(),
            metrics=[_without_times(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()],
            # As text: NaN equals itself there.
            rollouts={
                file.name: repr(parquet.read_table(file).to_pylist()) for file in (run / "rollouts").glob("*.parquet")
            },
        )


def _without_times(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in metrics.items()
        if name not in TIMES and not name.startswith("time/") and not name.endswith("/seconds")
    }


@pytest.fixture
def outcome() -> Callable[[Path], Outcome]:
    return Outcome.of


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing for real takes most of the time and shows nothing unless the power fails."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def rewards_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the rewards `digits`, `constant` and `Drifting`."""
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 problems."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_math("train")[:24]))
    return path


@pytest.fixture(scope="session")
def values(problems: Path, rewards_file: Path) -> dict[str, Any]:
    """A run of six steps over two passes of four minibatches; to be laid over the recipe `tiny-math`."""
    return {
        "data": {"dataset": str(problems), "num_eval": 4},
        "rewards": [{"name": f"{rewards_file}:digits"}],
        "eval": {"every": 2, "reward": None, "metric": "eval_reward"},
        "batch": {
            "prompts_per_step": 2,
            "completions_per_prompt": 3,
            "minibatch_size": 3,
            "micro_batch_size": 2,
            "epochs": 2,
        },
        "sampler": {"max_completion_length": 16},
        "kl": {"beta": 0.0},
        "max_steps": 6,
        "checkpoint": {"every": 1, "keep_last": 10},
        "trackers": [{"name": "jsonl"}, {"name": "rollouts"}],
    }


@pytest.fixture(scope="session")
def config(values: dict[str, Any]) -> Callable[..., Config]:
    """`config({"kl": {"beta": 0.1}}, ...)`: the small run with changes."""

    def make(*changes: dict[str, Any]) -> Config:
        layers = [("recipe", read_recipe("tiny-math")), ("small", values), *(("change", one) for one in changes)]
        return build(layers)

    return make


@pytest.fixture
def stop_after(tmp_path: Path) -> Callable[[int], dict[str, Any]]:
    """`stop_after(3)`: the change that sends the process SIGINT, once, when step 3 is finished."""

    def make(step: int, signal: str = "SIGINT") -> dict[str, Any]:
        plugin = tmp_path / f"stop_after_{step}.py"
        plugin.write_text(
            "import os, signal\nfrom pathlib import Path\nfrom grpoforge import hookimpl\n\n"
            "done = Path(__file__).with_suffix('.done')\n\n\n"
            "@hookimpl\ndef step_finished(report):\n"
            f"    if report.step == {step} and not done.exists():\n"
            f"        done.touch()\n        os.kill(os.getpid(), signal.{signal})\n"
        )
        return {"plugins": [str(plugin)]}

    return make


@dataclass(frozen=True)
class Program:
    """The real command line in a process of its own."""

    folder: Path
    values: Mapping[str, Any]

    def start(self, *arguments: str, changes: Sequence[Mapping[str, Any]] = (), **env: str) -> subprocess.Popen[str]:
        """`grpoforge train run.yaml --output run ARGUMENTS`."""
        merged: dict[str, Any] = {"recipe": "tiny-math", **self.values}
        for change in changes:
            for key, value in change.items():
                section = merged.get(key)
                merged[key] = {**section, **value} if isinstance(section, dict) else value
        (self.folder / "run.yaml").write_text(yaml.safe_dump(merged))
        return self.popen("train", "run.yaml", "--output", "run", *arguments, **env)

    def popen(self, *arguments: str, python: Sequence[str] = ("-m", "grpoforge"), **env: str) -> subprocess.Popen[str]:
        """The program with `arguments`, started by `python PYTHON ARGUMENTS`, with more environment variables."""
        return subprocess.Popen(
            [sys.executable, *python, *arguments],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def program(tmp_path: Path, values: dict[str, Any]) -> Program:
    return Program(tmp_path, values)
