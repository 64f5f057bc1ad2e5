"""The loop around the step: evaluate, save, resume, report, stop."""

from __future__ import annotations

import dataclasses
import logging
import math
import resource
import shlex
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpoforge.data import PromptSource
from grpoforge.engine import Engine
from grpoforge.errors import CheckpointError, ConfigError, GrpoforgeError, Interrupted, RunFailed, suggest
from grpoforge.evaluation import Evaluation
from grpoforge.interrupt import Interruption
from grpoforge.learner import Learner
from grpoforge.run_dir import RunDir
from grpoforge.saver import Progress, Saver
from grpoforge.seeds import mix
from grpoforge.types import RunSummary, StepReport, Tracker

logger = logging.getLogger(__name__)

OUT_OF_MEMORY_HINT = (
    "lower `batch.micro_batch_size` (update), `sampler.batch_size` (rollouts) or `eval.batch_size` (evaluation); "
    "`model.gradient_checkpointing` and `model.lora.r` help too"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When things happen, in steps; 0 means only at the ends."""

    max_steps: int
    prompts_per_step: int
    """Over all ranks."""
    eval_every: int
    checkpoint_every: int
    keep_last: int
    best_metric: str
    best_direction: str
    """``max`` or ``min``."""
    seed: int


class Trainer:
    """Runs steps until the schedule ends or a signal asks to stop; a step is the unit of resuming."""

    def __init__(
        self,
        *,
        engine: Engine,
        train: PromptSource,
        evaluation: Evaluation,
        schedule: Schedule,
        trackers: Sequence[Tracker],
        components: Mapping[str, Any],
        run_dir: RunDir,
        step_finished: Callable[[StepReport], None],
        learners: Sequence[tuple[str, Learner]] = (),
    ) -> None:
        self.engine = engine
        self.train = train
        self.evaluation = evaluation
        self.schedule = schedule
        self.trackers = trackers
        self.components = components
        self.run_dir = run_dir
        self.step_finished = step_finished
        self.learners = learners
        """Components that learn from finished steps, each with its name."""
        self.progress = Progress()
        self._saver = Saver(engine=engine, components=components, run_dir=run_dir, keep_last=schedule.keep_last)
        self._finished_version = engine.policy.version
        self._saved_step = -1

    def run(self) -> RunSummary:
        """Train to the end.

        Raises:
            Interrupted: a signal asked to stop; everything finished is saved.
            RewardError: a reward broke its contract; everything finished is saved.
            RunFailed: the run cannot go on, or its last checkpoint could not be written.
        """
        try:
            with Interruption() as interruption:
                self._loop(interruption)
        finally:
            self._tell(lambda tracker: tracker.close())
        return RunSummary(
            run_dir=str(self.run_dir.path),
            step=self.progress.step,
            metrics_before=self.progress.before,
            metrics_after=self.progress.latest,
            seconds=self.progress.seconds,
        )

    def _loop(self, interruption: Interruption) -> None:
        try:
            self._advance(interruption)
        except torch.OutOfMemoryError as error:
            self._rescue()
            raise RunFailed(f"out of memory after step {self.progress.step}: {error}", OUT_OF_MEMORY_HINT) from error
        except Exception:
            self._rescue()
            raise
        if self._saved_step != self.progress.step:
            self._save_last()
        if not self.is_finished:
            raise Interrupted(
                f"stopped after step {self.progress.step} of {self.schedule.max_steps}; everything is saved",
                f"continue with `{self._resume_command}`",
            )

    def _advance(self, interruption: Interruption) -> None:
        """Steps, evaluations and checkpoints until the schedule ends or a signal asks to stop."""
        if not self.progress.before:
            self.progress.before = self.evaluate()
        self._require_best_metric(self.progress.before)
        while not self.is_finished and not self._stop(interruption):
            self.take_step()
            due = self._is_due(self.schedule.checkpoint_every)
            if self._is_due(self.schedule.eval_every) or self.is_finished:
                due = self._note_best(self.evaluate()) or due
            if due and not self.is_finished:
                self._save_or_warn()

    def _rescue(self) -> None:
        """Save the steps that are finished when something failed after them, and say how to go on.

        Only where the policy still holds the last finished step: a failure between two updates leaves it elsewhere.
        Several processes do not meet any more at this point and keep what they saved last.
        """
        is_between_steps = self._finished_version == self.engine.policy.version
        if self._saved_step == self.progress.step or not is_between_steps or self.engine.workers.size > 1:
            return
        if self.progress.step > 0 and self._save_or_warn():
            logger.info("step %d is saved; `%s` goes on from there", self.progress.step, self._resume_command)

    @property
    def is_finished(self) -> bool:
        """True when every step of the schedule is taken."""
        return self.progress.step >= self.schedule.max_steps

    @property
    def _resume_command(self) -> str:
        return f"grpoforge train --resume {shlex.quote(str(self.run_dir.path))}"

    def _stop(self, interruption: Interruption) -> bool:
        return self.engine.workers.any(interruption.requested)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def take_step(self) -> None:
        """One step of the engine, reported to trackers and plugins."""
        start = time.perf_counter()
        step = self.progress.step
        workers = self.engine.workers
        size = self.schedule.prompts_per_step
        share = workers.share(size)
        report = self.engine.step(
            self.train.at_step(step, size)[share],
            step=step + 1,
            seed=mix(self.schedule.seed, step, workers.rank),
            more=lambda draw: self.train.extra(step, draw, size)[share],
        )
        report = self._teach(report)
        seconds = time.perf_counter() - start
        self.progress.step += 1
        self.progress.seconds += seconds
        self._finished_version = self.engine.policy.version
        self._publish(report, seconds)

    def _teach(self, report: StepReport) -> StepReport:
        """Let the components that learn learn from the step; returns its report with what they measured.

        Raises:
            RunFailed: one of them failed; the step counts as not taken, so that resuming teaches it again.
        """
        if not self.learners:
            return report
        start = time.perf_counter()
        metrics = dict(report.metrics)
        for name, learner in self.learners:
            try:
                lessons = self.engine.workers.gather_values(learner.lessons(report, name))
                metrics |= learner.learn(lessons)
            except GrpoforgeError:
                raise
            except Exception as error:  # the boundary: a component is foreign code
                raise failed(f"`{name}`, learning from step {report.step},", error) from error
        return dataclasses.replace(report, metrics=metrics | {"time/learn": time.perf_counter() - start})

    def _publish(self, report: StepReport, seconds: float) -> None:
        workers = self.engine.workers
        sampled = workers.sum(sum(len(completion.token_ids) for completion in report.rollouts.flat()))
        read = workers.sum(sum(len(prompt.token_ids) for prompt in report.rollouts.flat_prompts()))
        self.progress.num_tokens += int(sampled + read)
        metrics = {
            **report.metrics,
            "step_time": seconds,
            "num_tokens": float(self.progress.num_tokens),
            "tokens_per_second": sampled / seconds,
            "mem/peak_gb": peak_memory_gb(),
        }
        report = dataclasses.replace(report, metrics=metrics)
        self._tell(lambda tracker: tracker.step_finished(report))
        self.step_finished(report)

    def _tell(self, report: Callable[[Tracker], None]) -> None:
        """Hand every tracker its report. One that cannot write (disk full) costs its record, not the run.

        Raises:
            RunFailed: a tracker failed in any other way.
        """
        for tracker in self.trackers:
            name = type(tracker).__name__
            try:
                report(tracker)
            except OSError as error:
                logger.warning("tracker `%s` could not write: %s; training goes on", name, error.strerror or error)
            except Exception as error:  # the boundary: a tracker is foreign code
                raise failed(f"tracker `{name}`", error) from error

    def evaluate(self) -> dict[str, float]:
        """Measure the policy as it is and tell the trackers."""
        start = time.perf_counter()
        metrics = self.evaluation.measure(self.engine.policy)
        metrics["time/eval"] = time.perf_counter() - start
        self.progress.seconds += metrics["time/eval"]
        self.progress.latest = metrics
        self._tell(lambda tracker: tracker.evaluated(self.progress.step, metrics))
        return metrics

    def _note_best(self, metrics: Mapping[str, float]) -> bool:
        """True when this evaluation is the best so far: its checkpoint is kept."""
        value = metrics[self.schedule.best_metric]
        sign = 1.0 if self.schedule.best_direction == "max" else -1.0
        best = self.progress.best_value
        # A value that is not a number (nothing was scored) is never the best: every comparison with it is False.
        if math.isnan(value) or (best is not None and sign * value <= sign * best):
            return False
        self.progress.best_value, self.progress.best_step = value, self.progress.step
        return True

    def _require_best_metric(self, metrics: Mapping[str, float]) -> None:
        """Refuse, before the first step, a best metric that evaluation does not report."""
        name, known = self.schedule.best_metric, sorted(name for name in metrics if name.startswith("eval_"))
        if name not in known:
            raise ConfigError(
                f"`eval.metric` is `{name}`, which evaluation does not report; it has: {', '.join(known)}",
                suggest(name, known),
            )

    def _save_or_warn(self) -> bool:
        """A failed save in the middle of a run is a warning: training goes on and the next one tries again."""
        try:
            self.save()
        except CheckpointError as error:
            if self.engine.workers.is_main:
                logger.warning("%s; training goes on", error.message)
            # The best is the best of what was kept, or `best` would name nothing for the rest of the run.
            self.progress.best_value, self.progress.best_step = self._saver.best_on_disk
            return False
        return True

    def _save_last(self) -> None:
        try:
            self.save()
        except CheckpointError as error:
            hint = f"{error.hint}; `{self._resume_command}` repeats what came after them"
            raise RunFailed(f"{error.message}; the run ends unsaved", hint) from error

    def save(self) -> None:
        """Publish a checkpoint of the step just finished; every rank takes part.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        self._saver.save(self.progress)
        self._saved_step = self.progress.step

    def restore(self, folder: Path) -> None:
        """Continue from ``folder``, a checkpoint that verifies, as if the run had never stopped.

        Raises:
            CheckpointError: the checkpoint belongs to another model, other components or another version.
        """
        self.progress = self._saver.restore(folder)
        self._saved_step = self.progress.step
        self._finished_version = self.engine.policy.version


def failed(what: str, error: Exception) -> RunFailed:
    """The end of a run through foreign code: who failed, how, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return RunFailed(
        f"{what} failed: {type(error).__name__}: {error}{place}",
        "repair it, then continue with `grpoforge train --resume`",
    )


def peak_memory_gb() -> float:
    """Most memory used so far: of the GPU when there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
