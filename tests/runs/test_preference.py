"""Runs in which a preference model learns beside the policy."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge.config import Config
from grpoforge.launch import start

PREFERENCE = {
    "name": "preference",
    "weight": 0.5,
    "hidden_size": 32,
    "num_layers": 1,
    "batch_size": 2,
    "min_pairs": 2,
    "min_accuracy": 0.0,
    "preference_threshold": 0.001,
    "max_length": 128,
}


@pytest.fixture
def learning(rewards_file: Path) -> dict[str, Any]:
    """The change that lets a preference model learn what `digits` prefers."""
    return {"rewards": [{"name": f"{rewards_file}:digits"}, PREFERENCE], "eval": {"samples": 2}}


def state_sum(run: Path) -> str:
    """sha256 of what the newest checkpoint remembers of the components, and of every tensor beside it."""
    newest = max((run / "checkpoints").glob("step-*"))
    components = json.loads((newest / "trainer_state.json").read_text())["components"]
    tensors = (newest / "trainer_state.safetensors").read_bytes()
    return hashlib.sha256(json.dumps(components, sort_keys=True).encode() + tensors).hexdigest()


def test_it_learns_speaks_and_is_recorded(
    tmp_path: Path, config: Callable[..., Config], learning: dict[str, Any]
) -> None:
    start(config(learning), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert steps[-1]["pref/buffer"] == sum(line["pref/pairs"] for line in steps) > 4
    assert steps[-1]["pref/accuracy"] is not None and steps[-1]["pref/loss"] > 0
    silent = [line["rewards/preference/unscored"] for line in steps]
    assert silent[0] == 1.0 and silent[-1] == 0.0
    # Centered in every group: the mean of the run does not move.
    assert steps[-1]["rewards/preference/mean"] == pytest.approx(0.0, abs=1e-9)
    assert steps[-1]["rewards/preference/std"] > 0
    # Evaluation has an instance of its own, which has learned nothing.
    (_, *_, last) = [line for line in lines if line["kind"] == "eval"]
    assert last["eval_rewards/preference/mean"] is None and last["eval_sampled_rewards/preference/mean"] is None


def test_killed_and_resumed_by_the_command_line_it_ends_with_the_same_bits(
    tmp_path: Path, config: Callable[..., Config], learning: dict[str, Any], outcome: Any, program: Any, stop_after: Any
) -> None:
    start(config(learning), tmp_path / "whole")
    process = program.start(changes=[learning, stop_after(4, "SIGKILL")])
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = program.popen("train", "--resume", "run")
    _, talk = resumed.communicate()
    assert resumed.returncode == 0, talk
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert state_sum(tmp_path / "run") == state_sum(tmp_path / "whole")
    early = json.loads((tmp_path / "run/checkpoints/step-000003/trainer_state.json").read_text())["components"]
    assert early["reward preference"]["num_updates"] > 0, "a model that had not learned would prove nothing"
