"""Whatever fails, and whenever, the previous checkpoint is still there and the error says why."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grpoforge.checkpoint import best, mark_best, newest, prune, publish, verify
from grpoforge.errors import CheckpointError


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing for real takes most of the time and shows nothing unless the power fails."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def writer(text: str) -> Callable[[Path], None]:
    """A `write` that leaves four files, all but one depending on `text`."""

    def write(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        (folder / "model.safetensors").write_bytes(f"weights of {text} ".encode() * 20)
        (folder / "tokenizer/vocab.json").write_text(f"vocabulary of {text}")
        (folder / "trainer_state.json").write_text(f"state of {text}")
        (folder / "empty.txt").write_text("")

    return write


def text_of(folder: Path) -> str:
    return (folder / "trainer_state.json").read_text().removeprefix("state of ")


def leftovers(checkpoints: Path) -> list[str]:
    return sorted(name for name in os.listdir(checkpoints) if name.startswith("."))


class Faults:
    """Counts calls into the operating system; from `fail_at` on they fail, once or for good."""

    def __init__(self, fail_at: int, code: int, *, for_good: bool) -> None:
        self.fail_at, self.code, self.for_good = fail_at, code, for_good
        self.num_calls = 0

    def wrap(self, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            self.num_calls += 1
            if self.num_calls == self.fail_at or (self.for_good and self.num_calls > self.fail_at):
                raise OSError(self.code, os.strerror(self.code), str(args[0]))
            return call(*args, **kwargs)

        return wrapped

    @property
    def fired(self) -> bool:
        return self.num_calls >= self.fail_at


@contextlib.contextmanager
def failing(faults: Faults) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        opener = faults.wrap(open)
        patch.setattr(builtins, "open", opener)
        patch.setattr(io, "open", opener)
        names = ["fsync", "rename", "replace", "symlink", "mkdir"]
        for name in names if faults.for_good else [*names, "open"]:  # removing a folder opens it
            patch.setattr(os, name, faults.wrap(getattr(os, name)))
        yield


HINTS = {
    errno.ENOSPC: "free some space or choose another --output; earlier checkpoints are untouched",
    errno.EDQUOT: "free some space or choose another --output; earlier checkpoints are untouched",
    errno.EIO: "check the disk or choose another --output; earlier checkpoints are untouched",
    errno.EACCES: "check the permissions of the folder or choose another --output; earlier checkpoints are untouched",
}


@pytest.mark.parametrize("code", HINTS, ids=errno.errorcode.get)
@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("replaces", [False, True])
def test_every_fault_leaves_the_previous_checkpoint(tmp_path: Path, code: int, for_good: bool, replaces: bool) -> None:
    num_failures = 0
    for k in count(1):
        checkpoints = tmp_path / str(k)
        publish(checkpoints, 100, writer("earlier"))
        if replaces:
            publish(checkpoints, 123, writer("first"))
        faults = Faults(k, code, for_good=for_good)
        expected = {"second"}
        try:
            with failing(faults):
                publish(checkpoints, 123, writer("second"))
        except CheckpointError as error:
            num_failures += 1
            assert error.message.startswith(
                f"checkpoint {checkpoints}/step-000123 could not be written: {os.strerror(code)} (about "
            )
            assert error.hint == HINTS[code]
            # On a dead disk the last rename cannot be taken back: the new one is then there, and whole.
            expected = {"first" if replaces else "earlier"} | ({"second"} if for_good else set())
            assert not [name for name in leftovers(checkpoints) if name.startswith(".tmp")]
            assert for_good or leftovers(checkpoints) == []
        verify(checkpoints / "step-000100")
        found = newest(checkpoints, pytest.fail)
        assert found is not None and text_of(found) in expected
        if not faults.fired:
            break
        publish(checkpoints, 124, writer("after"))
        assert leftovers(checkpoints) == []
    assert num_failures >= 20


def test_mark_best_survives_every_fault(tmp_path: Path) -> None:
    publish(tmp_path, 1, writer("a"))
    publish(tmp_path, 2, writer("b"))
    mark_best(tmp_path, 1)
    for k in count(1):
        faults = Faults(k, errno.EIO, for_good=True)
        with failing(faults), contextlib.suppress(CheckpointError):
            mark_best(tmp_path, 2)
        assert best(tmp_path) in {tmp_path / "step-000001", tmp_path / "step-000002"}
        assert leftovers(tmp_path) == []
        if not faults.fired:
            break
    assert best(tmp_path) == tmp_path / "step-000002" and k > 3


DIE_AT_EVERY_CALL = """
import builtins, io, os, sys
from pathlib import Path
from itertools import count
from grpoforge.checkpoint import newest, publish

