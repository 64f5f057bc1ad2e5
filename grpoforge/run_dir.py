"""The run directory: what lies where, who may write to it, and how it is wound back on resume.

Readable without the program: ``run.json``, ``metrics.jsonl`` (an object with ``step`` per line),
``tensorboard/``, ``rollouts/step-000012.parquet``, ``checkpoints/``. One process writes at a time, and its
lock dies with it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import json
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpoforge.checkpoint import published, step_of, sync_folder
from grpoforge.errors import CheckpointError

logger = logging.getLogger(__name__)

_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_ROLLOUTS = re.compile(r"step-([0-9]{6,18})\.parquet")
_HOLDER = re.compile(r"process [0-9]{1,18} on [A-Za-z0-9._-]{1,255}")
_LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True, slots=True)
class RunDir:
    """The named paths of one run; ``create`` and ``open`` check that they make sense."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """A new run directory at ``path``, parents included.

        Raises CheckpointError for a name that is not a run name, a folder that holds a run or anything else.
        """
        _check_name(path)
        run = cls(path)
        if run.run_json.exists():
            raise CheckpointError(
                f"output directory {path} already holds a run (step {run.last_step()})",
                f"continue it with `grpoforge train --resume {shlex.quote(str(path))}`, or choose another --output",
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            foreign = sorted(name for name in os.listdir(path) if not name.startswith((_LOCK, ".tmp-")))
        except OSError as error:
            raise _failed(path, "could not be created", error) from error
        if foreign:
            raise CheckpointError(
                f"output directory {path} is not empty and holds no run (it has {foreign[0]!r})",
                "choose another --output, or empty the folder",
            )
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """The existing run at ``path``. Raises CheckpointError when there is none, naming the nearest run."""
        run = cls(path)
        if run.run_json.is_file():
            return run
        raise CheckpointError(f"{path} holds no run (there is no {run.run_json.name})", _nearest_run(path))

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        return self.path / _LOCK

    def rollouts_file(self, step: int) -> Path:
        """Where the rollouts of ``step`` lie: ``rollouts/step-000012.parquet``."""
        return self.rollouts / f"step-{step:06d}.parquet"

    def last_step(self) -> int:
        """The last step on record, in the metrics or as a checkpoint; 0 when there is none."""
        lines = _read(self.metrics).split(b"\n")
        recorded = next((step for line in reversed(lines) if (step := _step_of(line)) is not None), 0)
        return max([recorded, *(step_of(folder) for folder in published(self.checkpoints))])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; a lock left by a process that died does not count.

        Raises CheckpointError naming the process that holds it. Where the file system has no locks, warns.
        """
        descriptor = _open_lock(self.lock)
        try:
            _take_lock(descriptor, self.path)
            yield
        finally:
            # Closing is not enough: a forked child may hold the same open file.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after ``step``, so that resuming there repeats and loses no line."""
        truncate_metrics(self.metrics, step)
        remove_rollouts(self.rollouts, step)


def default_output(recipe: str, root: Path = Path("runs")) -> Path:
    """``runs/<recipe>-<YYYYmmdd-HHMMSS>`` in local time, with ``-2``, ``-3``, ... when taken."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", recipe).lstrip(".-")[:40] or "run"
    name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = root / name, 1
    while os.path.lexists(path):
        number += 1
        path = root / f"{name}-{number}"
    return path


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON: readers, and a crash, see the old file or the new one, never a part.

    Raises CheckpointError when the disk refuses; the old file is then untouched.
    """
    _write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, and lines that were torn by a crash, from a metrics file.

    Raises CheckpointError when the file cannot be read or replaced.
    """
    content = _read(path)
    lines = content.split(b"\n")
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    shortened = b"".join(line + b"\n" for line in kept)
    if shortened != content:
        _write_atomic(path, shortened)


def remove_rollouts(folder: Path, step: int) -> None:
    """Remove the rollout files of steps after ``step``. Raises CheckpointError when one cannot be removed."""
    for path in sorted(folder.glob("step-*.parquet")):
        match = _ROLLOUTS.fullmatch(path.name)
        if match and int(match[1]) > step:
            try:
                path.unlink()
            except OSError as error:
                raise _failed(path, "could not be removed", error) from error


def _check_name(path: Path) -> None:
    name = os.path.basename(os.path.abspath(path))
    if not _RUN_NAME.fullmatch(name):
        raise CheckpointError(
            f"output directory {str(path)!r}: {name!r} is not a run name",
            "use 1 to 64 letters, digits, `.`, `_` or `-`, not starting with `.` or `-`",
        )


def _nearest_run(path: Path) -> str:
    """A hint: the run around ``path`` when it points inside one, else the best-matching sibling."""
    for parent in path.parents:
        if (parent / "run.json").is_file():
            return f"did you mean `{parent}`?"
    runs = sorted(other.parent.name for other in path.parent.glob("*/run.json"))
    if not runs:
        return f"name a folder with a run.json; {path.parent} has none below it"
    # Names are compared, since paths share their beginning; paths are shown, since that is what can be typed.
    if nearest := difflib.get_close_matches(path.name, runs, n=1):
        return f"did you mean `{path.parent / nearest[0]}`?"
    return f"known: {', '.join(str(path.parent / name) for name in runs)}"


def _step_of(line: bytes) -> int | None:
    """The step of one metrics line; None for a line that is torn or has none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def _read(path: Path) -> bytes:
    """What the file holds; nothing when there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _failed(path, "could not be read", error) from error


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _failed(path, "could not be opened", error) from error


def _take_lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _HOLDER.match(os.pread(descriptor, 300, 0).decode(errors="replace"))
        raise CheckpointError(
            f"output directory {path} is in use by {holder[0] if holder else 'another process'}",
            "wait for it to finish, or choose another --output",
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _failed(path, "could not be locked", error) from error
        logger.warning("%s: the file system has no locks; make sure that no second run writes here", path)
    with contextlib.suppress(OSError):  # only the name of the holder is lost when the disk is full
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _write_atomic(path: Path, content: bytes) -> None:
    temp = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temp, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _failed(path, "could not be written", error) from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def _failed(path: Path, what: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}: {error.strerror or error}",
        "check the disk and the permissions, or choose another --output",
    )
