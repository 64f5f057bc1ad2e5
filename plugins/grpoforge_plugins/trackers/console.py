"""The screen: what is being trained, how far it is, the numbers that matter, and what the model says.

Everything goes to stderr, because stdout is data. A terminal gets a live region under scrolling text; a pipe,
a log file or a dumb terminal gets plain lines. Model text is hostile: it is sanitized, shown only as
``rich.text.Text`` (never markup), and cut to a few lines.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpoforge.tracking import RunInfo, sample_question, sample_row
from grpoforge_plugins.trackers import wording

if TYPE_CHECKING:
    from grpoforge.types import StepReport, Tracker

Clock = Callable[[], float]


class Console:
    """Shows a run on stderr: a live region on a terminal, one plain line per step elsewhere.

    Honours ``NO_COLOR`` and ``TERM=dumb``; under ``LANG=C`` it writes ASCII only.
    """

    def __init__(
        self,
        run: RunInfo,
        *,
        sample_every: Annotated[int, Field(ge=0), "steps between samples on a terminal; 0: none"] = 10,
        every_seconds: Annotated[float, Field(ge=0), "least time between lines without a terminal"] = 5.0,
    ) -> None:
        console = make_console()
        pace = Pace(run.first_step, run.max_steps, time.monotonic)
        self._display: Tracker
        if console.is_interactive and console.is_terminal:
            self._display = LiveDisplay(run, console, pace, sample_every=sample_every)
        else:
            self._display = PlainLines(run, console, pace, every_seconds=every_seconds)

    def step_finished(self, report: StepReport) -> None:
        self._display.step_finished(report)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._display.evaluated(step, metrics)

    def close(self) -> None:
        self._display.close()


def make_console() -> Terminal:
    """A rich console on stderr, without markup; interactive only on a real terminal, FORCE_COLOR or not."""
    is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    is_interactive = sys.stderr.isatty() and not is_dumb
    return Terminal(stderr=True, markup=False, emoji=False, highlight=False, force_interactive=is_interactive)


class Pace:
    """How far the run is and when it will be done, from the steps of this process."""

    def __init__(self, first_step: int, max_steps: int, clock: Clock) -> None:
        self.step = first_step
        self.max_steps = max_steps
        self._first_step = first_step
        self._clock = clock
        self._started = self._steps_began = clock()
        self._finish: float | None = None

    def evaluated(self) -> None:
        """Note that an evaluation has just finished: one before the first step says nothing of the pace."""
        if self._finish is None:
            self._steps_began = self._clock()

    def advance(self, step: int) -> None:
        """Note that ``step`` has just finished."""
        self.step = step
        now = self._clock()
        seconds_per_step = (now - self._steps_began) / max(step - self._first_step, 1)
        self._finish = now + seconds_per_step * (self.max_steps - step)

    @property
    def fraction(self) -> float:
        """Part of the run that is done, within 0 and 1."""
        return min(self.step / self.max_steps, 1.0) if self.max_steps > 0 else 1.0

    @property
    def now(self) -> float:
        """Seconds on the clock."""
        return self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since this process began."""
        return self._clock() - self._started

    @property
    def remaining(self) -> float | None:
        """Seconds to go at the mean pace so far; None before the first step and after the last."""
        if self._finish is None or self.step >= self.max_steps:
            return None
        return max(self._finish - self._clock(), 0.0)


class PlainLines:
    """A line per step, at most one per ``every_seconds``, the first and the last always; no control codes."""

    def __init__(self, run: RunInfo, console: Terminal, pace: Pace, *, every_seconds: float) -> None:
        self._console = console
        self._pace = pace
        self._glyphs = wording.choose_glyphs(console.encoding, os.environ)
        self._every_seconds = every_seconds
        self._next_line_at = pace.now
        self._held_back = ""
        self._has_warned = False
        self._print("grpoforge")
        for label, text in wording.header_rows(run):
            self._print(f"  {label:<8} {text}")

    def step_finished(self, report: StepReport) -> None:
        self._pace.advance(report.step)
        self._held_back = self._line(report)
        if self._pace.now >= self._next_line_at or report.step >= self._pace.max_steps:
            self._release()
        warning = wording.teaches_nothing(report.step, report.metrics)
        if warning and not self._has_warned:
            self._has_warned = True
            self._print(warning)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.evaluated()
        self._print(wording.eval_line(step, metrics))

    def close(self) -> None:
        if self._held_back:
            self._release()

    def _line(self, report: StepReport) -> str:
        total = f"{self._pace.max_steps}"
        parts = [f"step {report.step:>{len(total)}}/{total}"]
        parts += [f"{label} {value}" for label, value in wording.step_numbers(report.metrics)]
        if self._pace.remaining is not None:
            parts.append(f"eta {wording.duration(self._pace.remaining)}")
        return "  ".join(parts)

    def _release(self) -> None:
        self._print(self._held_back)
        self._held_back = ""
        self._next_line_at = self._pace.now + self._every_seconds

    def _print(self, line: str) -> None:
        # soft_wrap: a step is one line of the log however narrow the terminal, so that grep and cut work.
        self._console.print(Text(self._glyphs.fit(line)), soft_wrap=True)


