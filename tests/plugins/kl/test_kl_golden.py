"""Every KL estimator, value and gradient, against formulas computed with 50 digits; with the clamps of the dialects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grpoforge.binding import bind
from grpoforge.plugins import load_plugins

FILES = sorted((Path(__file__).parents[2] / "golden" / "kl").glob("*.json"))


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    case = read(path)
    component = load_plugins().registry.get("kl", f"grpoforge:{case['component']}")
    data = {name: torch.tensor(values, dtype=torch.float64) for name, values in case["inputs"].items()}
    leaf = data["distribution" if "distribution" in data else "logprobs"].requires_grad_()
    estimate = bind("kl", component.build(case["options"]))(data)
    (gradient,) = torch.autograd.grad(estimate.sum(), leaf)
    for found, expected in ((estimate, case["estimate"]), (gradient, case["gradient"])):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_every_estimator_has_a_golden_file() -> None:
    names = {component.name for component in load_plugins().registry.list("kl")}
    assert names == {read(path)["component"] for path in FILES}
