"""The loop: what happens when, who is told, and what a failure costs. No model: the engine is a fake."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpoforge import checkpoint
from grpoforge.data import PromptSet
from grpoforge.distributed import Workers
from grpoforge.errors import CheckpointError, ConfigError, Interrupted, RewardError, RunFailed
from grpoforge.run_dir import RunDir
from grpoforge.trainer import Schedule, Trainer
from grpoforge.types import Completion, Prompt, Rollouts, Scores, StepReport

PROMPTS = tuple(Prompt(text=f"{n}?", token_ids=(1, 2, 3), columns={}, index=n) for n in range(6))
REPLY = Completion(
    text="x", token_ids=(4, 5), logprobs=(0.0, 0.0), temperature=1.0, finish_reason="stop", policy_version=0
)


class FakePolicy:
    """Its weights are the steps it has taken."""

    def __init__(self) -> None:
        self.version = 0
        self.steps = torch.zeros(1)

    def save(self, folder: Path) -> None:
        (folder / "steps.txt").write_text(str(int(self.steps)))

    def load_weights(self, folder: Path) -> None:
        self.steps = torch.tensor([float((folder / "steps.txt").read_text())])


class FakeEngine:
    """Notes which prompts each step was given."""

    def __init__(self, workers: Workers) -> None:
        self.workers, self.policy = workers, FakePolicy()
        self.algorithm = SimpleNamespace(drawing=SimpleNamespace(sampler=SimpleNamespace(sync=lambda policy: None)))
        self.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda update: 1 / (1 + update))
        self.prompts: list[list[int]] = []

    def step(self, prompts: Sequence[Prompt], *, step: int, seed: int, more: object) -> StepReport:
        self.prompts.append([prompt.index for prompt in prompts])
        self.policy.steps += 1
        self.policy.version += 1
        self.optimizer.step()
        self.schedule.step()
        rewards = torch.zeros(len(prompts), 2, 1)
        return StepReport(
            step=step,
            metrics={"reward": float(step)},
            rollouts=Rollouts(
                prompts=tuple(prompts), completions=((REPLY, REPLY),) * len(prompts), max_completion_length=2
            ),
            scores=Scores(names=("r",), rewards=rewards, raw=rewards, weights=torch.ones(1), seconds=(0.0,)),
            advantages=torch.zeros(len(prompts), 2).double(),
            shares=rewards.double(),
        )


@dataclass
class Diary:
    """A tracker that writes down what it hears, and fails as it is told."""

    events: list[str] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    fails_at: int | None = None
    error: Exception = field(default_factory=lambda: ZeroDivisionError("by zero"))

    def step_finished(self, report: StepReport) -> None:
        if report.step == self.fails_at:
            raise self.error
        self.events.append(f"step {report.step}")
        self.reports.append(report)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.events.append(f"eval {step}")

    def close(self) -> None:
        self.events.append("close")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Trainer]:
    """`make(diary, max_steps=5, ...)`: a trainer of two prompts per step in `tmp_path/run`."""

    def build(
        diary: Diary, *, workers: Workers | None = None, values: Sequence[float] = (), **schedule: Any
    ) -> Trainer:
        measured = iter([0.0, *values])

        def measure(policy: Any) -> dict[str, float]:
            return {"eval_pass@1": next(measured, 0.0)}

        run_dir = RunDir(tmp_path / "run")
        run_dir.path.mkdir(exist_ok=True)
        settings: dict[str, Any] = {
            "max_steps": 5, "prompts_per_step": 2, "eval_every": 0, "checkpoint_every": 0, "keep_last": 10,
            "best_metric": "eval_pass@1", "best_direction": "max", "seed": 0,
        }  # fmt: skip
        fake: dict[str, Any] = {
            "engine": FakeEngine(workers or Workers()),
            "evaluation": SimpleNamespace(measure=measure),
        }
        return Trainer(
            train=PromptSet(PROMPTS, seed=0),
            schedule=Schedule(**settings | schedule),
            trackers=[diary],
            components={},
            run_dir=run_dir,
            step_finished=lambda report: None,
            **fake,
        )

    return build


def saved(trainer: Trainer) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.published(trainer.run_dir.checkpoints)]


def test_what_happens_when(make: Callable[..., Trainer]) -> None:
    diary = Diary()
    trainer = make(diary, eval_every=2, checkpoint_every=3, values=[0.5, 0.4, 0.6])
    summary = trainer.run()
    assert diary.events == ["eval 0", "step 1", "step 2", "eval 2", "step 3", "step 4", "eval 4", "step 5", "eval 5",
                            "close"]  # fmt: skip
    # 3 is due, 2 and 5 are the best so far; 4 is neither.
    assert saved(trainer) == [2, 3, 5]
    assert checkpoint.best(trainer.run_dir.checkpoints) == trainer.run_dir.checkpoints / "step-000005"
    assert (summary.step, summary.metrics_before["eval_pass@1"], summary.metrics_after["eval_pass@1"]) == (5, 0.0, 0.6)


def test_without_intervals_it_measures_and_saves_at_the_ends(make: Callable[..., Trainer]) -> None:
    diary = Diary()
    trainer = make(diary, max_steps=2)
    trainer.run()
    assert diary.events == ["eval 0", "step 1", "step 2", "eval 2", "close"]
    assert saved(trainer) == [2]


def test_two_passes_over_six_prompts_in_steps_of_two(make: Callable[..., Trainer]) -> None:
    trainer = make(Diary(), max_steps=6)
    trainer.run()
    seen = [index for step in trainer.engine.prompts for index in step]  # type: ignore[attr-defined]
    assert sorted(seen[:6]) == sorted(seen[6:]) == [0, 1, 2, 3, 4, 5]
    assert seen[:6] != seen[6:], "each pass has an order of its own"


def test_what_a_step_reports_besides_the_engine(make: Callable[..., Trainer]) -> None:
    diary = Diary()
    make(diary, max_steps=2).run()
    # Two prompts of three tokens, each read twice, and four completions of two: 12 + 8.
    assert [report.metrics["num_tokens"] for report in diary.reports] == [20.0, 40.0]
    first = diary.reports[0].metrics
    assert first["tokens_per_second"] == pytest.approx(8 / first["step_time"])
    assert first["reward"] == 1.0 and first["mem/peak_gb"] > 0.01


def test_a_tracker_that_cannot_write_is_a_warning(
    make: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    diary = Diary(fails_at=2, error=OSError(28, "No space left on device"))
    make(diary, max_steps=3).run()
    assert diary.events == ["eval 0", "step 1", "step 3", "eval 3", "close"]
    assert caplog.messages == ["tracker `Diary` could not write: No space left on device; training goes on"]


def test_a_tracker_that_is_wrong_stops_the_run_by_name(make: Callable[..., Trainer]) -> None:
    diary = Diary(fails_at=2)
    with pytest.raises(RunFailed) as error:
        make(diary).run()
    assert error.value.message.startswith("tracker `Diary` failed: ZeroDivisionError: by zero at ")
    assert "test_trainer.py:" in error.value.message
    assert error.value.hint == "repair it, then continue with `grpoforge train --resume`"
    assert diary.events == ["eval 0", "step 1", "close"], "closed, whatever happened"


def test_a_failure_loses_no_finished_step(make: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(Diary())
    take_step = trainer.engine.step

    def breaks_at_step_3(prompts: Sequence[Prompt], *, step: int, seed: int, more: object) -> StepReport:
        if step == 3:
            raise RewardError("reward `r` raised ValueError", "fix the reward")
        return take_step(prompts, step=step, seed=seed, more=more)

    trainer.engine.step = breaks_at_step_3  # type: ignore[method-assign]
    with caplog.at_level("INFO", "grpoforge"), pytest.raises(RewardError):
        trainer.run()
    assert saved(trainer) == [2]
    folder = trainer.run_dir.path
    assert caplog.messages == [f"step 2 is saved; `grpoforge train --resume {folder}` goes on from there"]


def test_out_of_memory_says_what_to_lower_and_loses_nothing(make: Callable[..., Trainer]) -> None:
    trainer = make(Diary())
    take_step = trainer.engine.step

    def runs_out(prompts: Sequence[Prompt], *, step: int, seed: int, more: object) -> StepReport:
        if step == 2:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return take_step(prompts, step=step, seed=seed, more=more)

    trainer.engine.step = runs_out  # type: ignore[method-assign]
    with pytest.raises(RunFailed) as error:
        trainer.run()
    assert error.value.message == "out of memory after step 1: tried to allocate 2 GiB"
    assert error.value.hint.startswith("lower `batch.micro_batch_size` (update), `sampler.batch_size` (rollouts)")
    assert saved(trainer) == [1]


def test_a_step_that_was_left_half_way_is_not_saved(make: Callable[..., Trainer]) -> None:
    trainer = make(Diary())

    def moves_and_breaks(prompts: Sequence[Prompt], *, step: int, seed: int, more: object) -> StepReport:
        trainer.engine.policy.version += 1
        raise RunFailed("the gradient norm is nan", "lower the learning rate")

    trainer.engine.step = moves_and_breaks  # type: ignore[method-assign]
    with pytest.raises(RunFailed):
        trainer.run()
    assert saved(trainer) == []


def test_a_best_value_that_is_not_a_number_is_never_the_best(make: Callable[..., Trainer]) -> None:
    trainer = make(Diary(), max_steps=3, eval_every=1, values=[0.9, float("nan"), 0.1])
    trainer.run()
    assert checkpoint.best(trainer.run_dir.checkpoints) == trainer.run_dir.checkpoints / "step-000001"


def test_a_misspelled_best_metric_is_refused_before_the_first_step(make: Callable[..., Trainer]) -> None:
    diary = Diary()
    with pytest.raises(ConfigError) as error:
        make(diary, best_metric="eval_pas@1").run()
    assert error.value.message == (
        "`eval.metric` is `eval_pas@1`, which evaluation does not report; it has: eval_pass@1"
    )
    assert error.value.hint == "did you mean `eval_pass@1`?"
    assert diary.events == ["eval 0", "close"]


def test_a_signal_stops_after_the_step(make: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    class Pressed(Diary):
        def step_finished(self, report: StepReport) -> None:
            super().step_finished(report)
            if report.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    diary = Pressed()
    trainer = make(diary, checkpoint_every=2)
    with pytest.raises(Interrupted) as error:
        trainer.run()
    assert error.value.exit_code == 130
    assert error.value.message == "stopped after step 2 of 5; everything is saved"
    assert diary.events == ["eval 0", "step 1", "step 2", "close"]
    assert saved(trainer) == [2]


def test_a_path_with_spaces_is_quoted_in_the_hint(make: Callable[..., Trainer]) -> None:
    trainer = make(Diary())
    trainer.run_dir = RunDir(Path("my runs/one"))
    assert trainer._resume_command == "grpoforge train --resume 'my runs/one'"


@dataclass(frozen=True, slots=True)
class OneOfTwo(Workers):
    """A rank whose peer, the main one, has failed to save."""

    def any(self, flag: bool) -> bool:
        return True

    def sum(self, number: float) -> float:
        return number


def test_every_rank_hears_that_the_main_one_could_not_save(make: Callable[..., Trainer]) -> None:
    trainer = make(Diary(), workers=OneOfTwo(rank=1, size=2))
    with pytest.raises(CheckpointError, match="the main process could not write its checkpoint"):
        trainer.save()
    assert not trainer._save_or_warn()
    assert saved(trainer) == [], "only the main rank writes"


def test_restore_takes_the_moments_and_the_place_but_not_the_settings(make: Callable[..., Trainer]) -> None:
    trainer = make(Diary(), max_steps=3, values=[0.7])
    trainer.run()
    folder = trainer.run_dir.checkpoints / "step-000003"
    other = make(Diary(), max_steps=4)
    engine: Any = other.engine
    engine.optimizer.param_groups[0]["weight_decay"] = 0.5
    engine.schedule.base_lrs = [2.0]
    other.restore(folder)
    assert engine.policy.version == 3 and int(engine.policy.steps) == 3
    assert engine.optimizer.param_groups[0]["weight_decay"] == 0.5
    # Twice the rate that the run began with, over 1 + 3 updates.
    assert engine.optimizer.param_groups[0]["lr"] == engine.schedule.get_last_lr()[0] == 0.5
    assert (other.progress.step, other.progress.best_value, other.progress.best_step) == (3, 0.7, 3)


def test_the_best_is_forgotten_with_its_checkpoint(make: Callable[..., Trainer]) -> None:
    trainer = make(Diary(), max_steps=2, eval_every=1, values=[0.9, 0.1])
    trainer.run()
    folder = trainer.run_dir.checkpoints
    assert checkpoint.best(folder) == folder / "step-000001"
    (folder / "best").unlink()
    (folder / "step-000001").rename(folder / "elsewhere")
    other = make(Diary(), max_steps=3, eval_every=1, values=[])
    other.restore(folder / "step-000002")
    assert (other.progress.best_value, other.progress.best_step) == (None, None)


def test_state_of_another_version_is_refused(make: Callable[..., Trainer]) -> None:
    trainer = make(Diary(), max_steps=1)
    trainer.run()
    folder = trainer.run_dir.checkpoints / "step-000001"
    path = folder / "trainer_state.json"
    document = json.loads(path.read_text())
    document["progress"]["mood"] = "good"
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as error:
        make(Diary()).restore(folder)
    assert error.value.message.startswith("checkpoint step-000001 does not fit this run: TypeError: ")
    assert error.value.hint == "resume with the model, the components and the version that the run was started with"


def test_a_failed_save_names_no_best(make: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(Diary(), max_steps=3, eval_every=1, values=[0.9, 0.5, 0.1])
    write = trainer.engine.policy.save

    def full_at_step_1(folder: Path) -> None:
        if trainer.progress.step == 1:
            raise OSError(28, "No space left on device")
        write(folder)

    trainer.engine.policy.save = full_at_step_1  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "grpoforge"):
        trainer.run()
    assert checkpoint.best(trainer.run_dir.checkpoints) == trainer.run_dir.checkpoints / "step-000002"
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("; training goes on")


class Pupil:
    """Learns the number of each step, and fails as it is told."""

    def __init__(self, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.learned: list[Any] = []
        self.fails_at, self.error = fails_at, error or ZeroDivisionError("by zero")

    def prepare(self) -> None:
        """Nothing to load."""

    def lessons(self, report: StepReport, name: str) -> list[Any]:
        return [[name, report.step, report.metrics["reward"]]]

    def learn(self, lessons: Sequence[Any]) -> dict[str, float]:
        if lessons[0][1] == self.fails_at:
            raise self.error
        self.learned += lessons
        return {"pupil/lessons": float(len(self.learned))}

    def state_dict(self) -> dict[str, Any]:
        return {"learned": self.learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learned = state["learned"]


def taught(make: Callable[..., Trainer], pupil: Pupil, **schedule: Any) -> tuple[Trainer, Diary]:
    diary = Diary()
    trainer = make(diary, **schedule)
    trainer.learners, trainer.components["pupil"] = [("pupil", pupil)], pupil
    return trainer, diary


def test_what_learns_is_told_of_each_step_before_it_is_reported_and_saved(make: Callable[..., Trainer]) -> None:
    pupil = Pupil()
    trainer, diary = taught(make, pupil, max_steps=3, checkpoint_every=1)
    trainer.run()
    assert pupil.learned == [["pupil", step, float(step)] for step in (1, 2, 3)]
    assert [report.metrics["pupil/lessons"] for report in diary.reports] == [1.0, 2.0, 3.0]
    assert all(report.metrics["time/learn"] >= 0 for report in diary.reports)
    state = json.loads((trainer.run_dir.checkpoints / "step-000002/trainer_state.json").read_text())
    assert len(state["components"]["pupil"]["learned"]) == 2


def test_what_fails_to_learn_is_named_and_its_step_is_taken_again(make: Callable[..., Trainer]) -> None:
    trainer, diary = taught(make, Pupil(fails_at=3), checkpoint_every=2)
    with pytest.raises(RunFailed) as failed:
        trainer.run()
    assert failed.value.message.startswith("`pupil`, learning from step 3, failed: ZeroDivisionError: by zero at ")
    assert failed.value.hint == "repair it, then continue with `grpoforge train --resume`"
    # Step 3 moved the policy and was not learned from: nothing of it is kept.
    assert saved(trainer) == [2] and [report.step for report in diary.reports] == [1, 2]
    repaired = Pupil()
    again, _ = taught(make, repaired)
    again.restore(again.run_dir.checkpoints / "step-000002")
    again.run()
    assert [step for _, step, _ in repaired.learned] == [1, 2, 3, 4, 5]


def test_what_a_user_can_mend_is_said_as_it_was(make: Callable[..., Trainer]) -> None:
    trainer, _ = taught(make, Pupil(fails_at=1, error=ConfigError("no rewards", "add one")))
    with pytest.raises(ConfigError) as refused:
        trainer.run()
    assert (refused.value.message, refused.value.hint) == ("no rewards", "add one")
