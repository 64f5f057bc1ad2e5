"""The example package and the guide are what they say they are."""

from __future__ import annotations

import re
import tomllib
from math import nan
from pathlib import Path

import torch

from grpoforge.plugins import load_function, load_plugins
from grpoforge.registry import KINDS
from grpoforge.types import LossInputs

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "plugins" / "grpoforge-politeness"
GUIDE = ROOT / "docs" / "guides" / "write-a-plugin.md"


def test_the_example_package_works_as_a_file_and_as_a_package() -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["entry-points"]["grpoforge"] == {"politeness": "grpoforge_politeness"}
    host = load_plugins([EXAMPLE / "grpoforge_politeness.py"], entry_points=[])
    politeness = host.registry.get("reward", "politeness")
    assert politeness.build({})(["Please.", "No."]) == [1.0, 0.0]
    assert politeness.doc == "1.0 when the completion says `word`, else 0.0."


def guide_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_guide_shows_the_example_as_it_is() -> None:
    assert (EXAMPLE / "grpoforge_politeness.py").read_text(encoding="utf-8") in guide_blocks("python")
    table = next(block for block in guide_blocks("toml") if "entry-points" in block)
    assert table in (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")


def test_every_plugin_in_the_guide_loads_and_every_kind_is_shown(tmp_path: Path) -> None:
    kinds = set()
    plugins = [block for block in guide_blocks("python") if "@hookimpl" in block]
    for index, block in enumerate(plugins):
        path = tmp_path / f"guide_{index}.py"
        path.write_text(block, encoding="utf-8")
        kinds |= {one.kind for one in load_plugins([path], entry_points=[]).registry.list()}
    assert kinds == set(KINDS)


def test_every_plain_reward_in_the_guide_loads(tmp_path: Path) -> None:
    plain = [block for block in guide_blocks("python") if "@hookimpl" not in block]
    assert plain
    for index, block in enumerate(plain):
        path = tmp_path / f"plain_{index}.py"
        path.write_text(block, encoding="utf-8")
        for name in re.findall(r"^def (\w+)", block, flags=re.MULTILINE):
            assert load_function(path, name).name == name


def test_the_components_of_the_guide_compute_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "guide.py"
    path.write_text(next(block for block in guide_blocks("python") if "register_losses" in block), encoding="utf-8")
    registry = load_plugins([path], entry_points=[]).registry
    rewards = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [nan, nan]]], dtype=torch.float64)
    # Totals 1, 3 + 0.5 * 2 = 4 and none; their mean is 2.5.
    advantages = registry.get("advantage", "centered").build({})(rewards, torch.tensor([1.0, 0.5]))
    assert advantages.tolist() == [[-1.5, 1.5, 0.0]]
    ones = torch.ones(1, 2)
    inputs = LossInputs(
        logprobs=ones.log(),
        old_logprobs=torch.tensor([[0.5, 1.0]]).log(),  # ratios 2 and 1
        sampling_logprobs=ones.log(),
        advantages=ones,
        completion_mask=ones.bool(),
        entropy=ones,
    )
    per_token_loss, metrics = registry.get("loss", "clipped").build({"high": 1.5})(inputs)
    assert per_token_loss.tolist() == [[-1.5, -1.0]]
    assert metrics["clip_ratio/any"].tolist() == [[1.0, 0.0]]
    assert registry.get("kl", "half-square").build({})(ones, 3 * ones).tolist() == [[2.0, 2.0]]
