"""Every recipe that comes with the package builds, names parts that exist, and says what it is."""

from __future__ import annotations

import pytest

from grpoforge.cli.recipes_command import headline
from grpoforge.layers import build
from grpoforge.parts import choose, choose_measured, choose_rewards
from grpoforge.plugins import load_plugins
from grpoforge.yaml_source import dump_yaml, parse_yaml, read_recipe, recipe_names, recipe_text

RECIPES = recipe_names()


def test_the_default_recipe_is_there() -> None:
    assert "tiny-math" in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_every_part_resolves(name: str) -> None:
    config = build([(f"recipe {name}", {"recipe": name, **read_recipe(name)})])
    host = load_plugins()
    choose_rewards(config.rewards, host)
    choose_measured(config, host)
    for kind in ("sampler", "advantage", "loss", "kl"):
        choose(kind, getattr(config, kind), host)
    for tracker in config.trackers:
        choose("tracker", tracker, host)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_being_written_out(name: str) -> None:
    config = build([(f"recipe {name}", {"recipe": name, **read_recipe(name)})])
    written = parse_yaml(dump_yaml(config.model_dump(mode="json")), "written")
    assert build([(f"recipe {name}", read_recipe(name)), ("written", written)]) == config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_what_it_is(name: str) -> None:
    first = recipe_text(name).partition("\n")[0]
    assert first.startswith(f"# {name}: ")
    assert headline(recipe_text(name)) == first.removeprefix(f"# {name}: ")
