"""The broken plugins under examples: the kit names each planted fault, and nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from grpoforge.plugins import load_plugins
from grpoforge.testing import Report, check_component

EXAMPLES = Path(__file__).parents[2] / "examples" / "plugins"


def checked(name: str) -> tuple[Report, str]:
    """The report on the one component of an example, and the example's docstring."""
    registry = load_plugins([EXAMPLES / f"{name}.py"], entry_points=[]).registry
    (component,) = registry.list()
    return check_component(component), sys.modules[f"grpoforge_local_{name}"].__doc__ or ""


@pytest.mark.parametrize("name", ["broken_reward", "broken_loss", "broken_advantage"])
def test_every_planted_fault_is_named(name: str) -> None:
    report, doc = checked(name)
    planted = set(re.findall(r"^- `(\w+)`", doc, re.MULTILINE))
    assert len(planted) >= 6
    assert {one.rule for one in report.broken} == planted


def test_the_findings_show_the_fault() -> None:
    details = {one.rule: one.detail for name in ("broken_reward", "broken_loss") for one in checked(name)[0].broken}
    assert details["abstains"].startswith("with `answer` = 'there is no answer to this' every completion got 0")
    assert details["hostile_text"].startswith("a huge number ('#### 999")
    assert details["travels"] == "it cannot be sent: Can't pickle local object 'make_reward.<locals>.last_number'"
    assert details["empty_completion"].startswith("reward `last-number` raised IndexError: list index out of range")
    assert details["normalizes_nothing"] == "with every row twice: [0, 4] is -0.0723758, not -0.144752"
    assert details["on_policy_gradient"] == "gradient at ratio 1: [3, 0] is 0.125714, not 1.6"
    advantage = {one.rule: one.detail for one in checked("broken_advantage")[0].broken}
    assert advantage["float64"] == "it returned float32"
    assert advantage["leaves_data_alone"] == "it changed what it was given: `rewards`[1, 2, 0] is 0, not nan"
