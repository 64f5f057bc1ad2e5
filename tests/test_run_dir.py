"""One run, one directory, one writer; resuming loses and repeats no line."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from grpoforge import run_dir
from grpoforge.errors import CheckpointError
from grpoforge.run_dir import RunDir, default_output, remove_rollouts, truncate_metrics, write_json_atomic

ROOT = str(Path(__file__).parents[1])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "runs/tiny-math-1")
    write_json_atomic(run.run_json, {"seed": 1})
    return run


def test_paths() -> None:
    run = RunDir(Path("runs/x"))
    assert str(run.run_json) == "runs/x/run.json"
    assert str(run.metrics) == "runs/x/metrics.jsonl"
    assert str(run.tensorboard) == "runs/x/tensorboard"
    assert str(run.rollouts_file(12)) == "runs/x/rollouts/step-000012.parquet"
    assert str(run.checkpoints) == "runs/x/checkpoints"
    assert str(run.lock) == "runs/x/.lock"


# Creating and opening


def test_create_takes_a_new_or_an_empty_folder(tmp_path: Path) -> None:
    assert RunDir.create(tmp_path / "a/b").path == tmp_path / "a/b"
    run = RunDir.create(tmp_path / "a/b")
    with run.locked():
        pass
    (run.path / ".tmp-run.json-1").write_text("{")  # a start that died
    assert RunDir.create(run.path) == run


def test_create_refuses_another_run(run: RunDir) -> None:
    run.metrics.write_text('{"step": 39}\n{"step": 40}\n{"ste')
    with pytest.raises(CheckpointError) as caught:
        RunDir.create(run.path)
    assert caught.value.message == f"output directory {run.path} already holds a run (step 40)"
    assert caught.value.hint == f"continue it with `grpoforge train --resume {run.path}`, or choose another --output"


def test_last_step_counts_checkpoints(run: RunDir) -> None:
    assert run.last_step() == 0
    (run.checkpoints / "step-000500").mkdir(parents=True)
    run.metrics.write_text('{"step": 40}\n')
    assert run.last_step() == 500


def test_create_refuses_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError) as caught:
        RunDir.create(tmp_path)
    expected = f"output directory {tmp_path} is not empty and holds no run (it has 'thesis.tex')"
    assert caught.value.message == expected
    assert caught.value.hint == "choose another --output, or empty the folder"
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_create_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file could not be created: File exists"):
        RunDir.create(tmp_path / "file")


@pytest.mark.parametrize("name", ["a b", ".hidden", "-rf", "x" * 65, "a\x1b[2J", "naïve", "a\n"])
def test_create_refuses_odd_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        RunDir.create(tmp_path / name)
    assert f"{name!r} is not a run name" in caught.value.message
    assert caught.value.hint == "use 1 to 64 letters, digits, `.`, `_` or `-`, not starting with `.` or `-`"
    assert os.listdir(tmp_path) == []


def test_create_resolves_dots_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDir.create(Path(".")).path == Path(".")
    with pytest.raises(CheckpointError, match="'' is not a run name"):
        RunDir.create(Path("/"))


def test_open_finds_a_run(run: RunDir) -> None:
    assert RunDir.open(run.path) == run


def test_open_suggests_the_nearest_run(run: RunDir) -> None:
    with pytest.raises(CheckpointError) as caught:
        RunDir.open(run.path.parent / "tiny-math-2")
    assert caught.value.message == f"{run.path.parent}/tiny-math-2 holds no run (there is no run.json)"
    assert caught.value.hint == f"did you mean `{run.path}`?"


def test_open_suggests_the_run_around_a_checkpoint(run: RunDir) -> None:
    with pytest.raises(CheckpointError) as caught:
        RunDir.open(run.checkpoints / "step-000500")
    assert caught.value.hint == f"did you mean `{run.path}`?"


def test_open_says_when_there_is_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        RunDir.open(tmp_path / "runs/x")
    assert caught.value.hint == f"name a folder with a run.json; {tmp_path / 'runs'} has none below it"


def test_default_output_is_free_and_named_for_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir.time, "strftime", lambda form: "20300102-030405")
    assert default_output("dapo") == Path("runs/dapo-20300102-030405")
    (tmp_path / "dapo-20300102-030405").mkdir()
    os.symlink("nowhere", tmp_path / "dapo-20300102-030405-2")
    assert default_output("dapo", tmp_path) == tmp_path / "dapo-20300102-030405-3"
    assert default_output("../a b/ü", tmp_path) == tmp_path / "a-b---20300102-030405"
    assert default_output("...", tmp_path) == tmp_path / "run-20300102-030405"
    RunDir.create(default_output("x" * 200, tmp_path))


def test_default_output_has_the_time() -> None:
    assert re.fullmatch(r"runs/gsm8k-qwen2\.5-3b-20\d{6}-\d{6}", str(default_output("gsm8k-qwen2.5-3b")))


# The lock

HOLD = """
import sys
from pathlib import Path
from grpoforge.run_dir import RunDir
with RunDir.open(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(run: RunDir) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_second_process_is_refused_until_the_first_dies(run: RunDir) -> None:
    with hold(run) as first:
        with pytest.raises(CheckpointError) as caught, run.locked():
            pytest.fail("two processes hold one run")
        holder = f"process {first.pid} on {socket.gethostname()}"
        assert caught.value.message == f"output directory {run.path} is in use by {holder}"
        assert caught.value.hint == "wait for it to finish, or choose another --output"
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert run.lock.read_text() == f"{holder}\n"  # stale, and harmless
    with run.locked():
        assert run.lock.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_lock_is_released_although_a_child_inherited_it(run: RunDir) -> None:
    with run.locked():
        descriptor = next(int(name) for name in os.listdir("/proc/self/fd") if _opens(name, run.lock))
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor])
    with child, run.locked():
        assert child.stdin is not None
        child.stdin.close()


