"""``grpoforge eval``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpoforge.cli.settings import (
    Dataset,
    Layer,
    Overrides,
    PluginFiles,
    Rewards,
    base_layers,
    flag_layers,
    reward_layer,
    stdout_is_data,
    user_layers,
)

if TYPE_CHECKING:
    from grpoforge.config import Config
    from grpoforge.measure import Measurement

logger = logging.getLogger(__name__)


Samples = Annotated[
    int | None, typer.Option(metavar="K", help="Also draw K completions per problem: mean@K, pass@k, maj@k.")
]
Temperature = Annotated[
    float | None, typer.Option(metavar="T", help="Draw them at this temperature; by default as in training.")
]
Ks = Annotated[
    str | None, typer.Option("--k", metavar="K,...", help="The k of pass@k and maj@k; by default 1,2,4,...,K.")
]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="WHICH", help="Of a run: best (the default), last, or a step's number.")
]
Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", help="Of a model: where data, rewards and sampler come from; tiny-math by default."
    ),
]
Compare = Annotated[
    str | None,
    typer.Option(metavar="RUN|MODEL|FILE", help="Compare on the same problems; FILE is what --output wrote."),
]
Output = Annotated[
    Path | None, typer.Option(metavar="FILE.parquet", help="Also write every problem, completion and verdict.")
]


def evaluate(
    what: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a model folder, name or id.")],
    dataset: Dataset = None,
    samples: Samples = None,
    temperature: Temperature = None,
    k: Ks = None,
    sampler: Annotated[str | None, typer.Option(metavar="NAME", help="The sampler; by default as in training.")] = None,
    num_problems: Annotated[int | None, typer.Option(metavar="N", help="Problems to evaluate on.")] = None,
    checkpoint: Checkpoint = None,
    recipe: Recipe = None,
    reward: Rewards = None,
    plugin: PluginFiles = None,
    set_: Overrides = None,
    compare: Compare = None,
    output: Output = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Measure a run's model, or any model, on held-out problems: accuracy with its uncertainty, lengths, rewards."""
    from grpoforge.cli.eval_display import print_evaluation
    from grpoforge.measure import measure, model_of_run
    from grpoforge.results_file import check_output, write_results

    if output is not None:
        check_output(output)
    run = model_of_run(what, checkpoint or "best")
    _check_flags(what, run is not None, checkpoint, recipe)
    base, model = run or (base_layers([recipe] if recipe else None), what)
    flags = [
        *reward_layer(reward),
        *flag_layers(
            {
                "--dataset": ("data.eval_dataset", dataset),
                "--samples": ("eval.samples", samples),
                "--k": ("eval.k", _numbers(k)),
                "--sampler": ("sampler.name", sampler),
                "--temperature": ("sampler.temperature", temperature),
                "--num-problems": ("data.num_eval", num_problems),
            }
        ),
    ]
    layers = user_layers(base, set_, flags, plugin)
    config = _config(layers, model)
    _check_sampled(config, temperature)
    with stdout_is_data():
        measured = measure(config, _other(compare, layers))
    if measured is None:
        return
    _warn_of_few(measured, num_problems)
    print_evaluation(measured, as_json=as_json)
    if output is not None:
        write_results(output, measured.outcomes, measured.about())


def _numbers(text: str | None) -> list[int] | None:
    """``1,4,8`` as numbers.

    Raises:
        ConfigError: it is anything else.
    """
    from grpoforge.errors import ConfigError

    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"`--k {text}` is no list of numbers", "write for instance `--k 1,4,8`") from None


def _check_sampled(config: Config, temperature: float | None) -> None:
    """Refuse a temperature of nothing."""
    from grpoforge.errors import ConfigError

    if temperature is not None and not config.eval.samples:
        raise ConfigError(
            f"`--temperature {temperature:g}` changes nothing: no completion is sampled",
            "add `--samples K`; greedy completions have no temperature",
        )


def _other(what: str | None, layers: list[Layer]) -> Config | Path | None:
    """What ``--compare`` names: a file of results, or the configuration with another model."""
    from grpoforge.measure import model_of_run

    if what is None or what.endswith(".parquet"):
        return Path(what) if what else None
    run = model_of_run(what, "best")
    return _config(layers, run[1] if run else what, {"revision": None})


def _warn_of_few(measured: Measurement, num_problems: int | None) -> None:
    if num_problems is not None and measured.num_problems < num_problems:
        logger.warning(
            "measured on %d problems: %s has no more to evaluate on, and `--num-problems` is %d",
            measured.num_problems,
            measured.dataset,
            num_problems,
        )


def _check_flags(what: str, is_run: bool, checkpoint: str | None, recipe: str | None) -> None:
    """Refuse flags that would change nothing."""
    from grpoforge.errors import ConfigError

    if is_run and recipe is not None:
        raise ConfigError(
            f"`--recipe {recipe}` does not go with {what}, a run that has its own configuration",
            "leave it out, or change single keys with `--set`",
        )
    if not is_run and checkpoint is not None:
        raise ConfigError(
            f"`--checkpoint {checkpoint}` needs a run directory, and {what} is none", "leave it out, or name a run"
        )


def _config(layers: list[Layer], model: str, changes: dict[str, Any] | None = None) -> Config:
    """The configuration that evaluates ``model``: its weights as they are, whatever was trained."""
    from grpoforge.layers import build

    named = {"name": model, "lora": None, **(changes or {})}
    return build([*layers, ("the model to evaluate", {"model": named})])
