"""What was measured on: machine, software, commit, date."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from grpoforge_kernels.cpp import build
from grpoforge_kernels.errors import KernelError

PACKAGES = ("grpoforge", "torch", "triton", "liger-kernel", "cut-cross-entropy", "trl")


def machine() -> dict[str, Any]:
    """Processor, memory, accelerator, threads and load, as JSON values."""
    return {
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags_digest(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpu": gpu_name(),
        "load": [round(one, 2) for one in os.getloadavg()] if hasattr(os, "getloadavg") else [],
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, the compiler and what is compared; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "c++": compiler()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def today() -> str:
    """The date and time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> str | None:
    """The commit of the checkout that this package lies in, ``+changes`` when files differ; None outside of one."""
    here = Path(__file__).parent
    head = _output("git", "-C", str(here), "rev-parse", "--short=12", "HEAD")
    # A package in site-packages may lie in somebody else's checkout.
    tracked = _output("git", "-C", str(here), "ls-files", "--error-unmatch", "__init__.py")
    if head is None or tracked is None:
        return None
    return head + ("+changes" if _output("git", "-C", str(here), "status", "--porcelain", "-uno") else "")


def cpu_name() -> str:
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags_digest() -> str:
    """Twelve characters that change when the processor's instruction sets do."""
    flags = _cpuinfo("flags") or _cpuinfo("Features") or platform.machine()
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:12]


def gpu_name() -> str | None:
    """Name, compute capability and CUDA version of the first accelerator; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} sm_{major}{minor}, CUDA {torch.version.cuda or torch.version.hip}"


def gpu_driver() -> str | None:
    """The version of the accelerator's driver; None without one."""
    shown = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return shown.partition("\n")[0] if shown else None


def compiler() -> str | None:
    """The first line that the C++ compiler says of itself; None without one."""
    try:
        line = _output(*build.find_compiler(), "--version")
    except KernelError:
        return None
    return line.partition("\n")[0] if line else None


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _output(*command: str) -> str | None:
    """What a command prints on standard output; None when there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
