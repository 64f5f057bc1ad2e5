"""``--dialect``: what each sets, above recipes and files, below ``--set`` and flags; and that its files are right."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grpoforge.cli.settings import base_layers, flag_layers, user_layers
from grpoforge.config import Config
from grpoforge.dialects import describe_dialect, dialect_names, read_dialect
from grpoforge.errors import ConfigError
from grpoforge.layers import build
from grpoforge.plugins import load_plugins
from grpoforge.reduction import REDUCTIONS
from grpoforge.yaml_source import recipe_names

GOLDEN = Path(__file__).parent / "golden"
DIALECTS = ["trl", "verl"]


def configured(dialect: str | None, names: Sequence[str] = (), *overrides: str, **flags: str) -> Config:
    """The configuration of ``grpoforge train NAMES --dialect DIALECT --set OVERRIDES --loss LOSS``."""
    layers = flag_layers({f"--{flag}": (f"{flag}.name", name) for flag, name in flags.items()})
    return build(user_layers(base_layers(names or None), overrides, layers, None, dialect=dialect))


def test_the_dialects_there_are() -> None:
    assert dialect_names() == DIALECTS


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_names_components_and_options_that_exist(name: str) -> None:
    dialect, registry = read_dialect(name), load_plugins().registry
    assert set(dialect) == {"advantage", "loss", "reduction", "kl", "correction"}
    for kind in ("advantage", "loss", "kl", "correction"):
        for component, options in dialect[kind].items():
            registry.get(kind, component).validate(options)
    assert set(dialect["reduction"]) <= set(dialect["loss"])
    assert set(dialect["reduction"].values()) <= set(REDUCTIONS)


@pytest.mark.parametrize(
    ("dialect", "kind", "component", "options"),
    [
        ("trl", "advantage", "group", {"epsilon": 1e-4, "std": "sample"}),
        ("verl", "advantage", "group", {"epsilon": 1e-6, "std": "sample"}),
        ("trl", "advantage", "gdpo", {"epsilon": 1e-4, "std": "sample", "whiten": "rows"}),
        ("verl", "advantage", "gdpo", {"epsilon": 1e-6, "std": "sample", "whiten": "tokens"}),
        ("verl", "advantage", "pass_at_k", {"k": None, "std": "sample", "epsilon": 1e-6}),
        ("verl", "advantage", "reinforce_pp", {"epsilon": 1e-8, "std": "sample"}),
        ("trl", "kl", "k3", {"clamp": None}),
        ("verl", "kl", "k3", {"clamp": [20.0, 10.0]}),
        ("verl", "kl", "k2", {"clamp": None}),
        ("trl", "kl", "k3_corrected", {"behavior": "old"}),
        ("verl", "loss", "clip", {"delta": None, "dual_clip": 3.0}),
        ("trl", "loss", "cispo", {"min_ratio": 0.0}),
        ("verl", "loss", "cispo", {"min_ratio": 0.8, "max_ratio": 1.2}),
        ("verl", "loss", "dppo_tv", {"max_ratio": 3.0, "behavior": "old"}),
        ("trl", "correction", "tis", {"cap": 3.0}),
        ("verl", "correction", "tis", {"cap": 2.0}),
        ("trl", "correction", "icepop", {"low": 0.0, "high": 3.0, "kept": "ratio"}),
        ("verl", "correction", "sequence_mask", {"low": 0.5, "high": 2.0, "kept": "one"}),
    ],
)
def test_what_a_dialect_sets(dialect: str, kind: str, component: str, options: dict[str, Any]) -> None:
    assert read_dialect(dialect)[kind][component] == options


@pytest.mark.parametrize(
    ("dialect", "file", "kind", "component"),
    [
        ("trl", "advantages/group-trl", "advantage", "group"),
        ("verl", "advantages/group-verl", "advantage", "group"),
        ("trl", "advantages/batch_std-trl", "advantage", "batch_std"),
        ("verl", "advantages/gdpo-verl", "advantage", "gdpo"),
        ("verl", "kl/k3-verl", "kl", "k3"),
        ("verl", "kl/k3_plus-verl", "kl", "k3_plus"),
        ("trl", "kl/k3_corrected-trl", "kl", "k3_corrected"),
        ("verl", "losses/cispo-verl", "loss", "cispo"),
        ("trl", "corrections/tis-trl", "correction", "tis"),
        ("verl", "corrections/tis_sequence-verl", "correction", "tis_sequence"),
        ("verl", "corrections/sequence_mask-verl", "correction", "sequence_mask"),
    ],
)
def test_a_dialect_is_the_one_of_the_golden_vectors(dialect: str, file: str, kind: str, component: str) -> None:
    options = json.loads((GOLDEN / f"{file}.json").read_text())["options"]
    assert options == read_dialect(dialect)[kind][component]


def test_above_the_recipe_with_its_own_origin() -> None:
    config = configured("verl", ["tiny-math", "two_sided"])
    assert configured(None, ["tiny-math", "two_sided"]).loss.options["delta"] == 4.0
    assert config.loss.options == {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None, "dual_clip": 3.0}
    assert config.origins.of("loss", "dual_clip") == " (from --dialect verl)"
    assert config.origins.of("loss", "name") == " (from recipe two_sided)"


def test_below_set() -> None:
    config = configured("verl", (), "loss.dual_clip=5.0", "advantage.epsilon=0.5")
    assert (config.loss.options["dual_clip"], config.advantage.options["epsilon"]) == (5.0, 0.5)
    assert config.kl.options["clamp"] == [20.0, 10.0]
    assert config.origins.of("loss", "dual_clip") == " (from --set loss.dual_clip=5.0)"


@pytest.mark.parametrize("chosen_by", ["flag", "set"])
def test_of_the_components_that_are_chosen_above_it(chosen_by: str) -> None:
    if chosen_by == "flag":
        config = configured("verl", (), loss="cispo", kl="k3_plus")
    else:
        config = configured("verl", (), "loss.name=cispo", "kl.name=k3_plus")
    assert (config.loss.name, config.loss.options) == ("cispo", {"min_ratio": 0.8, "max_ratio": 1.2})
    assert (config.kl.name, config.kl.options, config.kl.beta) == ("k3_plus", {"clamp": [20.0, 10.0]}, 0.02)


def test_of_the_parts_that_a_file_chooses(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("loss: {name: sapo}\nreduction: token\ncorrections: [{name: tis, cap: 9.0}]\n")
    config = configured("trl", [str(file)])
    assert (config.loss.name, config.reduction) == ("sapo", "sequence")
    assert config.corrections[0].options == {"cap": 3.0}


def test_where_nothing_names_a_component() -> None:
    config = build(user_layers([("bare", {})], (), (), None, dialect="verl"))
    assert (config.loss.name, config.loss.options) == ("clip", {"delta": None, "dual_clip": 3.0})


@pytest.mark.parametrize("override", ["corrections=[{name: tis}, {name: icepop, high: 4.0}]", "corrections.tis.cap=7"])
def test_of_corrections(override: str) -> None:
    config = configured("trl", (), override)
    options = {part.name: part.options for part in config.corrections}
    expected = {"tis": {"cap": 3.0}, "icepop": {"low": 0.0, "high": 4.0, "kept": "ratio"}}
    assert options == (expected if "icepop" in options else {"tis": {"cap": 7}})


@pytest.mark.parametrize(
    ("dialect", "recipe", "reduction"),
    [
        ("trl", "sapo", "sequence"),
        ("trl", "vespo", "token"),
        ("verl", "gspo", "sequence"),
        ("trl", "dr_grpo", "constant"),
        ("verl", "grpo", "sequence"),
        ("verl", "dapo", "token"),
    ],
)
def test_the_reduction_where_a_loss_has_only_one(dialect: str, recipe: str, reduction: str) -> None:
    other = {"sequence": "token", "token": "sequence"}.get(reduction, "constant")
    forced = recipe in ("sapo", "vespo", "gspo")
    below = [*base_layers(["tiny-math", recipe]), ("test", {"reduction": other if forced else reduction})]
    config = build(user_layers(below, (), (), None, dialect=dialect))
    assert config.reduction == reduction


def test_a_component_that_the_dialect_does_not_know_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = configured("verl", (), loss="vespo", advantage="maxrl")
    assert [record.getMessage() for record in caplog.records] == [
        "dialect verl has no advantage `maxrl`: its options stay as they are",
        "dialect verl has no loss `vespo`: its options stay as they are",
    ]
    assert (config.loss.name, config.loss.options, config.advantage.options) == ("vespo", {}, {})


def test_a_kl_that_is_off_plays_no_part(caplog: pytest.LogCaptureFixture) -> None:
    config = configured("trl", (), "kl.name=full", "kl.beta=0.0")
    assert (config.kl.options, caplog.messages) == ({}, [])


def test_a_first_party_component_by_its_full_name() -> None:
    config = configured("verl", (), loss="grpoforge:cispo")
    assert config.loss.options == {"min_ratio": 0.8, "max_ratio": 1.2}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("recipe", [name for name in recipe_names() if not name.startswith("gsm8k")])
def test_every_recipe_speaks_every_dialect(recipe: str, dialect: str) -> None:
    config, registry = configured(dialect, [recipe]), load_plugins().registry
    for kind in ("advantage", "loss", "kl"):
        part = getattr(config, kind)
        registry.get(kind, part.name).build(part.options)


def test_an_unknown_dialect() -> None:
    with pytest.raises(ConfigError) as caught:
        configured("verll")
    assert caught.value.message == "unknown dialect `verll` (from --dialect)"
    assert caught.value.hint == "did you mean `verl`?"


def test_what_a_plan_says_of_it() -> None:
    config = configured("verl", ["tiny-math", "dapo"], "advantage.std=population", "corrections=[{name: tis}]")
    assert describe_dialect(config) == (
        "verl: advantage.epsilon 1e-06, corrections.tis.cap 2.0, loss.delta null, loss.dual_clip 3.0"
    )
    assert describe_dialect(configured(None)) == ""
