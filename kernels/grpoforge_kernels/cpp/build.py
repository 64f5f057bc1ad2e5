"""Compile the C++ files of this folder into shared libraries: each once, when it is needed, in a cache of the user."""

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
from dataclasses import dataclass
from pathlib import Path

from grpoforge_kernels.errors import KernelError

SOURCES = Path(__file__).parent
CACHE_VARIABLE = "GRPOFORGE_CACHE"
SECONDS = 120
"""How long a compiler may take; it needs about one."""


@dataclass(frozen=True)
class Library:
    """What is compiled, loaded and, if it must be, rejected together.

    ``sources`` are names of files, all compiled at once, without ``.cpp``; ``instead`` says what runs without them.
    """

    sources: tuple[str, ...]
    instead: str = "the slower PyTorch kernels, which compute the same, are used"


LIBRARIES = {
    "losses": Library(("grpo_loss", "linear", "products", "selective_log_softmax")),
    "decode": Library(("decode", "decode_arithmetic"), "completions are decoded by the model's own forward pass"),
    "layers": Library(("decoder_layer", "tree_attention"), "the model's own layers, which compute the same, are used"),
}

FLAGS = ("-std=c++17", "-fPIC", "-O3", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
PLAIN = "-DGRPOFORGE_PLAIN"
"""Only what every compiler of every processor takes."""
LEVELS = {
    ("-march=x86-64-v4", "-mprefer-vector-width=512"): {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"},
    ("-march=x86-64-v3",): {"avx2", "fma", "bmi2"},
    ("-march=x86-64",): {"sse2"},
}
"""Generations of x86-64, the best first, by the instruction sets that tell them; all of one get the same code."""


def library(name: str) -> Path:
    """The compiled library of that name in `LIBRARIES`, from the cache when it is there.

    Raises:
        KernelError: there is no compiler, it fails, or the cache cannot be written.
    """
    compiler, kept = find_compiler(), cache_folder()
    try:
        kept.mkdir(parents=True, exist_ok=True)
        built = kept / f"{name}-{_key(compiler, name, kept)}" / file_name(name)
        if not built.is_file():
            built.parent.mkdir(exist_ok=True)
            with _locked(built.parent / "lock"):
                if not built.is_file():
                    _build(compiler, name, built)
    except OSError as error:
        hint = f"set {CACHE_VARIABLE} to a folder that can be written"
        raise KernelError(f"the C++ kernels cannot be kept in {kept}: {error.strerror or error}", hint) from error
    return built


def file_name(name: str) -> str:
    """Of the library, in its folder."""
    return f"libgrpoforge_{name}.so"


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
        raise KernelError("this user has no home folder to keep kernels in", hint) from error
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


def _files(name: str) -> list[Path]:
    return [SOURCES / f"{source}.cpp" for source in LIBRARIES[name].sources]


def _key(compiler: Sequence[str], name: str, folder: Path) -> str:
    """Everything that the library depends on, as one name. The compiler is asked in ``folder``, not in a temporary one:
    there may be none that can be written."""
    digest = hashlib.sha256()
    for path in (*_files(name), *sorted(SOURCES.glob("*.h"))):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    version = _run((*compiler, "--version"), folder)
    digest.update(repr((FLAGS, _variants(), tuple(compiler), version, platform.machine(), _cpu_flags())).encode())
    return digest.hexdigest()[:32]


def _cpu_flags() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _variants() -> tuple[tuple[str, ...], ...]:
    """The first that a compiler takes: for this machine's generation; for this machine as it knows it; one thread."""
    flags = set(_cpu_flags().split())
    level = next((options for options, needed in LEVELS.items() if needed <= flags), ("-march=native",))
    return ("-fopenmp", *level), ("-fopenmp", "-march=native", PLAIN), ("-fopenmp-simd", PLAIN)


def _build(compiler: Sequence[str], name: str, built: Path) -> None:
    """The library appears whole or not at all: it is linked beside its place and renamed."""
    variants = _variants()
    for last, variant in enumerate(variants, start=1 - len(variants)):
        with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
            linked = Path(scratch, built.name)
            try:
                _compile((*compiler, *FLAGS, *variant), _files(name), linked)
            except KernelError:
                if last == 0:
                    raise
                continue
            os.replace(linked, built)
            return


def _compile(command: Sequence[str], files: Sequence[Path], linked: Path) -> None:
    """One process for each file, all at once; then the link."""
    scratch = linked.parent
    objects = [str(scratch / f"{path.stem}.o") for path in files]
    commands = [(*command, "-c", str(path), "-o", to) for path, to in zip(files, objects, strict=True)]
    with tempfile.TemporaryFile("w+", dir=scratch, encoding="utf-8", errors="replace") as errors:
        running = [
            subprocess.Popen(one, cwd=scratch, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
            for one in commands
        ]
        try:
            failed = [process.args for process in running if process.wait(SECONDS) != 0]
        except subprocess.TimeoutExpired as error:
            raise KernelError(f"the C++ compiler {command[0]} took more than {SECONDS} s") from error
        finally:
            for process in running:
                process.kill()
                process.wait()
        if failed:
            errors.seek(0)
            raise _failure(command, errors.read())
    _run((*command, "-shared", *objects, "-o", str(linked)), scratch)


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
