"""Time: runs of all contenders in turn, so that a machine whose speed drifts treats them alike; and the machine's own
rates, which speeds are stated against."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Clock = Callable[[Callable[[], object]], float]
"""Runs a function and returns the seconds it took."""

COPY_BYTES = 2**28
"""What the copy rate is measured on: eight times a large last-level cache."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: median and quartiles over ``rounds`` runs."""

    median: float
    first_quartile: float
    third_quartile: float
    rounds: int


@dataclass(frozen=True)
class Runner:
    """A contender ready to be timed. ``refill`` restores its inputs and is not timed."""

    step: Callable[[], object]
    refill: Callable[[], None]


def clock_of(device: str) -> Clock:
    """The clock of a device: events on a CUDA stream, else the processor's."""
    return _cuda_clock if device == "cuda" else _cpu_clock


def _cpu_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_clock(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def interleave(
    runners: Mapping[str, Runner], *, rounds: int, limit: float, clock: Clock = _cpu_clock
) -> dict[str, Timing]:
    """The timing of each runner: in every round all run once, each round starting with another one.

    A runner that has taken ``limit`` seconds sits out the rounds that are left; every runner runs at least once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            first = round_ % max(1, len(names))
            for name in names[first:] + names[:first]:
                if seconds[name] and sum(seconds[name]) >= limit:
                    continue
                runners[name].refill()
                seconds[name].append(clock(runners[name].step))
    finally:
        gc.enable()
    return {name: timing(taken) for name, taken in seconds.items()}


def timing(seconds: list[float]) -> Timing:
    """Median and quartiles of at least one run."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, first, third, len(seconds))


def copy_rate(device: str, *, num_bytes: int = COPY_BYTES, rounds: int = 5) -> float:
    """Bytes per second that a copy within the memory of ``device`` moves, reading and writing counted."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    clock = clock_of(device)
    clock(lambda: target.copy_(source))
    return 2 * num_bytes / statistics.median(clock(lambda: target.copy_(source)) for _ in range(rounds))


def gemm_rate(device: str, dtype: torch.dtype, *, size: int = 1024, rounds: int = 5) -> float:
    """Floating-point operations per second of ``torch.mm`` on ``[size/2, size] @ [size, 4 size]``."""
    left = torch.randn(size // 2, size).to(device, dtype)
    right = torch.randn(size, 4 * size).to(device, dtype)
    clock = clock_of(device)
    clock(lambda: left @ right)
    flops = 2 * left.numel() * right.shape[1]
    return flops / statistics.median(clock(lambda: left @ right) for _ in range(rounds))
