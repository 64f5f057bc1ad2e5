"""It learns what it is paid for, and nothing when it is paid for nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpoforge.config import Config
from grpoforge.launch import start
from grpoforge.layers import build
from grpoforge.parts import bind_reward, choose_rewards
from grpoforge.plugins import load_plugins
from grpoforge.scoring import score
from grpoforge.types import Completion, Prompt, Rollouts
from grpoforge.yaml_source import read_recipe
from grpoforge_plugins.advantages.group import group
from grpoforge_plugins.tiny_math import MODEL_DIR

BRIEF = {
    "data": {"num_eval": 128},
    "rewards": [{"name": "math"}],
    "batch": {"prompts_per_step": 16, "minibatch_size": 64, "micro_batch_size": 64},
    "max_steps": 12,
    "eval": {"every": 0},
    "checkpoint": {"every": 0},
    "trackers": [{"name": "jsonl"}],
}


def brief(*changes: dict[str, Any]) -> Config:
    layers = [("recipe", read_recipe("tiny-math")), ("brief", BRIEF), *(("change", one) for one in changes)]
    return build(layers)


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
def test_being_right_is_learned_in_a_few_steps(tmp_path: Path) -> None:
    summary = start(brief(), tmp_path / "run")
    assert summary is not None
    before, after = summary.metrics_before["eval_pass@1"], summary.metrics_after["eval_pass@1"]
    # Both are shares of the same 128 problems; the noise of their difference is about 5 points.
    assert after - before >= 0.2, (before, after)


def test_a_constant_reward_leaves_every_weight_as_it_was(
    tmp_path: Path, config: Callable[..., Config], rewards_file: Path, outcome: Any
) -> None:
    constant = {"rewards": [{"name": f"{rewards_file}:constant"}], "max_steps": 3}
    run = tmp_path / "run"
    start(config(constant), run)
    assert weights(run / "checkpoints/step-000001") == weights(run / "checkpoints/step-000003")
    for line in outcome(run).metrics:
        if line["kind"] == "train":
            assert line["grad_norm"] == 0.0 and line["frac_reward_zero_std"] == 1.0 and line["loss"] == 0.0
    ours = outcome(run).metrics
    assert ours[0]["eval_completions/mean_length"] == ours[-1]["eval_completions/mean_length"]


def test_a_constant_reward_with_a_kl_term_stays_at_the_reference(
    tmp_path: Path, config: Callable[..., Config], rewards_file: Path, outcome: Any
) -> None:
    """KL is at its minimum, 0, where training starts, and so is its gradient where every pass rounds alike."""
    constant = {"rewards": [{"name": f"{rewards_file}:constant"}], "max_steps": 3, "kl": {"beta": 0.1}}
    alike = {"batch": {"shared_prefix": "off", "old_logprobs": "recompute"}}
    start(config(constant, alike), tmp_path / "run")
    lines = [line for line in outcome(tmp_path / "run").metrics if line["kind"] == "train"]
    assert lines[0]["kl"] == 0.0 and lines[0]["grad_norm"] == 0.0
    assert [line["kl"] for line in lines] == [0.0, 0.0, 0.0]
    assert lines[0]["invariant/kl_step0"] == 0.0 and lines[0]["invariant/ratio_dev_step0"] == 0.0


def test_by_default_rounding_is_all_that_moves_it(
    tmp_path: Path, config: Callable[..., Config], rewards_file: Path, outcome: Any
) -> None:
    """Packed rows and the sampler's log-probs round otherwise than the update; Adam makes steps of what is left."""
    constant = {"rewards": [{"name": f"{rewards_file}:constant"}], "max_steps": 1, "kl": {"beta": 0.1}}
    start(config(constant), tmp_path / "run")
    (line,) = [line for line in outcome(tmp_path / "run").metrics if line["kind"] == "train"]
    assert line["invariant/kl_step0"] < 1e-9 and line["invariant/ratio_dev_step0"] < 1e-4
    assert line["kl"] < 1e-3 and line["grad_norm"] < 1e-2


def test_the_saved_model_is_the_embedded_one_when_nothing_was_learned(
    tmp_path: Path, config: Callable[..., Config], rewards_file: Path
) -> None:
    from safetensors.torch import load_file

    start(config({"rewards": [{"name": f"{rewards_file}:constant"}], "max_steps": 1}), tmp_path / "run")
    theirs, ours = (
        load_file(folder / "model.safetensors") for folder in (MODEL_DIR, tmp_path / "run/checkpoints/step-000001")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def wrong_answers() -> Rollouts:
    """One prompt, four wrong answers of 4, 8, 12 and 16 tokens."""
    prompt = Prompt(text="How many?", token_ids=(1,), columns={"question": "How many?", "answer": "#### 7"}, index=0)
    completions = tuple(
        Completion(
            text="so #### 8",
            token_ids=(5,) * length,
            logprobs=(-1.0,) * length,
            temperature=1.0,
            finish_reason="stop",
            policy_version=0,
        )
        for length in (4, 8, 12, 16)
    )
    return Rollouts(prompts=(prompt,), completions=(completions,), max_completion_length=20)


def advantages(gate: dict[str, Any]) -> list[float]:
    config = brief({"rewards": [{"name": "math"}, {"name": "brevity", "weight": 0.1, **gate}]})
    chosen = choose_rewards(config.rewards, load_plugins())
    rewards = [bind_reward(reward, ["question", "answer"]) for reward in chosen]
    scores = score(wrong_answers(), rewards)
    assert scores.raw[0, :, 0].tolist() == [0.0] * 4
    assert scores.raw[0, :, 1].tolist() == pytest.approx([0.8, 0.6, 0.4, 0.2])
    return [round(float(value), 3) for value in group(scores.rewards.double(), scores.weights.double())[0]]


def test_without_its_gate_brevity_pays_for_short_wrong_answers() -> None:
    # Totals 0.08, 0.06, 0.04, 0.02: mean 0.05, sample standard deviation sqrt(0.002 / 3) = 0.02582,
    # plus the 1e-4 that keeps a division by zero away: 0.03 / 0.02592 = 1.157 and 0.01 / 0.02592 = 0.386.
    assert advantages({"gate": None}) == [1.157, 0.386, -0.386, -1.157]


def test_with_its_gate_wrong_answers_are_all_alike() -> None:
    assert advantages({}) == [0.0, 0.0, 0.0, 0.0]
    assert advantages({"gate": "math"}) == [0.0, 0.0, 0.0, 0.0]
