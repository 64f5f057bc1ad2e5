"""What must survive a restart: weights, optimizer, schedule, random generators, component states, progress."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpoforge import checkpoint, state
from grpoforge.engine import Engine
from grpoforge.errors import CheckpointError
from grpoforge.run_dir import RunDir
from grpoforge.types import Stateful


@dataclass(slots=True)
class Progress:
    """What the loop itself must remember across a restart."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    latest: dict[str, float] = dataclasses.field(default_factory=dict)
    best_value: float | None = None
    best_step: int | None = None


class Saver:
    """Writes checkpoints of a run and brings them back."""

    def __init__(self, *, engine: Engine, components: Mapping[str, Any], run_dir: RunDir, keep_last: int) -> None:
        self.engine = engine
        self.components = components
        self.run_dir = run_dir
        self.keep_last = keep_last
        self.best_on_disk: tuple[float | None, int | None] = (None, None)
        """Value and step of the best checkpoint that was kept."""

    def save(self, progress: Progress) -> None:
        """Publish a checkpoint of the step just finished, and prune the old ones; every rank takes part.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        failure: CheckpointError | None = None
        if self.engine.workers.is_main:
            try:
                self._publish(progress)
            except CheckpointError as error:
                failure = error
        # Every rank learns of a failure, or they would part here and wait for one another for ever.
        if self.engine.workers.any(failure is not None):
            raise failure or CheckpointError("the main process could not write its checkpoint", "see its message")
        self.best_on_disk = (progress.best_value, progress.best_step)

    def _publish(self, progress: Progress) -> None:
        folder = self.run_dir.checkpoints
        checkpoint.publish(folder, progress.step, lambda temporary: self._write(temporary, progress))
        if progress.best_step == progress.step:
            checkpoint.mark_best(folder, progress.step)
        checkpoint.prune(folder, self.keep_last)

    def _write(self, folder: Path, progress: Progress) -> None:
        self.engine.policy.save(folder)
        state.save_state(
            folder,
            "trainer_state",
            {
                "progress": dataclasses.asdict(progress),
                "policy_version": self.engine.policy.version,
                "schedule": self.engine.schedule.state_dict(),
                "rng": state.rng_state(),
                "components": {
                    name: part.state_dict() for name, part in self.components.items() if isinstance(part, Stateful)
                },
            },
        )
        state.save_state(folder, "optimizer", self.engine.optimizer.state_dict())

    def restore(self, folder: Path) -> Progress:
        """Bring everything back to ``folder``, a checkpoint that verifies; returns how far the run was.

        Raises:
            CheckpointError: the checkpoint belongs to another model, other components or another version.
        """
        saved = state.load_state(folder, "trainer_state")
        self.engine.policy.load_weights(folder)
        try:
            self.engine.policy.version = saved["policy_version"]
            self._restore_optimizer(state.load_state(folder, "optimizer"), saved["schedule"]["last_epoch"])
            self._restore_components(folder, saved["components"])
            progress = Progress(**saved["progress"])
            state.set_rng_state(saved["rng"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {folder.name} does not fit this run: {type(error).__name__}: {error}",
                "resume with the model, the components and the version that the run was started with",
            ) from error
        self._restore_best(progress)
        self.engine.algorithm.drawing.sampler.sync(self.engine.policy)
        return progress

    def _restore_optimizer(self, saved: dict[str, Any], num_updates: int) -> None:
        """The moments come from the checkpoint, the settings from the configuration, which may have changed."""
        optimizer, schedule = self.engine.optimizer, self.engine.schedule
        settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        schedule.last_epoch = num_updates
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects this call from inside `step` only
            schedule._last_lr = [float(rate) for rate in schedule.get_lr()]
        for group, ours, rate in zip(optimizer.param_groups, settings, schedule.get_last_lr(), strict=True):
            group.update(ours, lr=rate)

    def _restore_components(self, folder: Path, saved: Mapping[str, Any]) -> None:
        for name, part in saved.items():
            component = self.components.get(name)
            if not isinstance(component, Stateful):
                raise CheckpointError(
                    f"checkpoint {folder.name} has state for `{name}`, which this run does not use",
                    "resume with the components that the run was started with",
                )
            component.load_state_dict(part)

    def _restore_best(self, progress: Progress) -> None:
        """The best so far, if its checkpoint is still there; else the next evaluation is the best again."""
        checkpoints, step = self.run_dir.checkpoints, progress.best_step
        if step is None or not (checkpoints / checkpoint.step_name(step)).is_dir():
            progress.best_value = progress.best_step = None
        elif self.engine.workers.is_main:
            checkpoint.mark_best(checkpoints, step)
        self.best_on_disk = (progress.best_value, progress.best_step)