def die_at(k):
    num_calls = 0
    def wrap(call):
        def wrapped(*args, **kwargs):
            nonlocal num_calls
            num_calls += 1
            if num_calls == k:
                os._exit(9)
            return call(*args, **kwargs)
        return wrapped
    builtins.open = io.open = wrap(open)
    for name in ["open", "fsync", "rename", "mkdir", "unlink", "rmdir"]:
        setattr(os, name, wrap(getattr(os, name)))

def writer(text):
    return lambda folder: (folder / "state").write_text(text)

def fail(message):
    raise SystemExit(message)

for k in count(1):
    checkpoints = Path(sys.argv[1]) / str(k)
    publish(checkpoints, 1, writer("first"))
    child = os.fork()
    if child == 0:
        die_at(k)
        publish(checkpoints, 1, writer("second"))
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    found = newest(checkpoints, fail)
    text = (found / "state").read_text()
    print(text)
    publish(checkpoints, 2, writer("after"))
    assert sorted(os.listdir(checkpoints)) == ["step-000001", "step-000002"], os.listdir(checkpoints)
    if not died:
        break
"""


def test_death_at_any_call_of_a_replacement_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIE_AT_EVERY_CALL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split()
    num_old = texts.index("second")
    assert num_old >= 10 and set(texts[:num_old]) == {"first"} and set(texts[num_old:]) == {"second"}


def test_file_size_limit_met_by_safetensors_is_attributed(tmp_path: Path) -> None:
    earlier = publish(tmp_path, 1, writer("a"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*needed, .* free") as caught:
            publish(tmp_path, 2, lambda temp: save_file({"x": torch.zeros(10_000)}, temp / "model.safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.hint == HINTS[errno.ENOSPC]
    assert os.listdir(tmp_path) == ["step-000001"]
    verify(earlier)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("num_kilobytes", [100, 200, 1000])
def test_full_disk_leaves_the_previous_checkpoint(small_disk: Path, num_kilobytes: int) -> None:
    def write(num_values: int, folder: Path) -> None:
        save_file({"x": torch.zeros(num_values)}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text("x" * 1000)

    earlier = publish(small_disk / "checkpoints", 1, lambda folder: write(40_000, folder))
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        publish(small_disk / "checkpoints", 2, lambda folder: write(num_kilobytes * 250, folder))
    assert re.search(r"\(about 16[0-9] kB needed, [0-9]+(\.[0-9])? kB free\)$", caught.value.message)
    assert caught.value.hint == HINTS[errno.ENOSPC]
    assert os.listdir(earlier.parent) == ["step-000001"]
    verify(earlier)


def test_prune_that_fails_is_attributed_and_damages_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        publish(tmp_path, step, writer(str(step)))
    with failing(Faults(1, errno.EACCES, for_good=True)), pytest.raises(CheckpointError) as caught:
        prune(tmp_path, 1)
    expected = f"checkpoint {tmp_path}/step-000001 could not be removed: Permission denied"
    assert caught.value.message == expected
    assert caught.value.hint.endswith("; training does not need it any more")
    verify(tmp_path / "step-000001")


def test_best_that_cannot_be_linked_is_attributed(tmp_path: Path) -> None:
    publish(tmp_path, 123, writer("a"))
    with failing(Faults(1, errno.EPERM, for_good=False)), pytest.raises(CheckpointError) as caught:
        mark_best(tmp_path, 123)
    assert caught.value.message == f"{tmp_path}/best could not be pointed at step-000123: Operation not permitted"
    assert caught.value.hint.endswith("; the checkpoint itself is intact")
