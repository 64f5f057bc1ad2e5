"""Ctrl-C and SIGTERM to the real program: it finishes its step, saves, says how to go on, and leaves with 130."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge import checkpoint
from grpoforge.config import Config
from grpoforge.launch import read_run_config, resume, start
from grpoforge.layers import build
from grpoforge.run_dir import RunDir

WAITING = '''
import time
from pathlib import Path

HERE = Path(__file__).parent
num_calls = 0


def digits(completions):
    """Waits in its call number {at}, which says so by a file, until another file is there."""
    global num_calls
    num_calls += 1
    if num_calls == {at} and not (HERE / "go").exists():
        (HERE / "reached").touch()
        while not (HERE / "go").exists():
            time.sleep(0.01)
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
'''

IN_STEP_2 = 3
"""The calls of a reward: first evaluation, step 1, step 2."""
IN_FIRST_EVALUATION = 1


@pytest.fixture
def waiting(tmp_path: Path) -> Callable[[int], dict[str, Any]]:
    """The change to a run of three steps whose reward waits in its call number `at`."""

    def make(at: int) -> dict[str, Any]:
        (tmp_path / "waiting.py").write_text(WAITING.format(at=at))
        return {
            "rewards": [{"name": f"{tmp_path}/waiting.py:digits"}],
            "eval": {"every": 0, "metric": "eval_reward"},
            "checkpoint": {"every": 0, "keep_last": 2},
            "max_steps": 3,
        }

    return make


def wait_for(path: Path, process: Any) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "at", "step"),
    [
        (signal.SIGTERM, IN_STEP_2, 2),
        pytest.param(signal.SIGINT, IN_STEP_2, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, IN_FIRST_EVALUATION, 0, marks=pytest.mark.slow),
    ],
    ids=["SIGTERM in a step", "SIGINT in a step", "SIGINT in the first evaluation"],
)
def test_it_finishes_saves_and_says_how_to_go_on(
    tmp_path: Path,
    program: Any,
    config: Callable[..., Config],
    waiting: Any,
    outcome: Any,
    number: signal.Signals,
    at: int,
    step: int,
) -> None:
    process = program.start(changes=[waiting(at)])
    wait_for(tmp_path / "reached", process)
    process.send_signal(number)
    time.sleep(0.2)
    (tmp_path / "go").touch()
    _, talk = process.communicate(timeout=120)
    assert process.returncode == 130, talk
    assert f"warning: {number.name}: finishing this step, then saving; once more to stop at once\n" in talk
    assert f"\nstopped after step {step} of 3; everything is saved\n" in talk
    assert "\ncontinue with `grpoforge train --resume run`\n" in talk
    assert "Traceback" not in talk
    run = tmp_path / "run"
    assert [checkpoint.step_of(folder) for folder in checkpoint.published(run / "checkpoints")] == [step]

    start(config(waiting(at)), tmp_path / "whole")
    run_dir = RunDir.open(run)
    resume(build([("run.json", read_run_config(run_dir))]), run_dir, None)
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_leaves_nothing_half_done(tmp_path: Path, program: Any, waiting: Any) -> None:
    process = program.start(changes=[waiting(IN_STEP_2), {"checkpoint": {"every": 1}}])
    wait_for(tmp_path / "reached", process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == 130, talk
    assert "once more to stop at once" in talk and "Traceback" not in talk
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-000001"]
    checkpoint.verify(tmp_path / "run/checkpoints/step-000001")
