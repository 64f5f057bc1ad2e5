"""What a tracker promises: it takes what a run brings, hostile text and NaN included, and stays quiet on stdout."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from grpoforge.testing.general import travels
from grpoforge.testing.kit import Broken, Rule, Subject, expect_same, foreign, rule
from grpoforge.testing.rollouts import HOSTILE, METRICS, make_report
from grpoforge.tracking import RunInfo
from grpoforge.types import StepReport

NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class TrackerSubject(Subject):
    """A tracker, told about a run of three steps in a folder that is thrown away."""

    wording: ClassVar[str] = "the report"

    def question(self) -> StepReport:
        return make_report(1)

    def answer(self, built: Any, question: StepReport) -> str:
        with foreign():
            built.step_finished(question)
        return ""

    @contextlib.contextmanager
    def tracking(self, run: RunInfo) -> Iterator[tuple[Any, Heard]]:
        """A tracker of ``run`` and what it says; closed afterwards."""
        heard = Heard()
        with contextlib.redirect_stdout(heard.out), contextlib.redirect_stderr(heard.err):
            with foreign():
                tracker = self.component.build(self.options, run)
            try:
                yield tracker, heard
            finally:
                with foreign():
                    tracker.close()


class Heard:
    """What was written to the two streams."""

    def __init__(self) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()


def run_info(folder: str, *, first_step: int = 0) -> RunInfo:
    """A run of three steps that writes to ``folder``."""
    return RunInfo(
        run_dir=Path(folder),
        model="tiny-math",
        num_parameters=1000,
        dataset="kit",
        num_train=8,
        num_eval=4,
        rewards=("math x1", "brevity x0.5 (only where math is right)"),
        device="cpu",
        dtype="float32",
        prompts_per_step=3,
        completions_per_prompt=4,
        first_step=first_step,
        max_steps=NUM_STEPS,
        notes=("a note",),
    )


def _told(subject: TrackerSubject, tell: Callable[[Any], None], *, first_step: int = 0) -> Heard:
    """What the tracker of a fresh run says while ``tell`` tells it things."""
    with (
        tempfile.TemporaryDirectory() as folder,
        subject.tracking(run_info(folder, first_step=first_step)) as (tracker, heard),
        foreign(),
    ):
        tell(tracker)
    return heard


@rule("take the run as the only positional parameter of `__init__`; everything else is keyword-only", decisive=True)
def signature(subject: TrackerSubject) -> str:
    """It is built with one thing, the run."""
    names = [one.name for one in subject.component.data if one.required]
    if len(names) != 1:
        raise Broken(f"`__init__` takes {', '.join(names) or 'nothing'}")
    return f"takes {names[0]}"


@rule("expect metrics to come and go: use `metrics.get(name)`", decisive=True)
def a_whole_run(subject: TrackerSubject) -> str:
    """It takes an evaluation, three steps and another evaluation, and is closed."""

    def tell(tracker: Any) -> None:
        tracker.evaluated(0, {"eval_pass@1": 0.25})
        for step in range(1, NUM_STEPS + 1):
            tracker.step_finished(make_report(step))
        tracker.evaluated(NUM_STEPS, {"eval_pass@1": 0.75, "eval/mean_length": 9.0})

    _told(subject, tell)
    return f"{NUM_STEPS} steps, 2 evaluations"


@rule("stdout is data: write to files, or to stderr for people")
def quiet_on_stdout(subject: TrackerSubject) -> str:
    """It writes nothing to standard output."""
    said = _told(subject, lambda tracker: tracker.step_finished(make_report(1))).out.getvalue()
    if said:
        raise Broken(f"it wrote {said[:60]!r}")
    return "nothing on stdout"


@rule("show text through `grpoforge.sanitize.sanitize`, and never as markup")
def hostile_text(subject: TrackerSubject) -> str:
    """Control characters, markup and long lines in completions raise nothing and reach no screen as they are."""

    def tell(tracker: Any) -> None:
        texts = list(HOSTILE.values())
        for step in (1, 2, 3):
            tracker.step_finished(make_report(step, texts[step - 1 :: 3]))

    said = _told(subject, tell).err.getvalue()
    for text in ("\x1b[2J", "\x1b]0;", "\x07", "\u202e"):
        if text in said:
            raise Broken(f"{text!r} of a completion was written to stderr as it is")
    return f"{len(HOSTILE)} texts"


@rule("write NaN as null or leave it out; skip metrics that you do not find")
def odd_numbers(subject: TrackerSubject) -> str:
    """Metrics that are NaN or infinite, unknown, or missing raise nothing."""

    def tell(tracker: Any) -> None:
        nan, inf = float("nan"), float("inf")
        tracker.evaluated(0, {"eval_pass@1": nan})
        tracker.step_finished(make_report(1, metrics=dict.fromkeys(METRICS, nan)))
        tracker.step_finished(make_report(2, metrics=dict.fromkeys([*METRICS, "a/new one"], inf)))
        tracker.evaluated(2, {})

    _told(subject, tell)
    return "NaN, infinity, an unknown metric, none at all"


@rule("make `close` do nothing the second time, and work before the first step")
def close_twice(subject: TrackerSubject) -> str:
    """Closing twice, and closing a run that never took a step, raises nothing: it is closed after a failure too."""
    _told(subject, lambda tracker: tracker.close())
    return "closed twice, without a step"


@rule('append to what is there: `open(path, "a")`, and create folders with `exist_ok=True`')
def resumed(subject: TrackerSubject) -> str:
    """A second tracker goes on in the same run directory at a later step."""
    with tempfile.TemporaryDirectory() as folder:
        for first_step in (0, 1):
            with subject.tracking(run_info(folder, first_step=first_step)) as (tracker, _), foreign():
                tracker.step_finished(make_report(first_step + 1))
    return "from step 1 on"


@rule("work on a copy: the engine and the other trackers read the report too")
def leaves_report_alone(subject: TrackerSubject) -> str:
    """The report is as it was afterwards."""
    report, same = make_report(1), make_report(1)
    _told(subject, lambda tracker: tracker.step_finished(report))
    for name in ("advantages", "shares"):
        expect_same(getattr(report, name), getattr(same, name), f"`{name}`")
    expect_same(report.scores.rewards, same.scores.rewards, "`scores.rewards`")
    expect_same(dict(report.metrics), dict(same.metrics), "`metrics`")
    return "advantages, shares, rewards and metrics"


RULES: tuple[Rule[TrackerSubject], ...] = (
    signature,
    a_whole_run,
    quiet_on_stdout,
    hostile_text,
    odd_numbers,
    close_twice,
    resumed,
    leaves_report_alone,
    travels,
)
