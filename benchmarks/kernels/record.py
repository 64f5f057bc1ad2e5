"""What the scripts here share: measure one operation, show the tables, keep the report in `benchmarks/results/`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from grpoforge.cli.bench_display import print_report
from grpoforge_kernels.bench import report as reports
from grpoforge_kernels.bench.plan import MALLOCS, SHAPES, Plan

RESULTS = Path(__file__).parents[1] / "results"


def record(op: str, about: str) -> None:
    """Measure ``op`` as the command line says, write ``benchmarks/results/OP-DATE.json``, exit 1 when it is wrong."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--effort", choices=[*SHAPES], default="full", help="shapes and rounds; full by default")
    parser.add_argument("--malloc", choices=MALLOCS, default="both", help="allocators; both by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, help="timed runs of each contender")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the report goes")
    given = parser.parse_args()
    plan = Plan(ops=(op,), device=given.device, rounds=given.rounds, effort=given.effort, malloc=given.malloc)
    command = " ".join(["python", f"benchmarks/kernels/{op}.py", *sys.argv[1:]])
    report = reports.measure(plan, command=command, say=lambda text: print(text, file=sys.stderr))
    print_report(report)
    path = given.folder / f"{op}-{report['date'][:10]}.json"
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
    wrong = reports.failures(report)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    sys.exit(1 if wrong else 0)
