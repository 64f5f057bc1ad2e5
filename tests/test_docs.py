"""The documents tell the truth: hooks, commands, code, and what CI runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from grpoforge.cli.main import app
from grpoforge.cli.settings import parse_reward
from grpoforge.launch import start
from grpoforge.layers import build
from grpoforge.plugins import HOOKS, load_plugins
from grpoforge.yaml_source import parse_override, read_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs/guides/write-a-plugin.md").read_text(encoding="utf-8")
METRICS = (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of `text` in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def ci_command(name: str) -> str:
    """The code block after `<!-- ci: NAME -->` in the README."""
    found = re.findall(rf"<!-- ci: {name} -->\s*```\w*\n(.*?)\n```", README, re.DOTALL)
    assert len(found) == 1, f"the README has {len(found)} blocks marked `ci: {name}`"
    return str(found[0])


def commands(group: typer.Typer = app, prefix: str = "grpoforge") -> Iterator[str]:
    """`grpoforge train`, `grpoforge plugins list`, ..."""
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{prefix} {command.name or command.callback.__name__.replace('_', '-')}"
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from commands(inner.typer_instance, f"{prefix} {inner.name}")


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_in_the_plugin_guide(hook: str) -> None:
    assert f"`{hook}" in GUIDE


@pytest.mark.parametrize("command", [*commands()])
def test_every_command_is_documented(command: str) -> None:
    assert any(command in path.read_text(encoding="utf-8") for path in DOCS)


def test_the_plugin_in_the_readme_works(tmp_path: Path) -> None:
    (code,) = [block for block in blocks(README, "python") if "@hookimpl" in block]
    plugin = tmp_path / "my_reward.py"
    plugin.write_text(code)
    politeness = load_plugins([plugin]).registry.get("reward", "politeness")
    assert politeness.build({})(["Please!", "no"]) == [1.0, 0.0]
    assert politeness.build({"word": "no"})(["Please!", "no"]) == [0.0, 1.0]


def shell_lines() -> list[str]:
    """Every `grpoforge train` in the documents, with continued lines joined."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("grpoforge train")]


def test_settings_and_rewards_in_the_documents_are_real() -> None:
    recipe = ("recipe", read_recipe("tiny-math"))
    for line in shell_lines():
        for override in re.findall(r"(?:--set|-s) ([\w.]+=\S+)", line):
            build([recipe, (line, parse_override(override))])
        for reward in re.findall(r"(?:--reward|-r) (\S+)", line):
            assert parse_reward(reward)["name"]


def test_yaml_in_the_documents_is_a_configuration() -> None:
    for path in DOCS:
        for block in blocks(path.read_text(encoding="utf-8"), "yaml"):
            values = yaml.safe_load(block)
            below = read_recipe(values.get("recipe", "tiny-math"))
            build([("recipe", below), (f"{path.name}", values)])


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in local if not (path.parent / link).exists()] == []


def test_ci_runs_the_commands_of_the_readme() -> None:
    shown = subprocess.run([ROOT / ".ci/run", "--show"], cwd=ROOT, capture_output=True, text=True, check=True)
    main, test = ci_command("main"), ci_command("test")
    assert shown.stdout.splitlines() == [main, test]
    assert main.startswith("pip install . && grpoforge train") and "pytest" in test


def test_the_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, "docs/reference/generate.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_every_key_with_its_default_can_be_typed_as_documented() -> None:
    page = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([a-z_.]+)` \| `(.*?)` \|", page, re.MULTILINE)
    assert ("optim.betas", "[0.9, 0.999]") in documented and ("model.lora", "null") in documented
    any_batch = {"batch": {"minibatch_size": None, "micro_batch_size": None}}
    below = [("recipe", read_recipe("tiny-math")), ("any batch", any_batch)]
    for key, value in documented:
        if key != "recipe":  # named as an argument, never by --set
            build([*below, ("config.md", parse_override(f"{key}={value}"))])


RUN = {
    "data": {"num_eval": 2},
    "rewards": [{"name": "math"}, {"name": "brevity"}],
    "batch": {"prompts_per_step": 2, "completions_per_prompt": 2, "minibatch_size": 4, "micro_batch_size": 4},
    "sampler": {"max_completion_length": 4},
    "eval": {"samples": 2},
    "max_steps": 2,
    "trackers": [{"name": "jsonl"}, {"name": "rollouts"}],
}


EVERYTHING = {
    "sampler": {"name": "paired", "num_sample_pairs": 2},
    "advantage": {"name": "paired"},
    "rewards": [{"name": "math"}, {"name": "brevity"}, {"name": "preference"}],
    "kl": {"target": 0.1},
    "corrections": [{"name": "tis"}],
    "entropy": {"target": 0.5},
    "loss": {"dual_clip": 3.0},
    "batch": {"dynamic_sampling": 1, "top_entropy_quantile": 0.5},
    "max_steps": 1,
}
"""Turns on what a run does not do by default and then reports."""


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step with everything turned on that has metrics of its own."""
    path = tmp_path_factory.mktemp("everything") / "run"
    start(build([("recipe", read_recipe("tiny-math")), ("test_docs", RUN), ("everything", EVERYTHING)]), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps with two rewards and sampled evaluation."""
    path = tmp_path_factory.mktemp("documented") / "run"
    start(build([("recipe", read_recipe("tiny-math")), ("test_docs", RUN)]), path)
    return path


def described(first: str, last: str) -> set[str]:
    """The names in the first column of the tables of metrics.md between two headings."""
    part = METRICS[METRICS.index(f"\n## {first}\n") : METRICS.index(f"\n## {last}\n")]
    return set(re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE))


def test_the_metrics_page_describes_the_metrics_of_a_run_and_no_others(run: Path, everything: Path) -> None:
    lines = [
        json.loads(line) for path in (run, everything) for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    names = {name for line in lines for name in line} - {"step", "kind"}
    placeholders = {"rewards/[^/]+/": "rewards/{name}/", "mean@2": "mean@{K}", "(pass|maj)@2": r"\1@{k}"}
    placeholders |= {"reward_T/[^/]+/": "reward_T/{temperature}/"}
    written = set(names)
    for pattern, placeholder in placeholders.items():
        written = {re.sub(pattern, placeholder, name) for name in written}
    assert written == described("Metrics", "Rollouts")


def test_the_metrics_page_describes_the_columns_of_the_rollouts_and_no_others(run: Path) -> None:
    from pyarrow import parquet

    columns = parquet.read_schema(run / "rollouts/step-000002.parquet").names
    assert {re.sub("^[^/]+/", "{name}/", column) for column in columns} == described("Rollouts", "Files")


def test_the_metrics_page_describes_the_files_of_a_run(run: Path) -> None:
    kept = {path.name for path in run.iterdir() if path.is_file()}
    kept |= {path.name for path in (run / "checkpoints/step-000002").iterdir()}
    of_the_model = {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    of_the_model |= {"tokenizer.json", "tokenizer_config.json"}
    assert [name for name in sorted(kept - of_the_model) if f"`{name}`" not in METRICS] == []
