"""Compile the C++ files of this folder into one shared library, in a cache of the user, once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from grpoforge_kernels.errors import KernelError

SOURCES = Path(__file__).parent
LIBRARY = "libgrpoforge_kernels.so"
CACHE_VARIABLE = "GRPOFORGE_CACHE"
SECONDS = 120
"""How long a compiler may take; it needs about one."""

FLAGS = ("-std=c++17", "-fPIC", "-O3", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
VARIANTS = (
    ("-fopenmp",),
    ("-fopenmp", "-march=native", "-DGRPOFORGE_NO_CLONES"),
    ("-fopenmp-simd", "-DGRPOFORGE_NO_CLONES"),
)
"""The first that a compiler takes: three generations of x86-64 in one library; this machine only; one thread."""


def library() -> Path:
    """The compiled library, from the cache when it is there.

    Raises:
        KernelError: there is no compiler, it fails, or the cache cannot be written.
    """
    compiler = find_compiler()
    folder = cache_folder() / _key(compiler)
    built = folder / LIBRARY
    try:
        if not built.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / "lock"):
                if not built.is_file():
                    _build(compiler, built)
    except OSError as error:
        hint = f"set {CACHE_VARIABLE} to a folder that can be written"
        raise KernelError(f"the C++ kernels cannot be kept in {folder}: {error.strerror or error}", hint) from error
    return built


def cache_folder() -> Path:
    """``$GRPOFORGE_CACHE``, else ``grpoforge`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; in it, ``kernels``.

    Raises:
        KernelError: none is set and the user has no home folder, as in some containers.
    """
    override = os.environ.get(CACHE_VARIABLE)
    if override:
        return Path(override).absolute() / "kernels"
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError as error:
        hint = f"set {CACHE_VARIABLE} to a folder that can be written"
        raise KernelError("the C++ kernels cannot be kept: this user has no home folder", hint) from error
    return Path(home).absolute() / "grpoforge" / "kernels"


def find_compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: ``$CXX`` (with its arguments), else ``c++``, ``g++`` or ``clang++``.

    Raises:
        KernelError: none is on the path.
    """
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        program, *arguments = _words(command)
        found = shutil.which(program)
        if found:
            return (found, *arguments)
    looked = f"CXX={chosen} is not a program" if chosen else "no c++, g++ or clang++ on the path"
    raise KernelError(f"the C++ kernels need a compiler: {looked}", "install g++, or set CXX")


def _words(command: str) -> list[str]:
    """The program and its arguments; a command that no shell could read is taken for the name of a program."""
    try:
        return shlex.split(command) or [command]
    except ValueError:
        return [command]


def _key(compiler: Sequence[str]) -> str:
    """Everything that the library depends on, as one name."""
    digest = hashlib.sha256()
    for path in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    version = _run((*compiler, "--version"), Path(tempfile.gettempdir()))
    digest.update(repr((FLAGS, VARIANTS, tuple(compiler), version, platform.machine(), _cpu_flags())).encode())
    return digest.hexdigest()[:32]


def _cpu_flags() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _build(compiler: Sequence[str], built: Path) -> None:
    """The library appears whole or not at all: it is linked beside its place and renamed."""
    for last, variant in enumerate(VARIANTS, start=1 - len(VARIANTS)):
        with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
            try:
                _compile(compiler, variant, Path(scratch))
            except KernelError:
                if last == 0:
                    raise
                continue
            os.replace(Path(scratch, LIBRARY), built)
            return


def _compile(compiler: Sequence[str], variant: Sequence[str], scratch: Path) -> None:
    """One process for each file, all at once; then the link."""
    files = sorted(SOURCES.glob("*.cpp"))
    objects = [str(scratch / f"{path.stem}.o") for path in files]
    commands = [
        (*compiler, *FLAGS, *variant, "-c", str(path), "-o", to) for path, to in zip(files, objects, strict=True)
    ]
    with tempfile.TemporaryFile("w+", dir=scratch, encoding="utf-8", errors="replace") as errors:
        running = [
            subprocess.Popen(command, cwd=scratch, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
            for command in commands
        ]
        try:
            failed = [process.args for process in running if process.wait(SECONDS) != 0]
        except subprocess.TimeoutExpired as error:
            raise KernelError(f"the C++ compiler {compiler[0]} took more than {SECONDS} s") from error
        finally:
            for process in running:
                process.kill()
                process.wait()
        if failed:
            errors.seek(0)
            raise _failure(compiler, errors.read())
    _run((*compiler, *FLAGS, *variant, "-shared", *objects, "-o", str(scratch / LIBRARY)), scratch)


def _run(command: Sequence[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failure(command, str(error)) from error
    if done.returncode != 0:
        raise _failure(command, done.stderr)
    return done.stdout


def _failure(command: Sequence[str], output: str) -> KernelError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
    return KernelError(f"the C++ compiler {command[0]} fails: {said[:300]}", "set CXX to one that works")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
