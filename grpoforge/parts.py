"""Names to parts: every component of a run resolved and its options checked, before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpoforge.choice import NOWHERE, Chosen, ChosenReward, choose, with_options
from grpoforge.combinations import check_rewards, check_together
from grpoforge.config import Config, Origins, Part, RewardPart
from grpoforge.data import Example
from grpoforge.errors import ConfigError, suggest
from grpoforge.origins import from_option, from_origin
from grpoforge.plugins import PluginHost
from grpoforge.problems import load_problems
from grpoforge.registry import Component, Kind
from grpoforge.scoring import BUILTIN_DATA, BoundReward
from grpoforge.signature import show_path
from grpoforge.sources import Row
from grpoforge.streaming import RowStream

__all__ = [
    "TRL_DATA",
    "Chosen",
    "ChosenReward",
    "Parts",
    "bind_reward",
    "choose",
    "choose_measured",
    "choose_rewards",
    "resolve",
]

TRL_DATA = ("prompts", "completions", "completion_ids")
"""What a TRL reward is given besides the dataset's columns."""


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
    """None of them when they are a stream."""
    stream: RowStream | None
    eval_rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    """Worked examples, shown before every question."""


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
    built: dict[str, Any] = {kind: _built(chosen, origins, kind) for kind, chosen in parts.items()}
    named = tuple((one.component.name, _built(one, origins, "corrections", one.component.name)) for one in corrections)
    check_together(config, corrections=named, **built)
    trackers = tuple(
        (part.name, choose("tracker", part, host, origins, ("trackers", part.name))) for part in config.trackers
    )
    problems = load_problems(config, host, measured)
    return Parts(
        rewards=measured[: len(config.rewards)],
        measured=measured,
        correctness=correctness.name,
        **parts,
        corrections=tuple(corrections),
        trackers=trackers,
        train_rows=problems.train,
        stream=problems.stream,
        eval_rows=problems.held_out,
        examples=problems.examples,
    )


def _single_parts(config: Config) -> dict[Kind, Part]:
    return {"sampler": config.sampler, "advantage": config.advantage, "loss": config.loss, "kl": config.kl}


def _built(chosen: Chosen, origins: Origins, *path: str) -> Any:
    with from_option(origins, path):
        return chosen.build()


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
        with from_origin(origins.of(*path, "name")):
            component = _of_file(known, last, host)
        return with_options(component, part.options, origins, path)
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
    with from_origin(config.origins.of("eval", "reward")):
        component = host.registry.get("reward", config.eval.reward)
    for reward in rewards:
        if reward.chosen.component is component:
            return rewards, reward
    extra = ChosenReward(name=component.name, chosen=Chosen(component, {}), weight=0.0, gate=None)
    return (*rewards, extra), extra


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
