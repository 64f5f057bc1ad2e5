"""Where no C++ compiler works, or another backend is forced, everything that needs the kernels works as before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = (
    *(
        f"kernels/test_{name}.py"
        for name in (
            *("selective_log_softmax", "grpo_loss", "linear_logprobs", "linear_loss", "rows"),
            *("tree_attention", "decoder_layer"),
        )
    ),
    *(f"kernels/test_{name}.py" for name in ("dispatch", "cpp_build", "certify", "bench", "decode")),
    "plugins/test_sampler_native.py",
    *("test_logprobs.py", "test_objective.py", "test_policy.py", "test_engine.py", "cli/test_bench_command.py"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"PATH": "/nowhere"}, {"CXX": "/bin/false"}, {"GRPOFORGE_KERNELS": "reference"}],
    ids=["no compiler", "broken compiler", "reference forced"],
)
def test_the_suite_passes(environment: dict[str, str], tmp_path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in ("GRPOFORGE_KERNELS", "CXX")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *(f"tests/{part}" for part in PARTS)],
        env={**inherited, "GRPOFORGE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\d{3,} passed, \d+ skipped", done.stdout), "what needs the C++ kernels is skipped, and only that"
    # Where a compiler works, tests of the compilation itself use it.
    assert "GRPOFORGE_KERNELS" in environment or not list(tmp_path.rglob("*.so"))
