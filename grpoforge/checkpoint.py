"""What must survive: checkpoint folders that are whole or absent.

A checkpoint ``step-000123/`` is written beside its place, synced, sealed with a manifest (size and sha256 of
every file) and renamed, in that order: a process may die at any instruction, and the newest folder that
verifies is complete. This file knows folders only; what goes into them is the caller's ``write``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from grpoforge.errors import CheckpointError, GrpoforgeError, suggest

MANIFEST = "MANIFEST.json"
SCHEMA = 1
_STEP = re.compile(r"step-([0-9]{6,18})")
_LEFTOVER = re.compile(r"\.(?P<kind>tmp|old)-(?P<name>best|step-[0-9]{6,18})-(?P<pid>[0-9]{1,18})")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def step_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps: ``step-000123``."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step a checkpoint folder is named for. Raises CheckpointError for any other name."""
    match = _STEP.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint folder", "checkpoints are named `step-000123`")
    return int(match[1])


def published(checkpoints: Path) -> list[Path]:
    """The folders named ``step-…`` in ``checkpoints``, oldest first; not verified, links not followed."""
    if not checkpoints.is_dir():
        return []
    with os.scandir(checkpoints) as entries:
        names = [e.name for e in entries if _STEP.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return sorted((checkpoints / name for name in names), key=step_of)


def publish(checkpoints: Path, step: int, write: Callable[[Path], None]) -> Path:
    """The folder ``checkpoints/step-…`` with what ``write(folder)`` put there, durable and sealed.

    A checkpoint of the same step is replaced, and is back in place should that fail. One call at a time.
    Raises CheckpointError when anything fails: nothing is left behind and earlier checkpoints are untouched.
    """
    final = checkpoints / step_name(step)
    temp = checkpoints / f".tmp-{final.name}-{os.getpid()}"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(checkpoints)
        temp.mkdir()
        write(temp)
        _seal(temp, step)
        _move_into_place(temp, final)
    except BaseException as error:
        shutil.rmtree(temp, ignore_errors=True)
        if isinstance(error, Exception):
            raise _not_written(final, error) from error
        raise
    return final


def verify(path: Path) -> None:
    """Return when every file below ``path`` is what the manifest says, and nothing else is there.

    Raises CheckpointError naming the first file that is missing, extra, a link, or differs in size or sha256.
    Detects damage, not malice: whoever can rewrite the manifest can make any folder verify.
    """
    folder = path.resolve()
    if not folder.is_dir():
        siblings = [other.name for other in published(path.parent)]
        raise CheckpointError(f"checkpoint {path} does not exist", suggest(path.name, siblings))
    try:
        entries = _read_manifest(folder)
        present = set(_files(folder))
        for name in sorted(present - entries.keys()):
            raise _Flaw(f"{name}: extra file")
        for name, entry in entries.items():
            _verify_file(folder, name, entry, present)
    except OSError as error:
        _damaged(folder, f"{Path(error.filename or folder).name}: {error.strerror or error}")
    except _Flaw as flaw:
        _damaged(folder, str(flaw))


def newest(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, or None; ``warn`` hears about each damaged one passed over."""
    if checkpoints.is_dir():
        with contextlib.suppress(OSError):  # a folder that may only be read
            _restore_moved_aside(checkpoints)
    complaints: list[str] = []
    found: Path | None = None
    for folder in reversed(published(checkpoints)):
        try:
            verify(folder)
        except CheckpointError as error:
            complaints.append(error.message)
        else:
            found = folder
            break
    outcome = f"resuming from {found.name}" if found else "no intact checkpoint is left"
    for complaint in complaints:
        warn(f"{complaint}; {outcome}")
    return found


def prune(checkpoints: Path, keep_last: int) -> None:
    """Remove all but the ``keep_last`` newest checkpoints; the best one stays, as does what has no manifest.

    Raises CheckpointError when a folder cannot be removed.
    """
    assert keep_last >= 1, "the newest checkpoint is never removed"
    sealed = [folder for folder in published(checkpoints) if (folder / MANIFEST).is_file()]
    best_folder = best(checkpoints)
    for folder in sealed[:-keep_last]:
        if folder == best_folder:
            continue
        # Renamed first: a removal that is cut short leaves a temporary folder, never half a checkpoint.
        doomed = checkpoints / f".tmp-{folder.name}-{os.getpid()}"
        try:
            os.rename(folder, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {folder} could not be removed: {_reason(error)}",
                f"{_hint(error.errno)}training does not need it any more",
            ) from error


def mark_best(checkpoints: Path, step: int) -> None:
    """Point ``checkpoints/best`` at the checkpoint of ``step``, atomically, by a relative link.

    Raises CheckpointError when there is no such checkpoint or the link cannot be made.
    """
    folder = checkpoints / step_name(step)
    if not folder.is_dir():
        known = [other.name for other in published(checkpoints)]
        raise CheckpointError(f"checkpoint {folder} does not exist", suggest(folder.name, known))
    link = checkpoints / f".tmp-best-{os.getpid()}"
    try:
        link.unlink(missing_ok=True)
        os.symlink(folder.name, link)
        os.replace(link, checkpoints / "best")
        sync_folder(checkpoints)
    except OSError as error:
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
        raise CheckpointError(
            f"{checkpoints / 'best'} could not be pointed at {folder.name}: {_reason(error)}",
            f"{_hint(error.errno)}the checkpoint itself is intact",
        ) from error


def best(checkpoints: Path) -> Path | None:
    """The checkpoint that ``checkpoints/best`` points at, or None when none is marked or it is gone."""
    link = checkpoints / "best"
    target = os.readlink(link) if link.is_symlink() else ""
    # Only a bare sibling name counts: a link out of the folder is not ours.
    return checkpoints / target if _STEP.fullmatch(target) and link.is_dir() else None


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: a rename survives a power cut once its folder is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


class _Flaw(Exception):
    """What is wrong with a checkpoint folder: ``file: reason``."""


def _damaged(folder: Path, flaw: str) -> NoReturn:
    raise CheckpointError(
        f"checkpoint {folder.name} is damaged ({flaw})",
        "resume from an earlier checkpoint, or restore this one from a copy",
    )


def _files(folder: Path, prefix: str = "") -> Iterator[str]:
    """Relative names of the files below ``folder`` without the manifest; anything but a file is a flaw."""
    for name in sorted(os.listdir(folder)):
        mode = os.lstat(folder / name).st_mode
        if stat.S_ISDIR(mode):
            yield from _files(folder / name, f"{prefix}{name}/")
        elif not stat.S_ISREG(mode):
            raise _Flaw(f"{prefix}{name}: {'symbolic link' if stat.S_ISLNK(mode) else 'not a regular file'}")
        elif prefix + name != MANIFEST:
            yield prefix + name


def _seal(folder: Path, step: int) -> None:
    """Sync every file and folder below ``folder``; the manifest comes last."""
    # safetensors creates files that only their owner may read; a team reads checkpoints.
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    files: dict[str, dict[str, Any]] = {}
    for name in _files(folder):
        with open(folder / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    body = {"schema": SCHEMA, "step": step, "files": files}
    with open(folder / MANIFEST, "wb") as file:
        file.write(_render({**body, "sha256": hashlib.sha256(_render(body)).hexdigest()}))
        file.flush()
        os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(parent))


def _render(manifest: Mapping[str, Any]) -> bytes:
    """The one spelling of a manifest: a file spelled otherwise was edited."""
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """``{file: (bytes, sha256)}``; raises _Flaw when missing, unreadable, edited or of another step."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise _Flaw(f"{MANIFEST}: {'symbolic link' if path.is_symlink() else 'missing'}")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        schema, step = manifest["schema"], int(manifest["step"])
        entries = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        intact = raw == _render(manifest) and manifest["sha256"] == hashlib.sha256(_render(body)).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise _Flaw(f"{MANIFEST}: unreadable") from None
    if schema != SCHEMA:
        raise _Flaw(f"{MANIFEST}: schema {schema!r}, this version reads {SCHEMA}")
    if not intact:
        raise _Flaw(f"{MANIFEST}: edited")
    if _STEP.fullmatch(folder.name) and folder.name != step_name(step):
        raise _Flaw(f"{MANIFEST}: written for {step_name(step)}")
    return entries


def _verify_file(folder: Path, name: str, entry: tuple[int, str], present: set[str]) -> None:
    if name.startswith("/") or ".." in name.split("/"):
        raise _Flaw(f"{name}: outside the checkpoint")
    if name not in present:
        raise _Flaw(f"{name}: missing")
    with open(folder / name, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry[0]:
            raise _Flaw(f"{name}: {size} bytes instead of {entry[0]}")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry[1]:
            raise _Flaw(f"{name}: sha256 mismatch")


def _move_into_place(temp: Path, final: Path) -> None:
    """Rename ``temp`` to ``final``; an old ``final`` steps aside first and returns when the rename fails."""
    aside = final.parent / f".old-{final.name}-{os.getpid()}"
    try:
        if final.exists():
            os.rename(final, aside)
        os.rename(temp, final)
        sync_folder(final.parent)
        sync_folder(final.parent.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            if final.exists() and not temp.exists():
                os.rename(final, temp)
            if aside.exists():
                os.rename(aside, final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _leftovers(checkpoints: Path, kind: str) -> Iterator[tuple[Path, Path]]:
    """``(leftover, the path it stood for)`` of processes that are gone."""
    for name in sorted(os.listdir(checkpoints)):
        match = _LEFTOVER.fullmatch(name)
        if match and match["kind"] == kind and not _is_running(int(match["pid"])):
            yield checkpoints / name, checkpoints / match["name"]


def _is_running(pid: int) -> bool:
    """Whether another process has this id. Our own id is stale: a container starts with the same id again."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _restore_moved_aside(checkpoints: Path) -> None:
    """Undo a replacement that was cut short between its two renames."""
    for leftover, final in _leftovers(checkpoints, "old"):
        if not final.exists():
            os.rename(leftover, final)


def _clear_leftovers(checkpoints: Path) -> None:
    _restore_moved_aside(checkpoints)
    for kind in ("tmp", "old"):
        for leftover, _ in _leftovers(checkpoints, kind):
            if leftover.is_symlink():
                leftover.unlink()
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def _not_written(final: Path, error: Exception) -> CheckpointError:
    message = f"checkpoint {final} could not be written: {_reason(error)}"
    with contextlib.suppress(OSError):  # a folder that cannot even be listed: the reason says so
        message += f" ({_space(final)})"
    return CheckpointError(message, f"{_hint(_errno(error))}earlier checkpoints are untouched")


def _space(final: Path) -> str:
    """``about 6.2 GB needed, 1.1 GB free``; what is needed is the size of the newest checkpoint."""
    room = next(parent for parent in final.absolute().parents if parent.is_dir())
    free = f"{_amount(shutil.disk_usage(room).free)} free"
    for folder in reversed(published(final.parent)):
        needed = sum(entry.lstat().st_size for entry in folder.rglob("*") if not entry.is_dir())
        return f"about {_amount(needed)} needed, {free}"
    return free


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if isinstance(error, _Flaw | GrpoforgeError) else f"{type(error).__name__}: {error}"


def _errno(error: Exception) -> int | None:
    if isinstance(error, SafetensorError):  # names the code in its text only: "(os error 28)"
        match = re.search(r"os error ([0-9]{1,4})", str(error))
        return int(match[1]) if match else None
    return error.errno if isinstance(error, OSError) else None


def _hint(code: int | None) -> str:
    """What to do about an error of the operating system, to be continued; empty when nothing is known."""
    if code in _FULL:
        return "free some space or choose another --output; "
    if code in _FORBIDDEN:
        return "check the permissions of the folder or choose another --output; "
    if code == errno.EIO:
        return "check the disk or choose another --output; "
    return ""


def _amount(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
