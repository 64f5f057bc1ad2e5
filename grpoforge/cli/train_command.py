"""``grpoforge train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpoforge.cli.settings import (
    Dataset,
    Layer,
    Overrides,
    PluginFiles,
    Rewards,
    announce,
    base_layers,
    flag_layers,
    reward_layer,
    stdout_is_data,
    user_layers,
)

if TYPE_CHECKING:
    from grpoforge.config import Config

PARTS = "Parts"
RUN = "Run"

Recipes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE|FILE.yaml]...",
        help="What to start from, tiny-math by default; of several, each changes the one before it.",
    ),
]
Dialect = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=PARTS, help="Options as another system has them: trl or verl."),
]


def train(
    recipes: Recipes = None,
    reward: Rewards = None,
    model: Annotated[str | None, typer.Option(metavar="DIR|ID", help="A model folder or a hub id.")] = None,
    dataset: Dataset = None,
    sampler: Annotated[str | None, typer.Option(metavar="NAME", rich_help_panel=PARTS, help="The sampler.")] = None,
    advantage: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=PARTS, help="The advantage normalizer.")
    ] = None,
    kl: Annotated[str | None, typer.Option(metavar="NAME", rich_help_panel=PARTS, help="The KL estimator.")] = None,
    loss: Annotated[str | None, typer.Option(metavar="NAME", rich_help_panel=PARTS, help="The loss.")] = None,
    dialect: Dialect = None,
    plugin: PluginFiles = None,
    set_: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", rich_help_panel=RUN, help="The run directory; a new one in runs/.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="N", rich_help_panel=RUN, help="Steps to take.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", rich_help_panel=RUN, help="Fixes all randomness.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="[DIR]", rich_help_panel=RUN, help="Continue a run; the latest by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel=RUN, help="Print the configuration and the plan, load nothing.")
    ] = False,
) -> None:
    """Train a policy by GRPO.

    Recipe < file < --dialect < --set < the flags below.

    Without arguments: a small model on word problems, on the CPU, offline.
    """
    flags = [
        *reward_layer(reward),
        *flag_layers(
            {
                "--model": ("model.name", model),
                "--dataset": ("data.dataset", dataset),
                "--sampler": ("sampler.name", sampler),
                "--advantage": ("advantage.name", advantage),
                "--kl": ("kl.name", kl),
                "--loss": ("loss.name", loss),
                "--max-steps": ("max_steps", max_steps),
                "--seed": ("seed", seed),
            }
        ),
    ]
    if resume is not None:
        _check_resume(recipes, output, dry_run, dialect)
        _resume(resume, set_, flags, plugin)
        return
    config = _config(user_layers(base_layers(recipes), set_, flags, plugin, dialect=dialect))
    if dry_run:
        _dry_run(config)
    else:
        _start(config, output)


def _check_resume(recipes: list[str] | None, output: Path | None, dry_run: bool, dialect: str | None) -> None:
    """Refuse flags that a resumed run could not honor."""
    from grpoforge.errors import ConfigError

    for given, shown in (
        (recipes, " ".join(recipes or ())),
        (output, f"--output {output}"),
        (dry_run, "--dry-run"),
        (dialect, f"--dialect {dialect}"),
    ):
        if given:
            raise ConfigError(
                f"`{shown}` does not go with `--resume`: a run goes on where it is, as it was configured",
                "leave it out; single keys change with `--set`",
            )


def _config(layers: list[Layer]) -> Config:
    from grpoforge.layers import build

    return build(layers)


def _dry_run(config: Config) -> None:
    from grpoforge.cli.display import print_plan
    from grpoforge.launch import check_kernels, load_host
    from grpoforge.memory import describe
    from grpoforge.parts import resolve

    with stdout_is_data():
        check_kernels()
        host = load_host(config)
        parts = resolve(config, host)
        _check_model(config)
        memory = describe(config, host.hook.policy_size(model=config.model), parts.sampler.build())
    print_plan(config, parts, memory)


def _check_model(config: Config) -> None:
    """Refuse a model that is a path (no name, no hub id) to nothing."""
    from grpoforge.errors import ModelError

    name = config.model.name
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().exists():
        raise ModelError(
            f"there is no model folder {name}{config.origins.of('model', 'name')}",
            "give a folder with config.json and *.safetensors, or a hub id",
        )


def _start(config: Config, output: Path | None) -> None:
    announce("loading torch, the model and the problems ...")
    from grpoforge.cli.display import print_summary
    from grpoforge.launch import start

    with stdout_is_data():
        summary = start(config, output)
    _show(print_summary, summary)


def _resume(which: str, overrides: list[str] | None, flags: list[Layer], plugins: list[Path] | None) -> None:
    from grpoforge.cli.display import print_summary
    from grpoforge.launch import find_run, read_run_config, resume

    run_dir, folder = find_run(which)
    config = _config(user_layers([(str(run_dir.run_json), read_run_config(run_dir))], overrides, flags, plugins))
    with stdout_is_data():
        summary = resume(config, run_dir, folder)
    _show(print_summary, summary)


def _show(print_summary: Any, summary: Any) -> None:
    """The summary, on the rank that talks."""
    if summary is not None:
        print_summary(summary)
