"""Measuring a model outside a run: what ``grpoforge eval`` does."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpoforge import checkpoint
from grpoforge.assembly import load_policy, make_evaluation
from grpoforge.choice import Chosen, ChosenReward, choose
from grpoforge.combinations import check_samples
from grpoforge.comparison import Comparison, check_same_problems, compare
from grpoforge.config import Config
from grpoforge.data import Example
from grpoforge.distributed import Workers, start_workers, stop_workers
from grpoforge.errors import CheckpointError, ConfigError, DataError
from grpoforge.evaluation import Evaluation
from grpoforge.launch import check_kernels, load_host, read_run_config
from grpoforge.outcomes import Attempt, Outcome, tally
from grpoforge.parts import choose_measured
from grpoforge.plugins import PluginHost
from grpoforge.problems import load_eval_rows, load_examples
from grpoforge.registry import Component
from grpoforge.results_file import read_results
from grpoforge.run_dir import RunDir
from grpoforge.seeds import mix, seed_everything
from grpoforge.sources import Row
from grpoforge.statistics import Estimate, estimate

logger = logging.getLogger(__name__)


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
    samples: int
    """Sampled completions of each problem."""
    temperatures: tuple[float, ...]
    """At which they were sampled."""
    intervals: Mapping[str, Estimate]
    """Of each headline metric: 95% interval over problems, standard error."""
    counts: Mapping[str, Mapping[str, int]]
    """``greedy`` and ``sampled`` completions by verdict: see `grpoforge.outcomes.Attempt`."""
    comparison: Comparison | None
    outcomes: tuple[Outcome, ...]
    """Problem by problem."""

    def about(self) -> dict[str, Any]:
        """What a file of the outcomes says of them."""
        names = ("model", "dataset", "correctness", "max_completion_length", "seed", "samples")
        return {name: getattr(self, name) for name in names} | {"temperatures": list(self.temperatures)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """All of a measurement but the model: two models in one setting can be compared."""

    host: PluginHost
    rewards: tuple[ChosenReward, ...]
    correctness: str
    sampler: Chosen
    rows: Sequence[Row]
    examples: Sequence[Example]
    workers: Workers

    def evaluation(self, config: Config) -> tuple[Evaluation, Any]:
        """The evaluation of ``config.model``, and its policy.

        Raises:
            GrpoforgeError: the model cannot be used, or no prompt fits it.
        """
        sampler = self.sampler.build()
        seed_everything(config.seed)
        policy = load_policy(config, self.host)
        measured = (self.rewards, self.correctness)
        return make_evaluation(config, policy, sampler, measured, self.rows, self.workers, self.examples), policy


def measure(config: Config, other: Config | Path | None = None) -> Measurement | None:
    """The metrics of ``config.model`` on the evaluation problems of ``config.data``; None on ranks that do not talk.

    Args:
        other: what to compare with: the same configuration with another model, or a file of results.

    Raises:
        GrpoforgeError: a part, the data or a model cannot be used; the results are of other problems.
    """
    check_kernels()
    host = load_host(config)
    rewards, correctness = choose_measured(config, host)
    _check_temperature(config, host)
    sampler = choose("sampler", config.sampler, host, config.origins, ("sampler",))
    check_samples(config, sampler.build())
    rows = load_eval_rows(config, host, rewards)
    examples = load_examples(config, host, rewards)
    stored = _read_stored(other, correctness.name) if isinstance(other, Path) else None
    workers = start_workers()
    try:
        setting = Setting(
            host=host,
            rewards=rewards,
            correctness=correctness.name,
            sampler=sampler,
            rows=rows,
            examples=examples,
            workers=workers,
        )
        evaluation, policy = setting.evaluation(config)
        if stored is not None:
            check_same_problems(stored[0], _problems(evaluation), str(other))
        metrics, outcomes = examine(evaluation, policy)
        del policy  # two models need not fit side by side
        found = _describe(config, evaluation, metrics, outcomes)
        if stored is not None:
            _tell_differences(str(other), stored[1], found.about())
            found = _compared(found, evaluation, str(other), stored[0])
        elif isinstance(other, Config):
            second, policy = setting.evaluation(other)
            check_same_problems(outcomes, _problems(second), other.model.name)
            found = _compared(found, evaluation, other.model.name, examine(second, policy)[1])
        return found if workers.is_main else None
    finally:
        stop_workers()


def _check_temperature(config: Config, host: PluginHost) -> None:
    """Refuse a temperature for a sampler that has none of that name, naming one that has."""
    named = host.registry.named(config.sampler.name, "sampler")
    if len(named) != 1 or "temperature" not in config.sampler.options or _takes_temperature(named[0]):
        return
    able = [one.name for one in host.registry.list("sampler") if _takes_temperature(one)]
    length = config.sampler.options.get("max_completion_length")
    keep = f" --set sampler.max_completion_length={length}" if length else ""
    raise ConfigError(
        f"sampler `{named[0].id}` has no option `temperature`{config.origins.of('sampler', 'temperature')}",
        f"evaluate with a sampler that has one: `--sampler {able[0]}{keep}`" if able else "leave it out",
    )


def _takes_temperature(component: Component) -> bool:
    return any(option.name == "temperature" for option in component.option_parameters)


def _read_stored(path: Path, correctness: str) -> tuple[tuple[Outcome, ...], dict[str, Any]]:
    outcomes, about = read_results(path)
    if about.get("correctness") != correctness:
        raise DataError(
            f"{path} says what is right by `{about.get('correctness')}`, and here `{correctness}` does",
            "compare by the same reward: `--set eval.reward=NAME`",
        )
    return outcomes, about


def _problems(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [evaluation.describe(prompt) for prompt in evaluation.prompts]


def examine(evaluation: Evaluation, policy: Any) -> tuple[dict[str, float], tuple[Outcome, ...]]:
    """Metrics and outcomes of the problems of all ranks, by number."""
    found, workers = evaluation.examine(policy), evaluation.workers
    outcomes: Sequence[Outcome] = found.outcomes
    if workers.size > 1:
        everyone = workers.gather_values([dataclasses.asdict(outcome) for outcome in outcomes])
        outcomes = [Outcome.from_dict(values) for values in everyone]
    return found.metrics, tuple(sorted(outcomes, key=lambda outcome: outcome.index))


def _describe(
    config: Config,
    evaluation: Evaluation,
    metrics: Mapping[str, float],
    outcomes: tuple[Outcome, ...],
) -> Measurement:
    figures = [evaluation.figures_of(outcome) for outcome in outcomes]
    seed = mix(config.seed, 4)
    samples = [sample for outcome in outcomes for sample in outcome.samples]
    attempts: dict[str, list[Attempt]] = {"greedy": [outcome.greedy for outcome in outcomes]}
    attempts |= {"sampled": samples} if samples else {}
    reads = evaluation.reads_answers
    if not reads and evaluation.workers.is_main:
        logger.info(
            "reward `%s` declares no `answer_of`: neither majority votes nor answers that cannot be read are counted",
            evaluation.correctness,
        )
    return Measurement(
        model=config.model.name,
        dataset=config.data.eval_dataset or config.data.dataset,
        num_problems=len(evaluation.prompts),
        correctness=evaluation.correctness,
        max_completion_length=getattr(evaluation.sampler, "max_completion_length", None),
        seed=config.seed,
        metrics=metrics,
        samples=evaluation.samples,
        temperatures=tuple(sorted({sample.temperature for sample in samples})),
        intervals={name: estimate([one[name] for one in figures], seed=seed) for name in figures[0]},
        counts={kind: tally(some, reads_answers=reads) for kind, some in attempts.items()},
        comparison=None,
        outcomes=outcomes,
    )


def _compared(found: Measurement, evaluation: Evaluation, name: str, others: Sequence[Outcome]) -> Measurement:
    """``found`` with its comparison with the outcomes ``others`` of ``name``."""
    names = (found.model, name)
    comparison = compare(names, found.outcomes, others, evaluation.figures_of, mix(found.seed, 4))
    return dataclasses.replace(found, comparison=comparison)


def _tell_differences(file: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Warn of results that were had in another way: not refused, since that may be the question."""
    both_sampled = there.get("samples") and here["samples"]
    for name in ("max_completion_length", *(("temperatures",) if both_sampled else ())):
        if there.get(name) != here[name]:
            logger.warning("%s was measured with `%s` %s, and this with %s", file, name, there.get(name), here[name])
