"""A run and its reports, made up: two prompts, two completions each, two rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from grpoforge.tracking import RunInfo
from grpoforge.types import Completion, Prompt, Rollouts, Scores, StepReport

METRICS: Mapping[str, float] = {
    "reward": 0.75,
    "reward_std": 0.25,
    "rewards/math/mean": 0.5,
    "rewards/math/std": 0.5,
    "rewards/brevity/mean": 0.125,
    "completions/mean_length": 34.125,
    "kl": 0.0131,
    "num_tokens": 4096,
    "tokens_per_second": 4123.4,
}


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo(
        run_dir=tmp_path,
        model="tiny",
        num_parameters=812_032,
        dataset="tiny-math",
        num_train=4096,
        num_eval=256,
        rewards=("math x1", "brevity x0.1 (only where math is right)"),
        device="cpu",
        dtype="float32",
        prompts_per_step=2,
        completions_per_prompt=2,
        first_step=0,
        max_steps=40,
        notes=("no chat template: plain prompt template",),
    )


@pytest.fixture
def make_report() -> Callable[..., StepReport]:
    return _make_report


def _make_report(step: int, text: str = "4", metrics: Mapping[str, float] = METRICS) -> StepReport:
    """A report in which every prompt is ``2+2?`` and every completion ``text``, cut at the token limit."""
    completion = Completion(
        text=text,
        token_ids=(5, 6),
        logprobs=(-0.5, -0.5),
        temperature=0.7,
        finish_reason="length",
        policy_version=step - 1,
    )
    prompt = Prompt(text="2+2?", token_ids=(1,), columns={}, index=3)
    shares = torch.tensor([[[0.5, 0.25], [-0.5, -0.25]]] * 2, dtype=torch.float64)
    return StepReport(
        step=step,
        metrics=metrics,
        rollouts=Rollouts(prompts=(prompt, prompt), completions=((completion,) * 2,) * 2, max_completion_length=2),
        scores=Scores(
            names=("math", "brevity"),
            raw=torch.tensor([[[1.0, 0.5], [0.0, 0.5]]] * 2),
            rewards=torch.tensor([[[1.0, 0.5], [0.0, 0.0]]] * 2),
            weights=torch.tensor([1.0, 0.5]),
            seconds=(0.0, 0.0),
        ),
        advantages=shares.sum(dim=2),
        shares=shares,
    )
