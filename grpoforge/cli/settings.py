"""Flags to layers: what `train` and `eval` share."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Rewards = Annotated[
    list[str] | None,
    typer.Option(
        "--reward", "-r", metavar="NAME[:WEIGHT]", help="A reward, or ./file.py:function[:weight]; repeatable."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change any key; several may follow.")
]
PluginFiles = Annotated[
    list[Path] | None, typer.Option("--plugin", metavar="PATH", help="Load this plugin file; repeatable.")
]
Dataset = Annotated[
    str | None, typer.Option("--dataset", metavar="NAME|FILE", help="A registered dataset, a file, or a hub id.")
]
Layer = tuple[str, dict[str, Any]]


def base_layers(names: Sequence[str] | None) -> list[Layer]:
    """Recipes by name and YAML files, each over the one before it; tiny-math when there is none.

    The first stands on what its ``recipe`` key names (a file without the key on tiny-math); the others bring only
    their own values: ``tiny-math dapo`` is DAPO on tiny-math.
    """
    first, *others = names or ["tiny-math"]
    layers = _read_layers(first)
    for name in others:
        origin, values = _read_layers(name)[-1]
        label = f"{layers[-1][1].get('recipe', 'tiny-math')}+{values.get('recipe', Path(name).stem)}"
        layers.append((origin, {**values, "recipe": label}))
    return layers


def _read_layers(name: str) -> list[Layer]:
    from grpoforge.yaml_source import read_file, recipe_layers

    if not name.endswith((".yaml", ".yml")):
        return recipe_layers(name)
    values = read_file(Path(name))
    below = str(values.pop("recipe", "tiny-math"))
    return [*recipe_layers(below, name), (name, values)]


def override_layers(overrides: Sequence[str] | None) -> list[Layer]:
    """One layer for each ``--set``, in order."""
    from grpoforge.yaml_source import parse_override

    return [(f"--set {text}", parse_override(text)) for text in overrides or ()]


def reward_layer(rewards: Sequence[str] | None) -> list[Layer]:
    """The layer of the ``--reward`` flags: they choose the rewards; a recipe's options for them stay."""
    return [("--reward", {"rewards": [parse_reward(text) for text in rewards]})] if rewards else []


def parse_reward(text: str) -> dict[str, Any]:
    """``math``, ``math:0.5``, ``plugin:math:0.5``, ``./rewards.py:score`` or ``./rewards.py:score:0.5``.

    Raises:
        ConfigError: a weight that is no finite number, nothing before it, or a file without a function.
    """
    from grpoforge.errors import ConfigError

    file, in_file, rest = text.rpartition(".py:")
    name, colon, last = (rest if in_file else text).rpartition(":")
    weight = _as_weight(last) if colon else None
    if colon and in_file and weight is None:
        raise ConfigError(
            f"the weight in `--reward {text}` is `{last}`, which is no number",
            "write for instance `--reward ./rewards.py:my_func:0.5`",
        )
    if weight is None:
        name = rest if in_file else text
    if text.endswith(".py") or (in_file and not name.isidentifier()):
        raise ConfigError(
            f"`--reward {text}` names no function of the file", "write for instance `--reward ./rewards.py:my_func`"
        )
    if not name.strip():
        raise ConfigError(f"`--reward {text}` is not NAME or NAME:WEIGHT", "write for instance `--reward brevity:0.1`")
    if weight is not None and not math.isfinite(weight):
        raise ConfigError(f"the weight in `--reward {text}` is `{last}`", "a weight is a finite number, e.g., 0.5")
    if in_file:
        # Absolute, so that resuming from another folder finds it.
        name = f"{os.path.abspath(os.path.expanduser(file + '.py'))}:{name}"
    return {"name": name} if weight is None else {"name": name, "weight": weight}


def _as_weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def flag_layers(flags: Mapping[str, tuple[str, Any]]) -> list[Layer]:
    """A layer for each flag that was given: ``{"--dataset": ("data.dataset", value)}``; None is not given."""
    layers: list[Layer] = []
    for flag, (key, value) in flags.items():
        if value is None:
            continue
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        layers.append((flag, nested))
    return layers


def user_layers(
    base: Sequence[Layer],
    overrides: Sequence[str] | None,
    flags: Sequence[Layer],
    plugins: Sequence[Path] | None,
    *,
    dialect: str | None = None,
) -> list[Layer]:
    """``base`` (a recipe, a file, a run) < ``--dialect`` < ``--set`` < the flags.

    The flags stand twice: first, so that ``--set`` can speak of the parts that they choose; last, because they win.

    Raises:
        ConfigError: there is no such dialect, or the other layers make no configuration.
    """
    below = [*base, *flags]
    above = [*override_layers(overrides), *flags, *plugin_layer(plugins, base)]
    if dialect is None:
        return [*below, *above]
    from grpoforge.dialects import dialect_layer
    from grpoforge.layers import build, merge

    return [*below, dialect_layer(dialect, build([*below, *above]), merge(below)[0]), *above]


def plugin_layer(files: Sequence[Path] | None, base: Sequence[Layer]) -> list[Layer]:
    """The layer of the ``--plugin`` flags, as absolute paths: they come on top of the files that ``base`` names."""
    if not files:
        return []
    named: list[str] = []
    for _, values in base:
        named = list(values.get("plugins") or named)
    named += [os.path.abspath(file.expanduser()) for file in files]
    return [("--plugin", {"plugins": list(dict.fromkeys(named))})]


def announce(text: str) -> None:
    """Say on a terminal what the next quiet seconds are for."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{text}\n")


@contextlib.contextmanager
def stdout_is_data() -> Iterator[None]:
    """What plugins and rewards print goes to stderr: stdout carries what the command was asked for."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
