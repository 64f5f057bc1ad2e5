"""metrics.jsonl: one valid JSON object per event."""

from __future__ import annotations

import json
from collections.abc import Callable

from grpoforge.tracking import RunInfo
from grpoforge.types import StepReport
from grpoforge_plugins.trackers.jsonl import Jsonl

MakeReport = Callable[..., StepReport]
NAN, INF = float("nan"), float("inf")


def test_events_are_lines_in_order(run: RunInfo, make_report: MakeReport) -> None:
    tracker = Jsonl(run)
    tracker.step_finished(make_report(1, metrics={"reward": 0.5, "num_tokens": 40}))
    tracker.evaluated(1, {"eval_pass@1": 0.75})
    tracker.close()
    assert (run.run_dir / "metrics.jsonl").read_text() == (
        '{"step": 1, "kind": "train", "reward": 0.5, "num_tokens": 40}\n'
        '{"step": 1, "kind": "eval", "eval_pass@1": 0.75}\n'
    )


def test_what_is_not_finite_is_null(run: RunInfo, make_report: MakeReport) -> None:
    tracker = Jsonl(run)
    tracker.step_finished(make_report(1, metrics={"kl": NAN, "loss": INF, "a": -INF}))
    tracker.close()
    line = (run.run_dir / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "kind": "train", "kl": null, "loss": null, "a": null}\n'


def test_a_line_is_on_disk_before_close(run: RunInfo, make_report: MakeReport) -> None:
    tracker = Jsonl(run)
    tracker.step_finished(make_report(1))
    assert json.loads((run.run_dir / "metrics.jsonl").read_text())["step"] == 1
    tracker.close()


def test_a_resumed_run_appends(run: RunInfo, make_report: MakeReport) -> None:
    for step in (1, 2):
        tracker = Jsonl(run)
        tracker.step_finished(make_report(step))
        tracker.close()
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_hostile_metric_name_is_still_valid_json(run: RunInfo, make_report: MakeReport) -> None:
    tracker = Jsonl(run)
    tracker.step_finished(make_report(1, metrics={"rewards/\ud800\n\x1b/mean": 1.0}))
    tracker.close()
    (line,) = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "kind": "train", "rewards/\ud800\n\x1b/mean": 1.0}
