"""The screen: exact lines, hostile text, narrow and poor terminals."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping

import pytest
from rich.console import Console as Terminal
from rich.text import Text

from grpoforge.errors import ConfigError
from grpoforge.registry import make_component
from grpoforge.tracking import RunInfo
from grpoforge.types import StepReport
from grpoforge_plugins.trackers.console import Console, LiveDisplay, Pace, PlainLines, pack

MakeReport = Callable[..., StepReport]
OpenDisplay = Callable[..., tuple[LiveDisplay, Terminal]]

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
HOSTILE = [
    "\x1b[2J\x1b[H",
    "\x1b]0;owned\x07",
    "[/INST][bold red]x[/]",
    "[link=http://evil]x",
    "\u202eabc\u202c",
    "\ud800",
    "\x00\x9b2J\r",
    ":smile: ${x} %s {0}",
    "e" + "\u0301" * 5000,
    "\n" * 5000,
    "x" * 300_000,
    "",
]


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def english_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pace(run: RunInfo, clock: FakeClock) -> Pace:
    return Pace(run.first_step, run.max_steps, clock)


def pipe(width: int = 80) -> Terminal:
    return Terminal(file=io.StringIO(), width=width, force_terminal=False)


@pytest.fixture
def open_display(run: RunInfo, pace: Pace) -> Iterator[OpenDisplay]:
    """Opens a live display on a terminal in memory, and closes it whatever happens."""
    opened: list[LiveDisplay] = []

    def open_one(width: int = 80, sample_every: int = 10) -> tuple[LiveDisplay, Terminal]:
        terminal = Terminal(file=io.StringIO(), width=width, height=50, force_terminal=True, markup=False)
        display = LiveDisplay(run, terminal, pace, sample_every=sample_every)
        opened.append(display)
        return display, terminal

    yield open_one
    for display in opened:
        display.close()


def written(terminal: Terminal) -> str:
    assert isinstance(terminal.file, io.StringIO)
    return terminal.file.getvalue()


def shown(terminal: Terminal) -> list[str]:
    """What was written, without control codes, line by line; redrawn regions follow each other."""
    return [line.rstrip() for line in CONTROL.sub("", written(terminal)).splitlines()]


def test_pace_ignores_the_evaluation_before_the_first_step(clock: FakeClock) -> None:
    pace = Pace(0, 40, clock)
    assert pace.remaining is None
    assert pace.fraction == 0.0
    clock.seconds = 30.0
    pace.evaluated()
    clock.seconds = 32.0
    pace.advance(1)
    assert pace.remaining == 78.0
    assert pace.fraction == 0.025
    assert pace.elapsed == 32.0
    clock.seconds = 33.0
    assert pace.remaining == 77.0
    pace.advance(40)
    assert pace.remaining is None
    assert pace.fraction == 1.0


def test_pace_of_a_resumed_run_counts_its_own_steps(clock: FakeClock) -> None:
    pace = Pace(20, 40, clock)
    assert pace.fraction == 0.5
    clock.seconds = 4.0
    pace.advance(22)
    assert pace.remaining == 36.0


def test_plain_lines(run: RunInfo, make_report: MakeReport, pace: Pace, clock: FakeClock) -> None:
    terminal = pipe(width=60)
    display = PlainLines(dataclasses.replace(run, notes=()), terminal, pace, every_seconds=5.0)
    clock.seconds = 2.0
    display.step_finished(make_report(1))
    display.evaluated(1, {"eval_pass@1": 0.712, "eval_completions/mean_length": 34.12})
    display.close()
    assert shown(terminal) == [
        "grpoforge",
        "  model    tiny (812K parameters) on cpu, float32",
        "  data     tiny-math: 4,096 prompts to train on, 256 to evaluate",
        "  rewards  math x1",
        "           brevity x0.1 (only where math is right)",
        "  steps    40 in all, each 2 prompts x 2 completions",
        f"  output   {run.run_dir}",
        "step  1/40  reward 0.750  math 0.500  brevity 0.125  length 34.1  kl 0.0131  tokens/s 4.12K  eta 1:18",
        "eval at step 1: pass@1 71.2%  length 34.1",
    ]
    assert written(terminal).isascii()
    assert "\x1b" not in written(terminal)


def steps_shown(terminal: Terminal) -> list[str]:
    return [line.split("  reward")[0] for line in shown(terminal) if line.startswith("step")]


def test_plain_lines_come_seconds_apart(run: RunInfo, make_report: MakeReport, pace: Pace, clock: FakeClock) -> None:
    terminal = pipe()
    display = PlainLines(run, terminal, pace, every_seconds=5.0)
    for step in range(1, 41):
        clock.seconds += 0.25
        display.step_finished(make_report(step))
    display.close()
    assert steps_shown(terminal) == ["step  1/40", "step 21/40", "step 40/40"]


def test_plain_lines_show_the_step_at_which_a_run_stopped(run: RunInfo, make_report: MakeReport, pace: Pace) -> None:
    terminal = pipe()
    display = PlainLines(run, terminal, pace, every_seconds=5.0)
    for step in (1, 2, 3):
        display.step_finished(make_report(step))
    display.close()
    display.close()
    assert steps_shown(terminal) == ["step  1/40", "step  3/40"]


def test_a_nan_is_shown(run: RunInfo, make_report: MakeReport, pace: Pace) -> None:
    terminal = pipe()
    display = PlainLines(run, terminal, pace, every_seconds=0.0)
    display.step_finished(make_report(40, metrics={"reward": float("nan"), "kl": float("nan")}))
    assert shown(terminal)[-1] == "step 40/40  reward nan  kl nan"


def test_header_of_a_terminal(open_display: OpenDisplay, run: RunInfo) -> None:
    _, terminal = open_display(width=60)
    lines = shown(terminal)
    assert lines[0] == "╭─ grpoforge ──────────────────────────────────────────────╮"
    assert lines[1] == "│ model    tiny (812K parameters) on cpu, float32          │"
    assert lines[2] == "│ data     tiny-math: 4,096 prompts to train on, 256 to    │"
    assert lines[3] == "│          evaluate                                        │"
    assert lines[4] == "│ rewards  math x1                                         │"
    assert lines[5] == "│          brevity x0.1 (only where math is right)         │"
    assert lines[-2:] == [" step 0/40 " + "─" * 37 + "   0%  0:00", " waiting for the first step"]


def test_live_region(open_display: OpenDisplay, make_report: MakeReport, clock: FakeClock) -> None:
    display, terminal = open_display(width=60, sample_every=0)
    for step, reward in ((1, 0.0), (10, 0.75)):
        clock.seconds = 2.0 * step
        display.step_finished(make_report(step, metrics={**make_report(1).metrics, "reward": reward}))
    assert shown(terminal)[-3:] == [
        " step 10/40 ━━━━━━────────────────────  25%  0:20  eta 1:00",
        " reward 0.750 ▁█  math 0.500  brevity 0.125  length 34.1",
        " kl 0.0131  tokens/s 4.12K",
    ]


def test_a_closed_region_promises_nothing(open_display: OpenDisplay, make_report: MakeReport) -> None:
    display, terminal = open_display(width=60)
    display.step_finished(make_report(1))
    display.close()
    display.close()
    last_bar = [line for line in shown(terminal) if line.startswith(" step ")][-1]
    assert "eta" not in last_bar
    assert last_bar.endswith("   2%  0:00")
    assert written(terminal).endswith("\x1b[?25h")


def test_sample_and_evaluation_above_the_region(open_display: OpenDisplay, make_report: MakeReport) -> None:
    display, terminal = open_display(width=80, sample_every=2)
    display.step_finished(make_report(1))
    assert not any("sample at" in line for line in shown(terminal))
    display.step_finished(make_report(2))
    display.evaluated(2, {"eval_pass@1": 0.712, "eval_completions/mean_length": 34.12})
    lines = shown(terminal)
    start = lines.index(" sample at step 2: 2 tokens, temperature 0.7, cut at the token limit")
    assert lines[start + 1 : start + 5] == [
        " prompt      2+2?",
        " completion  4",
        " rewards     math 0, brevity 0 (0.5 before its gate), total 0",
        " advantage   -0.75 = math -0.50, brevity -0.25",
    ]
    assert " eval at step 2: pass@1 71.2%  length 34.1" in lines


def test_a_sample_shows_four_lines_of_the_question_without_its_template(
    open_display: OpenDisplay, make_report: MakeReport
) -> None:
    display, terminal = open_display(width=60, sample_every=1)
    report = make_report(1, text="a\nb\nc\nd")
    asked = dataclasses.replace(report.rollouts.prompts[0], text="<user>2+2?<bot>", columns={"question": "2+2?"})
    rollouts = dataclasses.replace(report.rollouts, prompts=(asked, asked))
    display.step_finished(dataclasses.replace(report, rollouts=rollouts))
    lines = shown(terminal)
    start = lines.index(" prompt      2+2?")
    assert lines[start + 1 : start + 5] == [" completion  a", "             b", "             c", "             d"]


NO_SIGNAL: Mapping[str, float] = {"reward": 0.0, "frac_reward_zero_std": 1.0}
WARNING = "warning: step 2: no group has rewards that differ: this step teaches nothing"


def test_a_step_that_teaches_nothing_is_said_once_in_plain_lines(
    run: RunInfo, make_report: MakeReport, pace: Pace
) -> None:
    terminal = pipe()
    display = PlainLines(run, terminal, pace, every_seconds=5.0)
    display.step_finished(make_report(1))
    for step in (2, 3):
        display.step_finished(make_report(step, metrics=NO_SIGNAL))
    assert [line for line in shown(terminal) if "warning" in line] == [WARNING]


def test_a_step_that_teaches_nothing_is_said_once_on_a_terminal(
    open_display: OpenDisplay, make_report: MakeReport
) -> None:
    display, terminal = open_display(width=100, sample_every=0)
    display.step_finished(make_report(1))
    for step in (2, 3):
        display.step_finished(make_report(step, metrics=NO_SIGNAL))
    assert [line for line in shown(terminal) if "warning" in line] == [" " + WARNING]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("width", [20, 60])
def test_hostile_completions_only_show(
    text: str, width: int, open_display: OpenDisplay, make_report: MakeReport
) -> None:
    display, terminal = open_display(width=width, sample_every=1)
    display.step_finished(make_report(1, text=text))
    display.close()
    written(terminal).encode("utf-8")
    remaining = CONTROL.sub("", written(terminal))
    assert not set(remaining) & set("\x00\x07\x1b\x9b\u202e\u202c")
    assert "\x1b[2J" not in written(terminal)
    assert "\x1b]" not in written(terminal)
    assert len(shown(terminal)) < 130


def test_markup_is_text(open_display: OpenDisplay, make_report: MakeReport) -> None:
    display, terminal = open_display(sample_every=1)
    display.step_finished(make_report(1, text="[/INST][bold red]x[/]\x1b[2J"))
    assert " completion  [/INST][bold red]x[/]\\x1b[2J" in shown(terminal)


def test_ascii_terminal(
    monkeypatch: pytest.MonkeyPatch,
    open_display: OpenDisplay,
    make_report: MakeReport,
) -> None:
    monkeypatch.setenv("LANG", "C")
    monkeypatch.setenv("LC_CTYPE", "C.UTF-8")
    display, terminal = open_display(width=60, sample_every=1)
    display.step_finished(make_report(10, text="日本 é"))
    display.evaluated(10, {"eval_é@1": 0.5})
    lines = shown(terminal)
    assert written(terminal).isascii()
    assert lines[0] == "+- grpoforge ----------------------------------------------+"
    assert " completion  \\u65e5\\u672c \\xe9" in lines
    assert " step 10/40 ######--------------------  25%  0:00  eta 0:00" in lines


def test_no_color_has_no_colors(
    monkeypatch: pytest.MonkeyPatch,
    open_display: OpenDisplay,
    make_report: MakeReport,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    display, terminal = open_display(sample_every=1)
    display.step_finished(make_report(1))
    styles = set(re.findall(r"\x1b\[([0-9;]*)m", written(terminal)))
    assert styles <= {"0", "1", "2"}, "bold and dim only"


class FakeTerminalStream(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "display"),
    [
        (FakeTerminalStream(), {}, LiveDisplay),
        (FakeTerminalStream(), {"TERM": "dumb"}, PlainLines),
        (io.StringIO(), {}, PlainLines),
        (io.StringIO(), {"FORCE_COLOR": "1"}, PlainLines),
    ],
)
def test_only_a_real_terminal_is_live(
    run: RunInfo,
    make_report: MakeReport,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stream: io.StringIO,
    environment: dict[str, str],
    display: type,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        tracker = Console(run)
        try:
            assert type(tracker._display) is display
            tracker.step_finished(make_report(1))
            tracker.evaluated(1, {"eval_pass@1": 0.5})
        finally:
            tracker.close()
    assert "eval at step 1: pass@1 50.0%" in stream.getvalue()
    assert capsys.readouterr().out == "", "stdout is data"


def test_a_piped_stdout_stays_as_it_is_under_the_live_region(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", FakeTerminalStream())
        patch.setattr("sys.stdout", data)
        tracker = Console(run)
        sys.stdout.write("data\n")
        tracker.close()
    assert data.getvalue() == "data\n"


def test_options_are_checked() -> None:
    component = make_component("tracker", "console", "grpoforge", Console)
    assert component.validate({"sample_every": 0}) == {"sample_every": 0, "every_seconds": 5.0}
    with pytest.raises(ConfigError) as caught:
        component.validate({"sample_every": -1})
    assert caught.value.message == (
        "option `sample_every` of tracker `grpoforge:console`: input should be greater than or equal to 0, got `-1`"
    )
    assert caught.value.hint == "`sample_every` is `int`: steps between samples on a terminal; 0: none"


def test_pack_breaks_between_items_only() -> None:
    items = [Text("aaaa"), Text("bbbb"), Text("cccc"), Text("d" * 30)]
    assert [line.plain for line in pack(items, 12)] == [" aaaa  bbbb", " cccc", " " + "d" * 30]
