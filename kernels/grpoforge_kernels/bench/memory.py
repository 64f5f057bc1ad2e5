"""Peak memory of one forward and backward beyond its inputs, measured in a process of its own.

Resident memory is read from `/proc`: the high-water mark is reset after the inputs stand and the code is warm, so what
is seen is what the step touched, page by page. A process of its own, because an allocator keeps what it once had.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from grpoforge_kernels.bench.contenders import Contender
from grpoforge_kernels.bench.plan import Case
from grpoforge_kernels.bench.problems import Problem, build

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
SAMPLE_SECONDS = 0.0005
WARM_UP_ROWS = 2


def peak_bytes(case: Case, contenders: list[Contender]) -> dict[str, int | None]:
    """What each contender holds at most beyond the inputs of ``case``; None where that cannot be read."""
    problem = build(case)
    return {contender.name: _peak(case, contender, problem) for contender in contenders}


def _peak(case: Case, contender: Contender, problem: Problem) -> int | None:
    # A compiled function is compiled for one shape; everything else is warmed up on a sliver of the problem.
    warm = problem if contender.compiled else build(case, num_rows=min(WARM_UP_ROWS, case.shape[0]))
    warm.refill()
    contender.start(warm)()
    del warm
    step = contender.start(problem)
    problem.refill()
    _settle()
    return _cuda_peak(step) if case.device == "cuda" else _cpu_peak(step)


def _settle() -> None:
    """Give freed memory back, so that it is not taken for free by what is measured next."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cuda_peak(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _cpu_peak(step: Callable[[], object]) -> int | None:
    before = _read("VmRSS")
    if before is None:
        return None
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        with _sampled() as samples:
            step()
        return max(0, max(samples, default=before) - before)
    step()
    return max(0, (_read("VmHWM") or before) - before)


@contextlib.contextmanager
def _sampled() -> Iterator[list[int]]:
    """Resident memory read twice a millisecond: where the high-water mark cannot be reset."""
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            samples.append(_read("VmRSS") or 0)
            time.sleep(SAMPLE_SECONDS)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        samples.append(_read("VmRSS") or 0)  # On a busy machine the thread may not have come to look.


def _read(field: str) -> int | None:
    """A field of `/proc/self/status` in bytes; None where there is none."""
    try:
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    values = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    number = next(values, None)
    return None if number is None else int(number) * 1024
