"""Every recipe that comes with the package builds, names parts that exist and fit, and says what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from grpoforge.cli.recipes_command import headline
from grpoforge.cli.settings import base_layers
from grpoforge.combinations import check_together
from grpoforge.config import Config
from grpoforge.layers import build
from grpoforge.parts import choose, choose_measured, choose_rewards
from grpoforge.plugins import load_plugins
from grpoforge.yaml_source import dump_yaml, parse_yaml, read_recipe, recipe_layers, recipe_names, recipe_text

ROOT = Path(__file__).parents[1]
RECIPES = recipe_names()
TASKS = ["gsm8k-qwen2.5-0.5b", "gsm8k-qwen2.5-3b", "gsm8k-smoke", "tiny-math"]
SAMPLERS = ["paired"]
"""Recipes that choose a sampler too; each has a benchmark of its own."""
ALGORITHMS = [name for name in RECIPES if name not in TASKS + SAMPLERS]
OF_AN_ALGORITHM = {
    "recipe",
    "rewards",
    "advantage",
    "loss",
    "kl",
    "corrections",
    "entropy",
    "reduction",
    "batch",
    "optim",
}


def check(config: Config) -> None:
    """Resolve every part, as a run does before it loads anything."""
    host = load_plugins()
    choose_rewards(config.rewards, host)
    choose_measured(config, host)
    advantage, loss, kl = (choose(kind, getattr(config, kind), host).build() for kind in ("advantage", "loss", "kl"))
    corrections = tuple((part.name, choose("correction", part, host).build()) for part in config.corrections)
    sampler = choose("sampler", config.sampler, host).build()
    check_together(config, sampler=sampler, advantage=advantage, loss=loss, kl=kl, corrections=corrections)
    for tracker in config.trackers:
        choose("tracker", tracker, host)


def test_the_algorithms_of_the_field_are_there() -> None:
    assert set(ALGORITHMS) == {
        *("grpo", "dr_grpo", "dapo", "lite_ppo", "two_sided", "dual_clip", "cispo", "sapo", "dppo_tv", "vespo"),
        *("gspo", "gspo_token", "gmpo", "luspo"),
        *("rloo", "gpg", "opo", "reinforce_pp", "reinforce_pp_baseline", "maxrl", "pass_at_k", "gdpo"),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_every_part_resolves(name: str) -> None:
    check(build(recipe_layers(name)))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_being_written_out(name: str) -> None:
    config = build(recipe_layers(name))
    written = parse_yaml(dump_yaml(config.model_dump(mode="json")), "written")
    assert build([*recipe_layers(name), ("written", written)]) == config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_what_it_is(name: str) -> None:
    first = recipe_text(name).partition("\n")[0]
    assert first.startswith(f"# {name}: ")
    assert headline(recipe_text(name)) == first.removeprefix(f"# {name}: ")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_names_its_paper_and_numbers_what_differs(name: str) -> None:
    lines = [line for line in recipe_text(name).splitlines() if line.startswith("#")]
    assert re.search(r"\b\d{4}\.\d{5}\b", lines[0])
    numbers = [int(found[1]) for line in lines[1:] if (found := re.match(r"#   (\d)\. ", line))]
    assert numbers == list(range(1, len(numbers) + 1)) != []


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_parts_only_and_goes_over_any_task(name: str) -> None:
    values = read_recipe(name)
    assert values["recipe"] == "tiny-math"
    assert set(values) <= OF_AN_ALGORITHM
    assert {"advantage", "loss", "kl", "reduction"} <= set(values)
    assert "learning_rate" not in values.get("optim", {})  # a model's, not an algorithm's
    groups = ("groups of 8", {"batch": {"prompts_per_step": 16, "completions_per_prompt": 8}})
    config = build([*base_layers(["gsm8k-qwen2.5-0.5b", name]), groups])
    assert (config.recipe, config.model.name) == (f"gsm8k-qwen2.5-0.5b+{name}", "Qwen/Qwen2.5-0.5B-Instruct")
    assert config.optim.learning_rate == 1e-5
    check(config)


def test_paired_draws_as_many_pairs_as_a_batch_has_and_leaves_the_length_to_the_task() -> None:
    for task, length in (("tiny-math", 64), ("gsm8k-qwen2.5-0.5b", 512)):
        config = build(base_layers([task, "paired"]))
        check(config)
        assert config.sampler.options["max_completion_length"] == length
        assert config.sampler.options["temperatures"] == [0.7, 1.3]
        assert config.batch.prompts_per_step * config.batch.completions_per_prompt == 2 * 64
    assert set(read_recipe("paired")) <= {*OF_AN_ALGORITHM, "sampler"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_states_every_option_of_its_loss(name: str) -> None:
    loss = build(recipe_layers(name)).loss
    options = load_plugins().registry.get("loss", loss.name).options.model_fields
    assert set(options) - set(loss.options) <= {"delta", "dual_clip"}


def test_dapo_is_what_its_paper_says() -> None:
    config = build(recipe_layers("dapo"))
    assert config.loss.options == {"epsilon_low": 0.2, "epsilon_high": 0.28}
    assert (config.reduction, config.kl.beta, config.batch.dynamic_sampling) == ("token", 0.0, 2)
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("math", 1.0), ("soft_overlong", 1.0)]


@pytest.mark.parametrize("name", ["gpg", "rloo", "opo"])
def test_an_algorithm_without_a_ratio_takes_one_optimizer_step_per_batch(name: str) -> None:
    assert build(recipe_layers(name)).updates_per_step == 1


def test_the_figures_in_the_guide_are_those_that_were_measured() -> None:
    page = (ROOT / "docs/guides/algorithms.md").read_text(encoding="utf-8")
    results = max((ROOT / "benchmarks/results").glob("recipes-*.json"))
    runs = json.loads(results.read_text())["runs"]
    assert results.name in page
    assert sorted(runs) == ALGORITHMS
    for name, run in runs.items():
        assert f"| `{name}` | {run['accuracy_before']:.1f}% | {run['accuracy_after']:.1f}% |" in page
        assert run["accuracy_after"] > run["accuracy_before"]


@pytest.mark.parametrize(("results", "label"), [("paired", ""), ("paired-reasoning", ", three rewards")])
def test_the_figures_of_paired_sampling_in_the_guide_are_those_that_were_measured(results: str, label: str) -> None:
    """And within five points of plain GRPO, seed by seed, after as many completions."""
    page = (ROOT / "docs/guides/paired.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / f"benchmarks/results/{results}-2026-11-28.json").read_text())
    assert measured["completions"] == 4608 and "4,608" in page
    accuracy = {
        kind: [measured["runs"][f"{kind}-{seed}"]["accuracy"] for seed in range(3)] for kind in ("grpo", "paired")
    }
    for kind, found in accuracy.items():
        assert f"| {kind}{label} | {' | '.join(f'{one:.1f}%' for one in found)} | {sum(found) / 3:.1f}% |" in page
    assert all(ours >= theirs - 5 for ours, theirs in zip(accuracy["paired"], accuracy["grpo"], strict=True))
    every_gap = json.loads((ROOT / "benchmarks/results/paired-every-gap-2026-11-28.json").read_text())["runs"][
        "paired-0"
    ]
    assert f"accuracy is {every_gap['accuracy']:.1f}% and mean length {every_gap['length']:.1f}" in page


def test_the_parity_table_in_the_guide_is_the_one_that_was_measured() -> None:
    page = (ROOT / "docs/guides/algorithms.md").read_text(encoding="utf-8")
    results = max((ROOT / "benchmarks/results").glob("parity-trl-*.json"))
    record = json.loads(results.read_text())
    assert results.name in page
    assert f"TRL {record['versions']['trl']}" in page
    for name, row in record["cases"].items():
        assert f"| {name} | {row['loss']:.6f} |" in page
        assert row["verdict"].startswith(("equal", "differs: "))
