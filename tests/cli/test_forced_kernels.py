"""``GRPOFORGE_KERNELS``: a force that cannot be met is a user's mistake, said before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from grpoforge_kernels import dispatch

COMMANDS = {
    "train": ("train",),
    "dry run": ("train", "--dry-run"),
    "resume": ("train", "--resume", "run"),
    "eval": ("eval", "./m"),
    "bench": ("bench", "--quick"),
    "certify": ("bench", "--certify"),
}


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize(
    ("forced", "message", "hint"),
    [
        ("refrence", "GRPOFORGE_KERNELS=refrence names no backend", "did you mean reference?"),
        ("CUDA", "GRPOFORGE_KERNELS=CUDA names no backend", "the backends are reference, cpp, triton"),
        (
            "triton",
            "GRPOFORGE_KERNELS=triton cannot run selective_log_softmax: it does not run on cpu",
            "unset GRPOFORGE_KERNELS: the best backend is then chosen",
        ),
    ],
)
def test_a_force_that_cannot_be_met(
    command: str, forced: str, message: str, hint: str,
    refused: Callable[..., tuple[str, str]], model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Whoever looked at these weights would say something else.
    model("m", "model.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"model": {"name": str(tmp_path / "m")}}}))
    monkeypatch.setenv(dispatch.VARIABLE, forced)
    more = ("--model", "./m") if command in ("train", "dry run") else ()
    assert refused(*COMMANDS[command], *more) == (message, hint)


@pytest.mark.parametrize("forced", ["", "reference"])
def test_a_force_that_can_be_met(
    forced: str, cli: Callable[..., Any], small: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, forced)
    said = cli("train", *small, "--max-steps", "1")
    assert said.code == 0, said.err
    used = dispatch.backend_name("selective_log_softmax", torch.device("cpu"), torch.float32)
    assert not forced or used == forced
