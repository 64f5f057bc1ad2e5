"""Every loss against the papers' formulas in float64: value and gradient, and the forms of the known systems."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.plugins import load_plugins
from grpoforge.types import LossInputs

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = sorted((GOLDEN / "losses").glob("*.json"))


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def inputs_of(case: dict[str, Any]) -> LossInputs:
    data = case["inputs"]
    return LossInputs(
        logprobs=tensor(data["logprobs"]).requires_grad_(),
        old_logprobs=tensor(data["old_logprobs"]),
        sampling_logprobs=tensor(data["sampling_logprobs"]),
        advantages=tensor(data["advantages"]),
        completion_mask=torch.tensor(data["completion_mask"]),
        entropy=torch.zeros_like(tensor(data["logprobs"])),
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_value_and_gradient(path: Path, build_loss: Callable[..., Any]) -> None:
    case = read(path)
    inputs = inputs_of(case)
    per_token_loss, _ = build_loss(case["component"], **case["options"])(inputs)
    kept = torch.where(inputs.completion_mask, per_token_loss, torch.zeros_like(per_token_loss))
    loss = (kept * tensor(case["weights"])).sum()
    (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
    torch.testing.assert_close(kept.detach(), tensor(case["per_token_loss"]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss.detach(), tensor(case["loss"]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, tensor(case["gradient"]), rtol=1e-10, atol=1e-10)


def test_every_loss_has_its_defaults_and_other_options_in_golden_files() -> None:
    """All but REINFORCE, which has no option."""
    names = {component.name for component in load_plugins().registry.list("loss")}
    cases = [read(path) for path in FILES]
    assert {case["component"] for case in cases if not case["options"]} == names
    assert {case["component"] for case in cases if case["options"]} == names - {"reinforce"}


def test_the_golden_rows_reach_every_side_of_the_clips() -> None:
    """A golden file that never clips would agree with a loss that cannot."""
    gradients = {path.stem: tensor(read(path)["gradient"]) for path in FILES}
    mask = torch.tensor(read(FILES[0])["inputs"]["completion_mask"])
    for name in ("clip", "clip-trl", "clip-verl", "gspo", "gspo_token-verl", "luspo", "gmpo", "dppo_tv", "dppo_kl"):
        stopped = mask & (gradients[name] == 0) & (tensor(read(FILES[0])["inputs"]["advantages"]) != 0)
        assert 0 < int(stopped.sum()) < int(mask.sum()), name


def test_the_files_are_what_the_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a tolerance, because libm differs between machines."""
    path = GOLDEN / "make_golden.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, script)  # its dataclasses look themselves up there
    spec.loader.exec_module(script)
    documents = script.documents()
    assert set(documents) == {f"losses/{path.stem}" for path in FILES}
    for name, document in documents.items():
        stored = read(GOLDEN / f"{name}.json")
        assert set(document) == set(stored)
        assert (document["component"], document["options"]) == (stored["component"], stored["options"])
        for key in ("loss", "per_token_loss", "gradient", "weights"):
            torch.testing.assert_close(tensor(document[key]), tensor(stored[key]), rtol=1e-12, atol=1e-14)
        for key, values in document["inputs"].items():
            assert torch.equal(torch.tensor(values), torch.tensor(stored["inputs"][key]))
