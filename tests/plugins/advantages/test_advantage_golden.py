"""Every advantage against the paper's formula in float64, with the epsilons and deviations of the known dialects."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grpoforge.binding import bind
from grpoforge.contracts import advantages_of
from grpoforge.plugins import load_plugins

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = sorted((GOLDEN / "advantages").glob("*.json"))


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def tensor(values: list[Any]) -> torch.Tensor:
    """Nested numbers as float64, null as NaN."""

    def known(value: Any) -> Any:
        return [known(one) for one in value] if isinstance(value, list) else float("nan") if value is None else value

    return torch.tensor(known(values), dtype=torch.float64)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    case = read(path)
    component = load_plugins().registry.get("advantage", f"grpoforge:{case['component']}")
    data = {name: tensor(values) for name, values in case["inputs"].items()}
    found, _ = advantages_of(bind("advantage", component.build(case["options"])), data)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, tensor(case["advantages"]), rtol=1e-10, atol=1e-10)


def test_every_advantage_has_a_golden_file() -> None:
    names = {component.name for component in load_plugins().registry.list("advantage")}
    assert names == {read(path)["component"] for path in FILES}


def test_the_files_are_what_the_script_writes() -> None:
    """Of all three kinds; to a tolerance, because libm differs between machines."""
    path = GOLDEN / "make_golden_advantages.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    documents = script.documents()
    kinds = ("advantages", "kl", "corrections")
    stored = {f"{kind}/{path.stem}": read(path) for kind in kinds for path in (GOLDEN / kind).glob("*.json")}
    assert set(documents) == set(stored)
    for name, document in documents.items():
        for key, values in document.items():
            if isinstance(values, list):
                torch.testing.assert_close(tensor(values), tensor(stored[name][key]), rtol=1e-12, atol=1e-14)
            else:
                assert json.loads(json.dumps(values)) == stored[name][key], name
