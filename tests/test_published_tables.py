"""The tables of `docs/guides/bench.md` are those of the newest reports."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpoforge_kernels import dispatch
from grpoforge_kernels.bench import adversarial
from grpoforge_kernels.cpp import build

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "kernels" / "table.py"


@pytest.fixture
def table() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_the_page_has_the_newest_figures(table: SimpleNamespace) -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    assert [name for name, *_ in table.MARKED.findall(page)] == list(table.PUBLISHED)
    assert table.written(page) == page, f"python {SCRIPT.relative_to(ROOT)} --write"


def test_the_page_names_every_operation_that_is_certified(table: SimpleNamespace) -> None:
    page = table.PAGE.read_text(encoding="utf-8")
    names = {check.op for check in adversarial.checks("cpu")} | {
        "selective_log_softmax",
        "linear_logprobs",
        "grpo_loss",
    }
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
    assert [name for name in (*dispatch.BACKENDS, *build.LIBRARIES) if f"`{name}`" not in page] == []


ROW = {"ours": True, "value_error": 1.23e-7, "gradient_error": None, "peak_bytes": 3 * 2**20}
REPORT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python it.py",
    "machine": {"cpu": "A processor", "threads": 2},
    "versions": {"torch": "2.13"},
    "cases": [
        {
            "op": "grpo_loss", "dtype": "fp32", "shape": "4x5", "lead": "cpp",
            "rows": [
                {**ROW, "name": "cpp", "timings": {
                    "stock": {"median_s": 0.01234, "ratio": 1.0}, "reuse": {"median_s": 2.5, "ratio": 1.0},
                }},
                {**ROW, "name": "eager", "ours": False, "peak_bytes": None, "timings": {
                    "stock": {"median_s": 0.02468, "ratio": 2.0},
                }},
                {**ROW, "name": "absent", "timings": {}},
            ],
        }
    ],
}  # fmt: skip


def test_a_report_as_a_table_by_hand(table: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for date in ("2026-01-02", "2025-12-31"):
        (tmp_path / f"loss-{date}.json").write_text(json.dumps(REPORT))
    monkeypatch.setitem(table.text.__globals__, "RESULTS", tmp_path)
    assert table.written("before\n<!-- table: loss -->\nold\n<!-- end -->\nafter\n") == (
        "before\n<!-- table: loss -->\n\n"
        "| `grpo_loss` fp32 4x5 | value | gradient | stock | x ours | reuse | x ours | memory |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| ours: cpp * | 1.2e-07 | not finite | 12.3 ms | 1.00 | 2,500 ms | 1.00 | 3.0 MiB |\n"
        "| eager | 1.2e-07 | not finite | 24.7 ms | 2.00 | - | - | - |\n\n"
        "`python it.py`, A processor, 2 threads, torch 2.13, 2026-01-02; the report is"
        " `benchmarks/results/loss-2026-01-02.json`.\n\n"
        "<!-- end -->\nafter\n"
    )
