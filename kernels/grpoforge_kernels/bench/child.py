"""Measurements that need a process of their own, and how one is asked: see `__main__`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from grpoforge_kernels import dispatch
from grpoforge_kernels.bench import memory
from grpoforge_kernels.bench.lineup import contenders
from grpoforge_kernels.bench.plan import Case, Plan
from grpoforge_kernels.errors import KernelError

REUSE = {
    "MALLOC_MMAP_THRESHOLD_": str(2**34),
    "MALLOC_TRIM_THRESHOLD_": str(2**35),
    "MALLOC_TOP_PAD_": str(2**30),
}
"""Settings under which glibc keeps freed memory: after the warm-up no contender takes a page fault."""


def measure_with_reuse(plan: Plan) -> dict[str, Any]:
    """The report of ``plan`` with an allocator that keeps freed memory."""
    report: dict[str, Any] = ask("measure", plan, environment=REUSE)
    return report


def measure_memory(plan: Plan, case: Case, names: Sequence[str]) -> dict[str, int | None]:
    """Peak memory of the contenders of ``case`` by name; empty when the process did not survive."""
    try:
        peaks: dict[str, int | None] = ask("memory", plan, case=asdict(case), names=list(names))
    except KernelError:
        return {}
    return peaks


def measure_build(plan: Plan) -> float | None:
    """Seconds in which the C++ is compiled and loaded for the first time; None where it cannot be."""
    with tempfile.TemporaryDirectory() as empty:
        seconds: float | None = ask("build", plan, environment={"GRPOFORGE_CACHE": empty})
    return seconds


def ask(task: str, plan: Plan, *, environment: Mapping[str, str] | None = None, **details: Any) -> Any:
    """The answer of a process to one request.

    Raises:
        KernelError: the process did not survive, for instance for want of memory.
    """
    request = {"task": task, "plan": plan.to_json(), "threads": torch.get_num_threads(), **details}
    done = subprocess.run(
        [sys.executable, "-m", "grpoforge_kernels.bench"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if done.returncode:
        raise KernelError(
            f"the process that measures ({task}) ended with exit code {done.returncode}",
            "its last words stand above; -9 is want of memory: give a smaller `--shape`",
        )
    return json.loads(done.stdout)


def answer_memory(plan: Plan, case: Mapping[str, Any], names: Sequence[str]) -> dict[str, int | None]:
    """In the process: the peaks of the contenders called ``names``."""
    one = Case(**{**case, "shape": tuple(case["shape"])})
    wanted = [contender for contender in contenders(one, plan) if contender.name in names]
    return memory.peak_bytes(one, wanted)


def answer_build() -> float | None:
    """In the process: seconds from the first wish for the C++ library until it is loaded."""
    start = time.perf_counter()
    # Asking builds and loads the library.
    reason = dispatch.obstacle("cpp", "selective_log_softmax", "cpu", torch.float32)
    return None if reason else time.perf_counter() - start
