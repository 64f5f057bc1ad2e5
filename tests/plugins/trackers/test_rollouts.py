"""rollouts/*.parquet: whole files, stated types, safe text."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from pyarrow import parquet

from grpoforge.errors import GrpoforgeError
from grpoforge.tracking import RunInfo
from grpoforge.types import StepReport
from grpoforge_plugins.trackers.rollouts import RolloutsFile

MakeReport = Callable[..., StepReport]


def test_a_file_has_one_row_per_completion(run: RunInfo, make_report: MakeReport) -> None:
    RolloutsFile(run).step_finished(make_report(12))
    rows = parquet.read_table(run.run_dir / "rollouts" / "step-000012.parquet").to_pylist()
    assert len(rows) == 4
    assert rows[1] == {
        "step": 12,
        "prompt_index": 3,
        "origin": "",
        "columns": "{}",
        "prompt": "2+2?",
        "completion": "4",
        "completion_ids": [5, 6],
        "finish_reason": "length",
        "temperature": 0.7,
        "num_tokens": 2,
        "advantage": -0.75,
        "math/raw": 0.0,
        "math/reward": 0.0,
        "math/weighted": 0.0,
        "math/share": -0.5,
        "brevity/raw": 0.5,
        "brevity/reward": 0.0,
        "brevity/weighted": 0.0,
        "brevity/share": -0.25,
    }


def test_shares_keep_float64(run: RunInfo, make_report: MakeReport) -> None:
    report = make_report(1)
    report.shares[0, 0, 0] = 0.1
    RolloutsFile(run).step_finished(report)
    table = parquet.read_table(run.run_dir / "rollouts" / "step-000001.parquet")
    assert str(table.schema.field("math/share").type) == "double"
    assert table["math/share"][0].as_py() == 0.1


def test_hostile_text_is_stored_as_escapes(run: RunInfo, make_report: MakeReport) -> None:
    RolloutsFile(run).step_finished(make_report(1, text="\x1b]0;owned\x07\ud800\u202e[/INST]"))
    table = parquet.read_table(run.run_dir / "rollouts" / "step-000001.parquet")
    assert table["completion"][0].as_py() == "\\x1b]0;owned\\x07\\ud800\\u202e[/INST]"


def test_every_skips_steps_and_zero_writes_none(run: RunInfo, make_report: MakeReport) -> None:
    tenth, never = RolloutsFile(run, every=10), RolloutsFile(run, every=0)
    for step in range(1, 21):
        tenth.step_finished(make_report(step))
        never.step_finished(make_report(step))
    names = sorted(path.name for path in (run.run_dir / "rollouts").iterdir())
    assert names == ["step-000010.parquet", "step-000020.parquet"]


def test_a_failed_write_leaves_nothing_behind(
    run: RunInfo, make_report: MakeReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(table: object, path: object, **options: object) -> None:
        with open(str(path), "wb") as file:
            file.write(b"PAR1")
        raise OSError(28, "No space left on device")

    tracker = RolloutsFile(run)
    monkeypatch.setattr(parquet, "write_table", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        tracker.step_finished(make_report(1))
    assert list((run.run_dir / "rollouts").iterdir()) == []


def test_without_pyarrow_the_run_does_not_start(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(GrpoforgeError) as caught:
        RolloutsFile(run)
    assert caught.value.message.startswith(
        "the tracker `rollouts` writes Parquet files with pyarrow, which cannot be imported: "
    )
    assert caught.value.hint == "run `pip install pyarrow`, or take `rollouts` out of `trackers`"