class LiveDisplay:
    """A header; at the bottom a progress bar and the step's numbers; samples and evaluations above them."""

    def __init__(self, run: RunInfo, console: Terminal, pace: Pace, *, sample_every: int) -> None:
        self._console = console
        self._pace = pace
        self._glyphs = wording.choose_glyphs(console.encoding, os.environ)
        self._sample_every = sample_every
        self._rewards: list[float] = []
        self._numbers: list[tuple[str, str]] = []
        self._is_closed = False
        self._has_warned = False
        console.print(self._header(run))
        # What others print on the terminal must go above the region; a piped stdout is data, left as it is.
        self._live = Live(console=console, get_renderable=self._region, redirect_stdout=sys.stdout.isatty())
        self._live.start(refresh=True)

    def step_finished(self, report: StepReport) -> None:
        self._pace.advance(report.step)
        self._rewards.append(report.metrics.get("reward", float("nan")))
        self._numbers = wording.step_numbers(report.metrics)
        if self._sample_every and report.step % self._sample_every == 0:
            self._print_above(self._sample(report))
        warning = wording.teaches_nothing(report.step, report.metrics)
        if warning and not self._has_warned:
            self._has_warned = True
            self._print_above(self._text(warning, "yellow"))
        self._live.refresh()

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.evaluated()
        self._print_above(self._text(wording.eval_line(step, metrics), "bold magenta"))

    def close(self) -> None:
        self._is_closed = True
        self._live.stop()

    def _print_above(self, block: RenderableType) -> None:
        self._console.print(Padding(block, (1, 1, 0, 1)))

    def _text(self, text: str, style: str = "") -> Text:
        return Text(self._glyphs.fit(text), style=style, overflow="fold")

    def _header(self, run: RunInfo) -> Panel:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in wording.header_rows(run):
            table.add_row(self._text(label, "dim"), self._text(text))
        title = Text("grpoforge", style="bold cyan")
        return Panel(table, title=title, title_align="left", box=self._glyphs.border, border_style="cyan")

    def _sample(self, report: StepReport) -> Group:
        turn, names = report.step // self._sample_every, report.scores.names
        row = sample_row(report, turn)
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        parts = [
            ("prompt", self._excerpt(sample_question(report, turn)), ""),
            ("completion", self._excerpt(row["completion"]), "cyan"),
            ("rewards", wording.rewards_line(row, names), ""),
            ("advantage", wording.advantage_line(row, names), "green" if row["advantage"] > 0 else ""),
        ]
        for label, text, style in parts:
            table.add_row(self._text(label, "dim"), self._text(text, style))
        return Group(self._text(wording.sample_title(row), "bold"), table)

    def _excerpt(self, text: str) -> str:
        """At most four lines, as wide as the terminal leaves beside the labels."""
        beside_labels = max(self._console.width - 14, 12)
        return wording.excerpt(self._glyphs.fit(text), max_lines=4, max_chars=min(4 * beside_labels, 400))

    def _region(self) -> Group:
        """The live region at this moment; also called from rich's refresh thread, so it only reads."""
        return Group(Text(), self._progress(), *self._packed_numbers())

    def _progress(self) -> Text:
        pace = self._pace
        before = f" step {pace.step}/{pace.max_steps} "
        after = f" {pace.fraction:4.0%}  {wording.duration(pace.elapsed)}"
        if pace.remaining is not None and not self._is_closed:
            after += f"  eta {wording.duration(pace.remaining)}"
        width = max(self._console.width - len(before) - len(after) - 1, 0)
        num_done = int(width * pace.fraction)
        done, left = self._glyphs.done * num_done, self._glyphs.left * (width - num_done)
        return Text.assemble((before, "bold"), (done, "cyan"), (left, "dim"), after)

    def _packed_numbers(self) -> list[Text]:
        if not self._numbers:
            return [Text(" waiting for the first step", style="dim")]
        fit = self._glyphs.fit
        items = [Text.assemble((f"{fit(label)} ", "dim"), value) for label, value in self._numbers]
        course = wording.sparkline(self._rewards, 16, self._glyphs.sparks)
        if course:
            items[0].append(f" {course}", "green")
        return pack(items, self._console.width - 1)


def pack(items: list[Text], width: int) -> list[Text]:
    """``items`` in their order on as few lines of ``width`` columns as they need; no item is broken."""
    lines = [Text(" ")]
    for item in items:
        if lines[-1].cell_len > 1 and lines[-1].cell_len + item.cell_len + 2 > width:
            lines.append(Text(" "))
        lines[-1].append("  " if lines[-1].cell_len > 1 else "").append_text(item)
    return lines