def _opens(name: str, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{name}") == str(path)
    except OSError:
        return False


def test_lock_is_not_held_twice_in_one_process_and_shows_no_hostile_text(run: RunDir) -> None:
    with run.locked():
        run.lock.write_text("\x1b[2Jprocess 1")
        with pytest.raises(CheckpointError, match=r"is in use by another process$"), run.locked():
            pass


def test_file_system_without_locks_warns(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_dir.fcntl, "flock", flock)
    with run.locked():
        pass
    expected = f"{run.path}: the file system has no locks; make sure that no second run writes here"
    assert caplog.messages == [expected]


def test_lock_in_a_missing_folder_is_attributed(tmp_path: Path) -> None:
    message = r"\.lock could not be opened: No such file"
    with pytest.raises(CheckpointError, match=message), RunDir(tmp_path / "gone").locked():
        pass


# Files


def test_write_json_atomic_replaces(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "run.json", {"a": [1, "ü\ud800"]})
    write_json_atomic(tmp_path / "run.json", {"a": 2})
    assert (tmp_path / "run.json").read_text() == '{\n  "a": 2\n}\n'
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "run.json"
    write_json_atomic(path, {"a": 1})

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError) as caught:
        write_json_atomic(path, {"a": 2})
    assert caught.value.message == f"{path} could not be written: {os.strerror(code)}"
    assert caught.value.hint == "check the disk and the permissions, or choose another --output"
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ('{"step": 1}\n{"step": 2}\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"step": 3}\n', '{"step": 1}\n'),
        (
            '{"step": 2, "x": 1}\n{"step": 2, "eval/x": NaN}\n',
            '{"step": 2, "x": 1}\n{"step": 2, "eval/x": NaN}\n',
        ),
        ('{"step": 1}\n{"step": 2, "rew', '{"step": 1}\n'),
        ('{"step": 1}\n{"step": 2}', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"st\x00\x00\n{"step": 2}\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n[]\n"step"\n{"step": "1"}\n{}\n', '{"step": 1}\n'),
        ('{"step": 1, "a": "\u2028"}\n', '{"step": 1, "a": "\u2028"}\n'),
    ],
)
def test_truncate_metrics_drops_later_and_torn_lines(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(before)
    truncate_metrics(path, 2)
    assert path.read_text() == after
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_truncate_metrics_does_not_touch_what_is_right(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 2)
    assert not path.exists()
    path.write_text('{"step": 2}\n')
    inode = path.stat().st_ino
    truncate_metrics(path, 2)
    assert path.stat().st_ino == inode


def test_metrics_that_cannot_be_read_are_attributed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl could not be read: Is a directory"):
        truncate_metrics(tmp_path / "metrics.jsonl", 2)


def test_rewind_drops_metrics_and_rollouts_of_later_steps(run: RunDir) -> None:
    run.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 10)))
    run.rollouts.mkdir()
    for name in ("step-000002", "step-000003", "step-1000000", "step-x", "notes"):
        (run.rollouts / f"{name}.parquet").write_text("")
    run.rewind(2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert sorted(os.listdir(run.rollouts)) == ["notes.parquet", "step-000002.parquet", "step-x.parquet"]


def test_rollouts_that_cannot_be_removed_are_attributed(tmp_path: Path) -> None:
    (tmp_path / "step-000003.parquet").mkdir()
    with pytest.raises(CheckpointError, match=r"step-000003\.parquet could not be removed: Is a directory"):
        remove_rollouts(tmp_path, 2)
    remove_rollouts(tmp_path / "absent", 2)


def test_importing_does_not_import_torch() -> None:
    code = "import sys, grpoforge.run_dir, grpoforge.checkpoint; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ROOT})
