"""``metrics.jsonl``: every number of the run, one JSON object per event."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from grpoforge.tracking import RunInfo

if TYPE_CHECKING:
    from grpoforge.types import StepReport


class Jsonl:
    """Appends one JSON object per step or evaluation to ``metrics.jsonl`` in the run directory.

    ``{"step": 12, "kind": "train", "reward": 0.41, ...}``; ``kind`` is ``train`` or ``eval``. NaN and
    infinities become ``null``, so that every line is valid JSON. Each line is flushed when written.
    """

    def __init__(self, run: RunInfo) -> None:
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run.run_dir / "metrics.jsonl").open("a", encoding="utf-8", newline="\n")

    def step_finished(self, report: StepReport) -> None:
        self._append(report.step, "train", report.metrics)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._append(step, "eval", metrics)

    def close(self) -> None:
        self._file.close()

    def _append(self, step: int, kind: str, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **finite}, allow_nan=False) + "\n")
        self._file.flush()
