"""Measuring a model outside a run: what ``grpoforge eval`` does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpoforge import checkpoint
from grpoforge.assembly import load_policy, make_evaluation
from grpoforge.choice import choose
from grpoforge.combinations import check_samples
from grpoforge.config import Config
from grpoforge.distributed import Workers
from grpoforge.errors import CheckpointError
from grpoforge.launch import load_host, read_run_config
from grpoforge.parts import choose_measured
from grpoforge.problems import load_eval_rows, load_examples
from grpoforge.run_dir import RunDir
from grpoforge.seeds import seed_everything


def model_of_run(what: str, which: str) -> tuple[list[tuple[str, dict[str, Any]]], str] | None:
    """The configuration layer and the model folder of a run; None when ``what`` is no run directory.

    Raises:
        CheckpointError: the run has no such checkpoint, or it is damaged; its ``run.json`` is gone; ``what`` is a path
            that is missing in a folder of runs.
    """
    if not _means_a_run(what):
        return None
    run_dir = RunDir.open(Path(what))
    folder = _checkpoint(run_dir, which)
    checkpoint.verify(folder)
    return [(str(run_dir.run_json), read_run_config(run_dir))], str(folder)


def _means_a_run(what: str) -> bool:
    """True for a folder that holds a run or its checkpoints, and for a missing path beside runs; a name is a model."""
    path = Path(what)
    if os.path.exists(path):
        return os.path.isfile(path / "run.json") or os.path.isdir(path / "checkpoints")
    return "/" in what and any(path.parent.glob("*/run.json"))


def _checkpoint(run_dir: RunDir, which: str) -> Path:
    folders = checkpoint.published(run_dir.checkpoints)
    if not folders:
        raise CheckpointError(f"{run_dir.path} has no checkpoint yet", "wait for the first one, or evaluate a model")
    if which in ("best", "last"):
        return (checkpoint.best(run_dir.checkpoints) if which == "best" else None) or folders[-1]
    with contextlib.suppress(ValueError):
        folder = run_dir.checkpoints / checkpoint.step_name(int(which))
        if folder in folders:
            return folder
    steps = ", ".join(str(checkpoint.step_of(folder)) for folder in folders)
    raise CheckpointError(f"{run_dir.path} has no checkpoint `{which}`", f"use best, last, or one of: {steps}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was measured, on what and how: enough to measure it again."""

    model: str
    """Folder, name or hub id; of a run, the folder of the checkpoint."""
    dataset: str
    num_problems: int
    correctness: str
    """Name of the reward that says what is right."""
    max_completion_length: int | None
    """In tokens; None when the sampler does not say."""
    seed: int
    metrics: Mapping[str, float]


def measure(config: Config) -> Measurement:
    """The metrics of ``config.model`` on the evaluation problems of ``config.data``.

    Raises:
        GrpoforgeError: a part, the data or the model cannot be used.
    """
    host = load_host(config)
    measured, correctness = choose_measured(config, host)
    sampler = choose("sampler", config.sampler, host, config.origins, ("sampler",)).build()
    check_samples(config, sampler)
    rows = load_eval_rows(config, host, measured)
    examples = load_examples(config, host, measured)
    seed_everything(config.seed)
    policy = load_policy(config, host)
    evaluation = make_evaluation(config, policy, sampler, (measured, correctness.name), rows, Workers(), examples)
    return Measurement(
        model=config.model.name,
        dataset=config.data.eval_dataset or config.data.dataset,
        num_problems=len(evaluation.prompts),
        correctness=correctness.name,
        max_completion_length=getattr(sampler, "max_completion_length", None),
        seed=config.seed,
        metrics=evaluation.measure(policy),
    )
