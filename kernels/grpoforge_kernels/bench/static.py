"""What the Triton kernels could reach, from their machine code: nothing of it is measured, and no GPU is needed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from grpoforge_kernels import aot
from grpoforge_kernels.bench.machine import commit, today, versions

SCHEMA = 1


def compile_all() -> dict[str, Any]:
    """Every kernel, configuration, form and target as JSON values, and how many of them spill.

    Raises:
        KernelError: Triton is missing, or interprets in this process.
    """
    compiled = aot.compile_all()
    return {
        "schema": SCHEMA,
        "date": today(),
        "commit": commit(),
        "versions": versions(),
        "targets": {target.name: target.product for target in aot.TARGETS.values()},
        "num_spilling": sum(not one.is_sound for one in compiled),
        "kernels": [_values(one) for one in compiled],
    }


def _values(one: aot.Compiled) -> dict[str, Any]:
    bound = one.bound
    return {
        **asdict(one),
        "is_sound": one.is_sound,
        "bound": None if bound is None else {**asdict(bound), "bandwidth": bound.bandwidth, "limit": bound.limit},
    }
