"""Names to parts: every component of a run resolved and its options checked, before any weight is loaded."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpoforge.combinations import check_rewards, check_together
from grpoforge.config import Config, DataConfig, Origins, Part, RewardPart
from grpoforge.data import columns_of, hold_out, rename_columns, usable
from grpoforge.errors import ConfigError, DataError, GrpoforgeError, PluginError, first_line, suggest
from grpoforge.plugins import PluginHost
from grpoforge.registry import Component, Kind
from grpoforge.scoring import BUILTIN_DATA, BoundReward
from grpoforge.signature import show_path
from grpoforge.sources import BadRow, Row, is_path, numbered, read_hub, read_path

logger = logging.getLogger(__name__)

NOWHERE = Origins()

TRL_DATA = ("prompts", "completions", "completion_ids")
"""What a TRL reward is given besides the dataset's columns."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A component and the options it was given."""

    component: Component
    options: Mapping[str, Any]

    def build(self, *data: Any) -> Any:
        """The component with its options bound."""
        return self.component.build(self.options, *data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenReward:
    """A reward as chosen, under the name it has in metrics."""

    name: str
    chosen: Chosen
    weight: float
    gate: str | None

    def describe(self) -> str:
        """One line for people: ``brevity x0.1 (only where math is right)``."""
        usual = self.chosen.component.gate
        if self.gate:
            gate = f" (only where {self.gate} is right)"
        else:
            gate = f" (not gated on {usual}: it pays for wrong answers too)" if usual else ""
        return f"{self.name} x{self.weight:g}{gate}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Every component of a run, chosen and checked, and the rows it works on."""

    rewards: tuple[ChosenReward, ...]
    measured: tuple[ChosenReward, ...]
    """What evaluation scores: the run's rewards first, then the one that says what is right if it is not among them."""
    correctness: str
    """Name of the reward, one of ``measured``, that is 1 where a completion is right."""
    sampler: Chosen
    advantage: Chosen
    loss: Chosen
    kl: Chosen
    corrections: tuple[Chosen, ...]
    trackers: tuple[tuple[str, Chosen], ...]
    train_rows: tuple[Row, ...]
    eval_rows: tuple[Row, ...]


def resolve(config: Config, host: PluginHost) -> Parts:
    """The parts that ``config`` names.

    Raises:
        PluginError: a name that nobody, or more than one plugin, registers.
        ConfigError: an option unknown, missing or of the wrong type; a gate that is not there.
        DataError: the dataset is missing, empty, lacks a column or has a bad row.
    """
    measured, correctness = choose_measured(config, host)
    origins = config.origins
    check_rewards([(one.name, one.chosen.component.factory, one.weight) for one in measured], origins.of("rewards"))
    parts = {kind: choose(kind, part, host, origins, (kind,)) for kind, part in _single_parts(config).items()}
    corrections = [choose("correction", one, host, origins, ("corrections", one.name)) for one in config.corrections]
    check_together(
        config,
        _built(parts["advantage"], origins, "advantage"),
        _built(parts["loss"], origins, "loss"),
        _built(parts["kl"], origins, "kl"),
        tuple((one.component.name, _built(one, origins, "corrections", one.component.name)) for one in corrections),
    )
    trackers = tuple(
        (part.name, choose("tracker", part, host, origins, ("trackers", part.name))) for part in config.trackers
    )
    train_rows, eval_rows = load_rows(config, host, measured)
    return Parts(
        rewards=measured[: len(config.rewards)],
        measured=measured,
        correctness=correctness.name,
        **parts,
        corrections=tuple(corrections),
        trackers=trackers,
        train_rows=tuple(train_rows),
        eval_rows=tuple(eval_rows),
    )


def _single_parts(config: Config) -> dict[Kind, Part]:
    return {"sampler": config.sampler, "advantage": config.advantage, "loss": config.loss, "kl": config.kl}


def choose(kind: Kind, part: Part, host: PluginHost, origins: Origins = NOWHERE, path: Sequence[str] = ()) -> Chosen:
    """The component that ``part`` names, its options validated.

    Raises:
        PluginError: a name that nobody, or more than one plugin, registers.
        ConfigError: an option unknown, missing or of the wrong type. Both say where the value at the key ``path``
            came from.
    """
    with _from(origins.of(*path, "name")):
        component = host.registry.get(kind, part.name)
    return _with_options(component, part.options, origins, path)


def _with_options(component: Component, options: Mapping[str, Any], origins: Origins, path: Sequence[str]) -> Chosen:
    with _from_option(origins, path):
        component.validate(options)
    return Chosen(component, options)


def _built(chosen: Chosen, origins: Origins, *path: str) -> Any:
    with _from_option(origins, path):
        return chosen.build()


@contextlib.contextmanager
def _from_option(origins: Origins, path: Sequence[str]) -> Iterator[None]:
    """Errors from inside say where the option that they name first came from, or else the component's name."""
    try:
        yield
    except ConfigError as error:
        named = re.search(r"options? `(\w+)", error.message)
        with _from(origins.of(*path, named[1] if named else "name")):
            raise


@contextlib.contextmanager
def _from(origin: str) -> Iterator[None]:
    """Errors from inside say where the value came from, at the end of their first line."""
    try:
        yield
    except (ConfigError, DataError, PluginError) as error:
        first, newline, rest = error.message.partition("\n")
        colon = ":" if newline and first.endswith(":") else ""
        raise type(error)(f"{first.removesuffix(colon)}{origin}{colon}{newline}{rest}", error.hint) from error


def choose_rewards(
    parts: Sequence[RewardPart], host: PluginHost, origins: Origins = NOWHERE
) -> tuple[ChosenReward, ...]:
    """The rewards of a run with their weights and gates; a reward is called by its id where names collide.

    Raises:
        PluginError: see `choose`.
        ConfigError: see `choose`; a reward given twice; a gate that is not there.
    """
    chosen = [_choose_reward(part, host, origins) for part in parts]
    names = [one.component.name for one in chosen]
    labels = [one.component.id if names.count(name) > 1 else name for one, name in zip(chosen, names, strict=True)]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(
                f"the reward `{label}` is given twice{origins.of('rewards')}", "give it once, with the weight you want"
            )
    return tuple(
        ChosenReward(
            name=label,
            chosen=one,
            weight=one.component.weight if part.weight is None else part.weight,
            gate=_gate(part, one.component, labels, origins),
        )
        for part, one, label in zip(parts, chosen, labels, strict=True)
    )


def _choose_reward(part: RewardPart, host: PluginHost, origins: Origins) -> Chosen:
    path = ("rewards", part.name)
    known, _, last = part.name.rpartition(":")
    if known.endswith(".py"):
        with _from(origins.of(*path, "name")):
            component = _of_file(known, last, host)
        return _with_options(component, part.options, origins, path)
    if host.registry.named(known, "reward") and not host.registry.named(part.name, "reward"):
        raise ConfigError(
            f"the weight in `{part.name}` is `{last}`, which is no number{origins.of(*path, 'name')}",
            f"write for instance `--reward {known}:0.5`",
        )
    return choose("reward", part, host, origins, path)


def _of_file(file: str, function: str, host: PluginHost) -> Component:
    """The function of a file as a component; the one that is there already when it is asked for again."""
    path = Path(os.path.expanduser(file))
    loaded = any(one["name"] == path.stem and one["source"] == show_path(path) for one in host.provenance())
    found = host.registry.named(f"{path.stem}:{function}", "reward") if loaded else ()
    return found[0] if found else host.add_function(path, function)


def _gate(part: RewardPart, component: Component, labels: Sequence[str], origins: Origins) -> str | None:
    if part.gate == "default":
        return component.gate if component.gate in labels else None
    if part.gate is not None and part.gate not in labels:
        raise ConfigError(
            f"reward `{part.name}` is gated on `{part.gate}`, which the run does not use"
            f"{origins.of('rewards', part.name, 'gate')}",
            suggest(part.gate, labels),
        )
    return part.gate


def choose_measured(config: Config, host: PluginHost) -> tuple[tuple[ChosenReward, ...], ChosenReward]:
    """What evaluation scores, the run's rewards first, and which of it says what is right (``eval.reward``)."""
    rewards = choose_rewards(config.rewards, host, config.origins)
    if config.eval.reward is None:
        return rewards, rewards[0]
    for reward in rewards:
        if config.eval.reward in (reward.name, reward.chosen.component.id):
            return rewards, reward
    with _from(config.origins.of("eval", "reward")):
        component = host.registry.get("reward", config.eval.reward)
    for reward in rewards:
        if reward.chosen.component is component:
            return rewards, reward
    extra = ChosenReward(name=component.name, chosen=Chosen(component, {}), weight=0.0, gate=None)
    return (*rewards, extra), extra


def load_rows(config: Config, host: PluginHost, rewards: Sequence[ChosenReward]) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows to evaluate on, with every column that the prompt and the rewards need.

    Raises:
        DataError: see `grpoforge.data.usable`; too few rows to divide.
    """
    data = config.data
    train = _usable(config, _read(data.dataset, config, host, "train"), rewards, data.dataset)
    if _has_own_eval(data):
        held_out = load_eval_rows(config, host, rewards)
    else:
        num_usable = len(train)
        train, held_out = hold_out(train, data.num_eval, config.seed)
        if not held_out:
            raise DataError(
                f"{data.dataset} has 1 usable row: too few to train and to evaluate on",
                "give more rows, or another file with `--set data.eval_dataset=FILE`",
            )
        if len(held_out) < data.num_eval:
            logger.info(
                "holding out %d of the %d problems of %s for evaluation, at most half (`data.num_eval` is %d)",
                len(held_out),
                num_usable,
                data.dataset,
                data.num_eval,
            )
    _tell_oddities(train, config)
    return train, held_out


def _tell_oddities(train: Sequence[Row], config: Config) -> None:
    """Warn of what works and may surprise."""
    source, per_step = config.data.dataset, config.batch.prompts_per_step
    if len(train) < per_step:
        logger.warning(
            "%s leaves %d to train on, fewer than the %d prompts of a step: problems repeat within a step",
            source,
            len(train),
            per_step,
        )
    hidden = [name for name in columns_of(train) if name in BUILTIN_DATA]
    if hidden:
        logger.warning(
            "%s has a column `%s`, which rewards cannot read: under that name they get the run's own data; "
            "rename it with `--set data.rename.%s=NAME`",
            source,
            hidden[0],
            hidden[0],
        )


def load_eval_rows(config: Config, host: PluginHost, rewards: Sequence[ChosenReward]) -> list[Row]:
    """Rows to evaluate on: the named evaluation dataset, the dataset's own test split, or those training holds out.

    Raises:
        DataError: see `grpoforge.data.usable`.
    """
    data = config.data
    if not _has_own_eval(data):
        return load_rows(config, host, rewards)[1]
    source = data.eval_dataset or data.dataset
    return _usable(config, _read(source, config, host, "test"), rewards, source)[: data.num_eval]


def _has_own_eval(data: DataConfig) -> bool:
    return data.eval_dataset is not None or not _is_elsewhere(data.dataset)


def _is_elsewhere(name: str) -> bool:
    """True for files, folders and hub ids; False for registered datasets."""
    return is_path(name) or "/" in name


def _read(name: str, config: Config, host: PluginHost, split: str) -> list[Row | BadRow]:
    # The options are those of the training dataset; another one that only evaluates takes none.
    options = config.data.options if name == config.data.dataset else {}
    origin = config.origins.of("data", "dataset" if name == config.data.dataset else "eval_dataset")
    if _is_elsewhere(name):
        _refuse_options(name, options, config.origins)
        with _from(origin):
            return read_path(name) if is_path(name) else read_hub(name, split, options.get("config"))
    with _from(origin):
        if os.path.isdir(name) and not host.registry.named(name, "dataset"):
            raise DataError(f"unknown dataset `{name}`", f"the folder of that name is `./{name}`")
        component = host.registry.get("dataset", name)
    dataset = _with_options(component, options, config.origins, ("data", "options")).build()
    return numbered(_call(component, dataset, split), f"{name}/{split}")


def _refuse_options(name: str, options: Mapping[str, Any], origins: Origins) -> None:
    """A file has no options, a hub dataset only its ``config``."""
    known = () if is_path(name) else ("config",)
    for option in options:
        if option not in known:
            kind = "file" if is_path(name) else "hub dataset"
            raise ConfigError(
                f"`data.options.{option}` is given{origins.of('data', 'options', option)}, and the {kind} {name} takes "
                f"{'no options' if not known else 'only `config`'}",
                "leave it out; options are for registered datasets, see `grpoforge plugins list --kind dataset`",
            )


def _call(component: Component, dataset: Any, split: str) -> Sequence[Mapping[str, Any]]:
    try:
        return list(dataset(split))
    except GrpoforgeError:
        raise
    except Exception as failure:  # the boundary: a dataset is foreign code
        raise DataError(
            f"dataset `{component.id}` raised {type(failure).__name__}: {first_line(failure)}",
            f"it is written in {component.source}",
        ) from failure


def _usable(config: Config, rows: list[Row | BadRow], rewards: Sequence[ChosenReward], source: str) -> list[Row]:
    renamed = rename_columns(rows, config.data.rename, source)
    required = [config.data.prompt]
    for number, reward in enumerate(rewards):
        only_evaluates = number >= len(config.rewards)
        where = f" (`eval.reward`{config.origins.of('eval', 'reward')})" if only_evaluates else ""
        remedy = "choose another `eval.reward`" if only_evaluates else "choose other rewards"
        required += _required_columns(reward, columns_of(renamed), source, where, remedy)
    return usable(renamed, list(dict.fromkeys(required)), source, skip=config.data.skip_bad_rows)


def _required_columns(
    reward: ChosenReward, columns: Sequence[str], source: str, where: str, remedy: str
) -> Sequence[str]:
    """Every column that ``reward`` cannot do without; ``columns`` are those of ``source``, if it has rows at all."""
    component = reward.chosen.component
    needed = [one.name for one in component.data if one.required and one.name not in BUILTIN_DATA]
    for name in needed:
        if columns and name not in columns:
            raise DataError(
                f"reward `{component.id}`{where} reads the dataset column `{name}`, which {source} does not have; "
                f"it has: {', '.join(columns)}",
                f"rename a column with `--set data.rename.OLD={name}`, or {remedy}",
            )
    return needed


def bind_reward(reward: ChosenReward, columns: Sequence[str]) -> BoundReward:
    """``reward`` ready to be called on rollouts whose prompts have ``columns``."""
    component = reward.chosen.component
    available = {*BUILTIN_DATA, *columns}
    if component.accepts_any_data:
        named = [one.name for one in component.data]
        data = tuple(dict.fromkeys([*TRL_DATA, *(name for name in named if name in available), *columns]))
    else:
        data = tuple(one.name for one in component.data if one.required or one.name in available)
    return BoundReward(
        name=reward.name, function=reward.chosen.build(), data=data, weight=reward.weight, gate=reward.gate
    )
