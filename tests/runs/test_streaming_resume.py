"""A run on a stream that was stopped goes on with the same bits, out of its place in the stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge import state
from grpoforge.config import Config
from grpoforge.errors import Interrupted
from grpoforge.launch import read_run_config, resume, start
from grpoforge.layers import build
from grpoforge.run_dir import RunDir

STREAM: dict[str, Any] = {
    # Eight prompts of a run, of a stream of 20 shuffled 5 at a time: the buffer is refilled while it runs.
    "data": {"streaming": True, "shuffle_buffer": 5, "few_shot": 1, "instruction": "Think."},
    "batch": {"dynamic_sampling": 2},
    "max_steps": 4,
}


def resumed(run: Path) -> None:
    """What `grpoforge train --resume RUN` does."""
    run_dir = RunDir.open(run)
    resume(build([("run.json", read_run_config(run_dir))]), run_dir, None)


def test_it_ends_as_if_it_had_not_been_stopped(
    tmp_path: Path, config: Callable[..., Config], outcome: Any, stop_after: Any
) -> None:
    start(config(STREAM), tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(config(STREAM, stop_after(2)), tmp_path / "stopped")
    saved = state.load_state(max((tmp_path / "stopped/checkpoints").glob("step-*")), "trainer_state")
    assert saved["components"]["prompts"] == {"rows": 4, "prompts": 4}
    resumed(tmp_path / "stopped")
    whole, again = outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")
    assert again == whole
    assert len(whole.rollouts) == 4


@pytest.mark.slow
def test_it_is_told_that_it_is_a_stream(tmp_path: Path, config: Callable[..., Config], program: Any) -> None:
    change = {"data": {"streaming": True}, "trackers": [{"name": "console"}], "max_steps": 1}
    process = program.start(changes=[change])
    shown, talk = process.communicate()
    assert process.returncode == 0, talk
    assert "a stream of prompts to train on, 4 to evaluate" in shown + talk
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["data"]["streaming"] is True
