"""What `train` shows when it ends, and how it says that it was stopped."""

from __future__ import annotations

import io
import sys

import pytest

from grpoforge.cli.display import print_summary
from grpoforge.cli.main import print_error
from grpoforge.errors import Interrupted
from grpoforge.types import RunSummary


def summary(step: int) -> RunSummary:
    return RunSummary(
        run_dir="runs/x",
        step=step,
        metrics_before={"eval_pass@1": 0.25},
        metrics_after={"eval_pass@1": 0.5},
        seconds=3.0,
    )


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def terminal(encoding: str) -> Terminal:
    return Terminal(io.BytesIO(), encoding=encoding)


def test_the_table_is_plain_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(summary(1))
    assert capsys.readouterr().out.splitlines()[:6] == [
        "Held-out problems, 1 step, 3 s",
        "+-----------------------------------------------------+",
        "|                           | before | after (step 1) |",
        "|---------------------------+--------+----------------|",
        "| accuracy (pass@1, greedy) |  25.0% |          50.0% |",
        "+-----------------------------------------------------+",
    ]


@pytest.mark.parametrize(
    ("encoding", "language", "boxes"), [("utf-8", "en_US.UTF-8", True), ("utf-8", "C", False), ("ascii", "", False)]
)
def test_boxes_only_where_they_can_be_shown(
    monkeypatch: pytest.MonkeyPatch, encoding: str, language: str, boxes: bool
) -> None:
    out = terminal(encoding)
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.setenv("LANG", language)
    monkeypatch.setattr(sys, "stdout", out)
    print_summary(summary(24))
    out.flush()
    shown = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "Held-out problems, 24 steps, 3 s" in shown
    assert "after (step 24)" in shown
    assert ("┃" in shown) == boxes


def test_an_interruption_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(Interrupted("stopped after step 13 of 24; everything is saved", "continue with `x`"))
    assert capsys.readouterr().err == "stopped after step 13 of 24; everything is saved\ncontinue with `x`\n"
