"""The recipe `gsm8k-qwen2.5-3b` against the values of the described implementation, key by key; its smaller sizes."""

from __future__ import annotations

from typing import Any

import pytest

from grpoforge.assembly import num_steps
from grpoforge.cli.settings import base_layers
from grpoforge.config import Config
from grpoforge.layers import build
from grpoforge.memory import estimate
from grpoforge.parts import choose, choose_rewards
from grpoforge.plugins import load_plugins
from grpoforge_plugins.policies.size import policy_size

DESCRIBED: dict[str, Any] = {
    "model.name": "Qwen/Qwen2.5-3B-Instruct",
    "data.dataset": "gsm8k",
    "epochs": 5,
    "max_steps": 20_000,
    "batch.minibatch_size": 8,
    "batch.epochs": 3,
    "optim.learning_rate": 1e-5,
    "optim.schedule": "cosine",
    "optim.max_grad_norm": 1.0,
    "kl.beta": 0.1,
    "kl.placement": "loss",
    "sampler.name": "paired",
    "sampler.temperatures": [0.7, 1.3],
    "sampler.num_sample_pairs": 64,
    "sampler.paired_batch_size": 16,
    "advantage.name": "paired",
    "advantage.preference_threshold": 0.1,
    "eval.every": 200,
    "eval.metric": "eval_pass@1",
    "eval.direction": "max",
    "checkpoint.every": 500,
    "model.precision": "bf16",
    "model.gradient_checkpointing": True,
}


def recipe(name: str, *more: dict[str, Any]) -> Config:
    return build([*base_layers([name]), *(("test", values) for values in more)])


def value_at(config: Config, key: str) -> Any:
    """The value at a dotted key; options of parts are keys too."""
    found: Any = config
    for name in key.split("."):
        options = getattr(found, "model_extra", None) or {}
        found = options[name] if name in options else getattr(found, name)
    return found


@pytest.mark.parametrize(("key", "value"), DESCRIBED.items())
def test_a_value_of_the_described_implementation(key: str, value: object) -> None:
    assert value_at(recipe("gsm8k-qwen2.5-3b"), key) == value


def test_a_batch_has_128_completions() -> None:
    batch = recipe("gsm8k-qwen2.5-3b").batch
    assert batch.prompts_per_step * batch.completions_per_prompt == 128


def test_rewards_are_weighted_as_described_and_these_are_their_default_weights() -> None:
    config, host = recipe("gsm8k-qwen2.5-3b"), load_plugins()
    expected = {"math": 1.0, "reasoning": 0.5, "brevity": 0.1}
    weights = {reward.name: reward.weight for reward in choose_rewards(config.rewards, host)}
    assert expected.items() <= weights.items()
    assert {name: host.registry.get("reward", name).weight for name in expected} == expected


def test_a_bert_learns_from_the_pairs_of_the_run() -> None:
    (preference,) = [reward for reward in recipe("gsm8k-qwen2.5-3b").rewards if reward.name == "preference"]
    assert preference.options["model"] == "google-bert/bert-base-uncased"
    assert preference.options["preference_threshold"] == 0.1


def test_adapters_are_trained_and_everything_is_recorded() -> None:
    config = recipe("gsm8k-qwen2.5-3b")
    assert config.model.lora is not None
    assert {"jsonl", "tensorboard", "rollouts"} <= {tracker.name for tracker in config.trackers}


def test_epochs_and_steps_both_bound_the_run() -> None:
    config = recipe("gsm8k-qwen2.5-3b")
    assert num_steps(config, 6961) == 5 * 6961 // 64
    assert num_steps(config, 10**9) == 20_000
    assert num_steps(config, None) == 20_000
    assert num_steps(recipe("tiny-math"), 24) == 24, "no number of epochs is given there"


def test_it_fits_16_gb() -> None:
    config = recipe("gsm8k-qwen2.5-3b")
    size = policy_size(config.model)
    assert size is not None
    sampler = choose("sampler", config.sampler, load_plugins()).build()
    found = estimate(config, size, sampler.max_completion_length, sampler.rows_at_a_time)
    assert sampler.rows_at_a_time == 32
    # bert-base and its optimizer: 110 million parameters, 16 bytes each, and 1 GB for what it reads.
    assert found.total + 110e6 * 16 + 1e9 < 16e9


@pytest.mark.parametrize("size", ["gsm8k-qwen2.5-0.5b", "gsm8k-smoke"])
def test_a_smaller_size_differs_in_sizes_only(size: str) -> None:
    large, small = recipe("gsm8k-qwen2.5-3b"), recipe(size)
    for part in ("sampler", "advantage", "loss", "kl"):
        assert getattr(small, part).name == getattr(large, part).name
    weights = [(reward.name, reward.weight) for reward in large.rewards]
    assert [(reward.name, reward.weight) for reward in small.rewards][: len(weights)] == weights
    for key in ("kl.beta", "optim", "batch.epochs", "batch.minibatch_size", "reduction", "eval.metric", "trackers"):
        assert value_at(small, key) == value_at(large, key), key
