"""Every correction against the formula, with the bounds of the known dialects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grpoforge.binding import bind
from grpoforge.plugins import load_plugins

FILES = sorted((Path(__file__).parents[2] / "golden" / "corrections").glob("*.json"))


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    case = read(path)
    component = load_plugins().registry.get("correction", f"grpoforge:{case['component']}")
    data = {
        name: torch.tensor(values, dtype=torch.bool if name == "completion_mask" else torch.float64)
        for name, values in case["inputs"].items()
    }
    weights = bind("correction", component.build(case["options"]))(data)
    expected = torch.tensor(case["weights"], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)


def test_every_correction_has_a_golden_file() -> None:
    names = {component.name for component in load_plugins().registry.list("correction")}
    assert names == {read(path)["component"] for path in FILES}
