"""Every component that comes with the package keeps its contract; a new one is found by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from grpoforge.plugins import load_plugins
from grpoforge.registry import KINDS, Component
from grpoforge.testing import check_component, check_reward

ROOT = Path(__file__).parents[2]

ELSEWHERE = {"vllm", "vllm_colocate"}
"""They need vLLM: tests/plugins/vllm holds `vllm` to the contract with a server, benchmarks/vllm/check.py runs both."""

COMPONENTS = [one for one in load_plugins().registry.list() if one.plugin == "grpoforge" and one.name not in ELSEWHERE]


UNUSUAL = {("reward_model", "form", "chat"), ("reward_model", "device", "cuda"), ("reward_model", "precision", "bf16")}
"""Without a chat template and without a GPU these are refused; in bf16 the rest of a batch shows."""


def test_there_are_components_of_every_kind() -> None:
    assert {one.kind for one in COMPONENTS} == set(KINDS)


@pytest.fixture(scope="module")
def required(classifier: Path) -> dict[str, dict[str, Any]]:
    """Options of components that cannot do without."""
    return {"reward_model": {"model": str(classifier)}}


def test_what_is_required_is_known(required: dict[str, dict[str, Any]]) -> None:
    needed = {one.name: {name.name for name in one.option_parameters if name.required} for one in COMPONENTS}
    assert {name: set(options) for name, options in required.items()} == {k: v for k, v in needed.items() if v}


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda one: f"{one.kind}-{one.name}")
def test_keeps_its_contract(component: Component, required: dict[str, dict[str, Any]]) -> None:
    report = check_component(component, required.get(component.name, {}))
    assert report.kept, report
    assert [one for one in report.findings if one.status == "passed"]


def choices() -> Iterator[tuple[Component, dict[str, Any]]]:
    """Every value of every option that can be counted."""
    for component in COMPONENTS:
        for name, field in component.options.model_fields.items():
            values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            for value in (True, False) if field.annotation is bool else values:
                if value != field.default and (component.name, name, value) not in UNUSUAL:
                    yield component, {name: value}


@pytest.mark.parametrize(
    ("component", "options"), list(choices()), ids=lambda one: one.name if isinstance(one, Component) else str(one)
)
def test_keeps_it_with_every_choice(
    component: Component, options: dict[str, Any], required: dict[str, dict[str, Any]]
) -> None:
    report = check_component(component, required.get(component.name, {}) | options)
    assert report.kept, report


def test_the_components_of_the_guide_and_the_example_keep_it(tmp_path: Path) -> None:
    guide = (ROOT / "docs/guides/write-a-plugin.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    (tmp_path / "guide.py").write_text(next(one for one in blocks if "register_losses" in one), encoding="utf-8")
    example = ROOT / "examples/plugins/grpoforge-politeness/grpoforge_politeness.py"
    components = load_plugins([tmp_path / "guide.py", example], entry_points=[]).registry.list()
    checked = [check_component(one) for one in components if one.name != "server"]  # an outline
    assert len(checked) >= 6
    for report in checked:
        assert report.kept, report


def test_the_test_in_the_guide_passes() -> None:
    politeness = load_plugins(
        [ROOT / "examples/plugins/grpoforge-politeness/grpoforge_politeness.py"], entry_points=[]
    ).registry.get("reward", "politeness")
    report = check_reward(politeness.factory, word="thanks")
    assert report.kept, report
