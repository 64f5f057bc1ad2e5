"""What tests of kernels share."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from grpoforge_kernels.cpp import build
from grpoforge_kernels.errors import KernelError


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_compiler: skipped where the C++ kernels cannot be, or must not be, used")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not item.get_closest_marker("needs_compiler"):
        return
    if os.environ.get("GRPOFORGE_KERNELS", "cpp") != "cpp":
        pytest.skip("another backend is forced")
    if not compiler_works():
        pytest.skip("no C++ compiler works here")


@cache
def compiler_works() -> bool:
    """Whether the least of programs compiles. Kernels that do not, where it does, must fail their tests."""
    try:
        command = [*build.find_compiler(), "-x", "c++", "-", "-o", os.devnull]
    except KernelError:
        return False
    return subprocess.run(command, input=b"int main() {}", capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Runs the checks of a file once for all workers, in a process of their own: see ``interpreter.py``."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent

    def run(file: str) -> dict[str, str]:
        stored = folder / f"{Path(file).stem}.json"
        with open(stored.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stored.exists():
                stored.write_text(json.dumps(_run(file)))
        return json.loads(stored.read_text())

    return run


def _run(file: str) -> dict[str, str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # The kernels are named by their module here; a choice made for other tests must not reach them.
    environment.pop("GRPOFORGE_KERNELS", None)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, f"{file} broke off:\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])
