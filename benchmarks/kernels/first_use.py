"""How long the first use of the C++ kernels waits for the compiler: each library built from nothing, five times."""

from __future__ import annotations

import os
import statistics
import tempfile
import time

from grpoforge_kernels.cpp import build

ROUNDS = 5


def seconds(name: str) -> float:
    """One build into an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ[build.CACHE_VARIABLE] = cache
        start = time.perf_counter()
        build.library(name)
        return time.perf_counter() - start


if __name__ == "__main__":
    for name, library in build.LIBRARIES.items():
        times = [seconds(name) for _ in range(ROUNDS)]
        files = ", ".join(f"{source}.cpp" for source in library.sources)
        spread = f"median of {ROUNDS}, {min(times):.2f} to {max(times):.2f}"
        print(f"{name}: {statistics.median(times):.2f} s ({spread}): {files}")
