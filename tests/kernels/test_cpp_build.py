"""The C++ libraries in environments that are not made for it: each is one warning, then the reference, same results."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from grpoforge_kernels import dispatch
from grpoforge_kernels.cpp import build, loader
from grpoforge_kernels.errors import KernelError

SCRIPT = """
import logging
logging.basicConfig(format="%(message)s", level=logging.WARNING)
import torch
from grpoforge_kernels import dispatch
from grpoforge_kernels.ops import selective_log_softmax
torch.manual_seed(0)
logits = torch.randn(5, 300, requires_grad=True)
for _ in range(2):
    result = selective_log_softmax(logits, torch.arange(5), 0.7)
    (gradient,) = torch.autograd.grad(result.logprobs.sum() + result.entropy.sum(), logits)
print(dispatch.backend_name("selective_log_softmax", logits.device, logits.dtype))
print(*(f"{float(values.sum()):.4f}" for values in (*result, gradient.abs())))
"""
EXPECTED = "-36.8266 21.9471 34.7561 18.3745"
OP = "selective_log_softmax"
needs_compiler = pytest.mark.needs_compiler


def run(first: str = "", **environment: str) -> tuple[str, str, list[str]]:
    """The backend, the figures and the warnings of the script in a process of its own, after what is to run first."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("GRPOFORGE_KERNELS", "CXX")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", first + SCRIPT],
        env={**inherited, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    backend, figures = done.stdout.splitlines()
    return backend, figures, done.stderr.splitlines()


def on(flags: str) -> str:
    """What makes the script take this machine for one with these instruction sets."""
    return f"from grpoforge_kernels.cpp import build\nbuild._cpu_flags = lambda: {flags!r}\n"


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """A function that sets the environment, lets the library be found anew, and says which backend is chosen."""
    monkeypatch.delenv("GRPOFORGE_KERNELS", raising=False)
    for name in [name for name in sys.modules if name.startswith("grpoforge_kernels.cpp.")]:
        if name.removeprefix("grpoforge_kernels.cpp.") not in ("build", "loader"):
            monkeypatch.delitem(sys.modules, name)

    def choose(**environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        loader.forget()
        dispatch.forget()
        return dispatch.backend_name(OP, torch.device("cpu"), torch.float32)

    yield choose
    loader.forget()
    dispatch.forget()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_it_builds_once_and_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, figures, warnings = run(GRPOFORGE_CACHE=str(tmp_path))
    assert (backend, figures, warnings) == ("cpp", EXPECTED, [])
    monkeypatch.setenv("GRPOFORGE_CACHE", str(tmp_path))
    built = build.library("losses")
    before = built.stat().st_mtime_ns
    assert build.library("losses") == built and built.stat().st_mtime_ns == before
    assert sorted(path.name for path in built.parent.iterdir()) == [build.file_name("losses"), "lock"]
    assert [path.name for path in built.parents[1].iterdir()] == [built.parent.name], "the decoder was not asked for"


def test_every_file_is_in_one_library() -> None:
    """One that is left out would never be compiled; one in two would be compiled twice."""
    listed = sorted(source for library in build.LIBRARIES.values() for source in library.sources)
    assert listed == sorted(path.stem for path in build.SOURCES.glob("*.cpp"))


@needs_compiler
@pytest.mark.parametrize("flags", [" ".join(sorted(flags)) for flags in build.LEVELS.values()])
def test_every_generation_computes_the_same(flags: str, tmp_path: Path) -> None:
    """Where this machine can run it: instructions of a generation that it lacks would kill the process."""
    if not set(flags.split()) <= set(build._cpu_flags().split()):
        pytest.skip(f"this processor has not all of {flags}")
    backend, figures, warnings = run(
        f"from grpoforge_kernels.cpp import build\nbuild._cpu_flags = lambda: {flags!r}\n",
        GRPOFORGE_CACHE=str(tmp_path),
    )
    assert (backend, figures, warnings) == ("cpp", EXPECTED, [])


@needs_compiler
@pytest.mark.parametrize(
    ("broken", "works", "fails", "instead"),
    [
        ("decode", OP, "decode", "completions are decoded by the model's own forward pass"),
        ("grpo_loss", "decode", OP, "the slower PyTorch kernels, which compute the same, are used"),
    ],
)
def test_a_broken_library_takes_nothing_from_another(
    broken: str, works: str, fails: str, instead: str,
    tmp_path: Path, anew: Callable[..., str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    copy = Path(shutil.copytree(build.SOURCES, tmp_path / "cpp", ignore=shutil.ignore_patterns("__pycache__")))
    (copy / f"{broken}.cpp").write_text("not C++")
    monkeypatch.setattr(build, "SOURCES", copy)
    anew(GRPOFORGE_CACHE=str(tmp_path / "cache"))
    assert dispatch.obstacle("cpp", works, "cpu", torch.float32) is None
    for _ in range(2):
        assert f"/cpp/{broken}.cpp:1:1: error" in str(dispatch.obstacle("cpp", fails, "cpu", torch.float32))
    (warning,) = caplog.messages
    assert warning.endswith(f"; {instead}")


@pytest.mark.parametrize(
    ("environment", "warning"),
    [
        ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler is not a program"),
        ({"CXX": 'g++ "'}, 'CXX=g++ " is not a program'),
        ({"CXX": " "}, "CXX=  is not a program"),
        ({"CXX": "{broken}"}, "fails: something is wrong (set CXX to one that works)"),
        ({"CXX": "{liar}"}, "the C++ kernels cannot be loaded"),
        pytest.param({"CXX": "{fast}"}, "-ffast-math changes what these kernels compute", marks=needs_compiler),
        pytest.param({"GRPOFORGE_CACHE": "{file}/cache"}, "the C++ kernels cannot be kept in", marks=needs_compiler),
    ],
    ids=[
        "no CXX",
        "no command",
        "no word",
        "broken compiler",
        "not a library",
        "fast math",
        "no cache",
    ],
)
def test_what_goes_wrong_is_one_warning_and_the_reference(
    environment: dict[str, str],
    warning: str,
    tmp_path: Path,
    anew: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    places = {
        "broken": script(tmp_path / "broken", 'test "$1" = --version || { echo something is wrong >&2; exit 1; }'),
        # What a library for another machine, or one in a folder without the right to run programs, does: not load.
        "liar": script(tmp_path / "liar", 'while [ $# -gt 1 ]; do shift; done; echo text > "$1" 2>/dev/null; exit 0'),
        "fast": "c++ -ffast-math",
        "file": str(file),
    }
    filled = {name: value.format_map(places) for name, value in environment.items()}
    assert anew(**{"GRPOFORGE_CACHE": str(tmp_path / "cache"), **filled}) == "reference"
    assert dispatch.backend_name(OP, torch.device("cpu"), torch.bfloat16) == "reference"
    assert len(caplog.messages) == 1 and warning in caplog.messages[0], caplog.messages
    assert caplog.messages[0].endswith("; the slower PyTorch kernels, which compute the same, are used")


@needs_compiler
def test_hidden_fast_math_is_found_out(tmp_path: Path) -> None:
    # In a process of its own: a library linked with -ffast-math makes its whole process flush small numbers to 0.
    backend, _, warnings = run(on("sse2"), GRPOFORGE_CACHE=str(tmp_path), CXX="c++ -ffast-math -U__FAST_MATH__")
    assert backend == "reference"
    assert len(warnings) == 1 and "the C++ kernels do not compute what they should" in warnings[0]


def test_without_a_compiler_the_results_are_the_same(tmp_path: Path) -> None:
    backend, figures, warnings = run(PATH="/nowhere", GRPOFORGE_CACHE=str(tmp_path))
    assert (backend, figures) == ("reference", EXPECTED)
    assert warnings == [
        "the C++ kernels need a compiler: no c++, g++ or clang++ on the path (install g++, or set CXX); "
        "the slower PyTorch kernels, which compute the same, are used"
    ]


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rights do not stop the superuser, so the refusal is made up."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setenv("GRPOFORGE_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(KernelError, match=r"cannot be kept in .*kernels: Read-only file system") as caught:
        build.library("losses")
    assert caught.value.hint == "set GRPOFORGE_CACHE to a folder that can be written"


@needs_compiler
def test_two_that_build_at_once_get_one_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPOFORGE_CACHE", str(tmp_path))
    built = []

    def fake(compiler: tuple[str, ...], name: str, path: Path) -> None:
        built.append(path)
        path.write_text("library")

    monkeypatch.setattr(build, "_build", fake)
    threads = [threading.Thread(target=build.library, args=("losses",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


@needs_compiler
def test_a_library_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPOFORGE_CACHE", str(tmp_path))
    replace, seen = os.replace, []

    def broken(linked: Path, built: Path) -> None:
        seen.append((linked.is_file(), built.exists()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.os, "replace", broken)
    with pytest.raises(KernelError, match="No space left on device"):
        build.library("losses")
    assert seen == [(True, False)], "linked beside its place, which is empty until then"
    (folder,) = (tmp_path / "kernels").iterdir()
    assert [path.name for path in folder.iterdir()] == ["lock"]
    monkeypatch.setattr(build.os, "replace", replace)
    assert build.library("losses").is_file(), "what was left is in nobody's way"


THREADS = """
import importlib, os
import torch
torch.set_num_threads(1)
for op in ("selective_log_softmax", "decoder_layer", "decode"):
    importlib.import_module(f"grpoforge_kernels.cpp.{op}")
from grpoforge_kernels.ops import selective_log_softmax
logits, ids, counts = torch.randn(64, 20_000), torch.arange(64), []
for threads in (1, 3, 2):
    torch.set_num_threads(threads)
    selective_log_softmax(logits, ids, 1.0)
    counts.append(len(os.listdir("/proc/self/task")))
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in os.path.basename(line.split()[-1])}
print([count - counts[0] for count in counts], len(loaded))
"""


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_are_as_many_as_torch_has_and_of_its_runtime() -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS], env={**os.environ, "OMP_NUM_THREADS": "8"}, capture_output=True, text=True
    )
    assert done.stdout == "[0, 2, 1] 1\n", done.stderr


@needs_compiler
def test_a_compiler_without_openmp_gets_one_thread(
    tmp_path: Path, anew: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    compiler = script(tmp_path / "plain", 'case "$*" in *-fopenmp\\ *) exit 1;; esac; exec c++ "$@"')
    assert anew(CXX=compiler, GRPOFORGE_CACHE=str(tmp_path / "cache")) == "cpp"
    assert not caplog.messages


@needs_compiler
def test_what_the_library_depends_on_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key_of(name: str, *flags: str) -> str:
        return build._key((*build.find_compiler(), *flags), name, tmp_path)

    copy = Path(shutil.copytree(build.SOURCES, tmp_path / "cpp"))
    monkeypatch.setattr(build, "SOURCES", copy)
    key = key_of("losses")
    assert key_of("losses") == key and len(key) == 32
    assert key_of("losses", "-g") != key
    assert key_of("decode") != key
    (copy / "decode.cpp").write_text("of the other library")
    assert key_of("losses") == key
    for file in ("products.cpp", "floats.h"):
        (copy / file).write_text("another")
        assert key_of("losses") != key
        key = key_of("losses")
    monkeypatch.setattr(build, "_cpu_flags", lambda: "flags: sse2")
    assert key_of("losses") != key


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPOFORGE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert build.cache_folder() == Path("/x/grpoforge/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert build.cache_folder() == Path("/h/.cache/grpoforge/kernels")
    monkeypatch.setenv("GRPOFORGE_CACHE", "/c")
    assert build.cache_folder() == Path("/c/kernels")


@needs_compiler
def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that runs under a number nobody gave a name to."""

    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GRPOFORGE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", nowhere)
    with pytest.raises(KernelError, match="this user has no home folder to keep kernels in") as caught:
        build.library("losses")
    assert caught.value.hint == "set GRPOFORGE_CACHE to a folder that can be written"


def test_a_compiler_is_asked_away_from_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves where it runs must not lie among them."""
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", f"pwd > {tmp_path}/place; exit 1"))
    monkeypatch.setenv("GRPOFORGE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KernelError, match="it says nothing"):
        build.library("losses")
    assert (tmp_path / "place").read_text().strip() == str(tmp_path / "cache" / "kernels")


@needs_compiler
def test_without_a_temporary_folder_it_builds(tmp_path: Path) -> None:
    # After torch, which may bring dill, which asks for one too.
    nowhere = "import tempfile, torch\ntempfile.tempdir, tempfile._candidate_tempdir_list = None, lambda: []\n"
    gone = str(tmp_path / "nowhere")
    found = run(nowhere + on("sse2"), TMPDIR=gone, TMP=gone, TEMP=gone, GRPOFORGE_CACHE=str(tmp_path / "cache"))
    assert found == ("cpp", EXPECTED, [])
