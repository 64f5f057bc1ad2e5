"""A full disk costs a checkpoint or a record, and only at the very end the run."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge import checkpoint
from grpoforge.config import Config
from grpoforge.errors import RunFailed
from grpoforge.launch import read_run_config, resume, start
from grpoforge.layers import build
from grpoforge.run_dir import RunDir


class Disk:
    """Syncing fails below folders of the steps that are named: where a real file system reports that it is full."""

    def __init__(self) -> None:
        self.full_at: set[int] = set()

    def fsync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if any(f".tmp-step-{step:06d}" in path for step in self.full_at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    return disk


def test_in_the_middle_of_a_run_it_is_a_warning_and_the_next_save_works(
    tmp_path: Path, config: Callable[..., Config], disk: Disk, outcome: Any, caplog: pytest.LogCaptureFixture
) -> None:
    start(config({"max_steps": 4}), tmp_path / "whole")
    disk.full_at = {2}
    run = tmp_path / "run"
    with caplog.at_level(logging.WARNING, "grpoforge"):
        summary = start(config({"max_steps": 4}), run)
    assert summary is not None and summary.step == 4
    (warning,) = caplog.messages
    assert warning.startswith(f"checkpoint {run}/checkpoints/step-000002 could not be written: No space left on device")
    assert warning.endswith("; training goes on")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best", "step-000001", "step-000003", "step-000004",
    ]  # fmt: skip
    for folder in checkpoint.published(run / "checkpoints"):
        checkpoint.verify(folder)
    assert outcome(run) == outcome(tmp_path / "whole")


def test_the_best_is_the_best_of_what_was_kept(
    tmp_path: Path, config: Callable[..., Config], disk: Disk, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grpoforge.evaluation import Evaluation

    values = iter([0.0, 0.5, 0.9, 0.7])
    monkeypatch.setattr(Evaluation, "measure", lambda self, policy: {"eval_reward": next(values)})
    disk.full_at = {2}
    run = tmp_path / "run"
    start(config({"max_steps": 3, "eval": {"every": 1}}), run)
    assert checkpoint.best(run / "checkpoints") == run / "checkpoints/step-000003"


def test_at_the_end_it_is_an_error_and_what_was_there_stays(
    tmp_path: Path, config: Callable[..., Config], disk: Disk, outcome: Any
) -> None:
    start(config({"max_steps": 3}), tmp_path / "whole")
    disk.full_at = {3}
    run = tmp_path / "run"
    with pytest.raises(RunFailed) as error:
        start(config({"max_steps": 3}), run)
    assert error.value.exit_code == 1
    assert error.value.message.startswith(
        f"checkpoint {run}/checkpoints/step-000003 could not be written: No space left on device (about "
    )
    assert error.value.message.endswith(" free); the run ends unsaved")
    assert error.value.hint == (
        "free some space or choose another --output; earlier checkpoints are untouched; "
        f"`grpoforge train --resume {run}` repeats what came after them"
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "step-000001", "step-000002"]
    disk.full_at = set()
    run_dir = RunDir.open(run)
    resume(build([("run.json", read_run_config(run_dir))]), run_dir, None)
    assert outcome(run) == outcome(tmp_path / "whole")


def test_a_record_that_cannot_be_written_is_a_warning(
    tmp_path: Path, config: Callable[..., Config], outcome: Any, caplog: pytest.LogCaptureFixture
) -> None:
    start(config({"max_steps": 2}), tmp_path / "whole")
    plugin = tmp_path / "full.py"
    plugin.write_text(
        "import errno, os\nfrom grpoforge import hookimpl\n\n\n"
        "class Full:\n"
        "    def __init__(self, run): pass\n"
        "    def step_finished(self, report): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "    def evaluated(self, step, metrics): pass\n"
        "    def close(self): pass\n\n\n"
        "@hookimpl\ndef register_trackers(register):\n    register('full', Full)\n"
    )
    trackers = [{"name": "full"}, {"name": "jsonl"}, {"name": "rollouts"}]
    with caplog.at_level(logging.WARNING, "grpoforge"):
        start(config({"max_steps": 2, "plugins": [str(plugin)], "trackers": trackers}), tmp_path / "run")
    assert caplog.messages == ["tracker `Full` could not write: No space left on device; training goes on"] * 2
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
