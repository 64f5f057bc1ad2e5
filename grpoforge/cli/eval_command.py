"""``grpoforge eval``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

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

logger = logging.getLogger(__name__)


def evaluate(
    what: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or a model folder, name or id.")],
    dataset: Dataset = None,
    samples: Annotated[
        int | None, typer.Option(metavar="K", help="Also draw K completions per problem and report their mean.")
    ] = None,
    num_problems: Annotated[int | None, typer.Option(metavar="N", help="Problems to evaluate on.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="WHICH", help="Of a run: best (the default), last, or a step's number.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Of a model: where data, rewards and sampler come from; tiny-math by default."
        ),
    ] = None,
    reward: Rewards = None,
    plugin: PluginFiles = None,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Measure a run's model, or any model, on held-out problems: greedy pass@1, lengths, rewards."""
    from grpoforge.cli.display import print_evaluation
    from grpoforge.measure import measure, model_of_run

    run = model_of_run(what, checkpoint or "best")
    _check_flags(what, run is not None, checkpoint, recipe)
    base, model = run or (base_layers([recipe] if recipe else None), what)
    flags = [
        *reward_layer(reward),
        *flag_layers(
            {
                "--dataset": ("data.eval_dataset", dataset),
                "--samples": ("eval.samples", samples),
                "--num-problems": ("data.num_eval", num_problems),
            }
        ),
    ]
    layers = user_layers(base, set_, flags, plugin)
    config = _config([*layers, ("the model to evaluate", {"model": {"name": model, "lora": None}})])
    with stdout_is_data():
        measured = measure(config)
    if num_problems is not None and measured.num_problems < num_problems:
        logger.warning(
            "measured on %d problems: %s has no more to evaluate on, and `--num-problems` is %d",
            measured.num_problems,
            measured.dataset,
            num_problems,
        )
    print_evaluation(measured, as_json=as_json)


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


def _config(layers: list[Layer]) -> Config:
    from grpoforge.layers import build

    return build(layers)
