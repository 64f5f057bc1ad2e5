"""The described implementation from end to end: real GSM8K and a real small model; the 3B recipe on a small Qwen2.5."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pyarrow import parquet
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from grpoforge_plugins.policies.size import PUBLISHED
from grpoforge_plugins.tiny_math import MODEL_DIR

ROOT = Path(__file__).parents[2]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The form of Qwen2.5's, in our words."""


@pytest.fixture(scope="module")
def shared() -> Path:
    """The folder with the models and the data that no package may carry."""
    folder = Path(os.environ.get("GRPOFORGE_SHARED", ROOT.parent / "shared"))
    assert (folder / "data/gsm8k/train.jsonl").is_file(), f"{folder} has no data/gsm8k; set GRPOFORGE_SHARED"
    return folder


def train_lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def state_of(run: Path) -> tuple[dict[str, Any], bytes]:
    """What the newest checkpoint remembers of the components, and the tensors beside it."""
    newest = max((run / "checkpoints").glob("step-*"))
    state = json.loads((newest / "trainer_state.json").read_text())["components"]
    return state, (newest / "trainer_state.safetensors").read_bytes()


@pytest.mark.slow
def test_the_smallest_size_killed_and_resumed_ends_with_the_same_bits(
    tmp_path: Path,
    shared: Path,
    program: Any,
    outcome: Callable[[Path], Any],
    stop_after: Callable[..., dict[str, Any]],
) -> None:
    arguments = ["train", "gsm8k-smoke", "--model", str(shared / "models/stories260K"), "--set",
                 f"data.options.path={shared / 'data/gsm8k'}"]  # fmt: skip
    whole = program.popen(*arguments, "--output", "whole")
    _, talk = whole.communicate()
    assert whole.returncode == 0, talk
    (killer,) = stop_after(3, "SIGKILL")["plugins"]
    killed = program.popen(*arguments, "--output", "run", "--plugin", killer)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2, 3]
    resumed = program.popen("train", "--resume", "run")
    _, talk = resumed.communicate()
    assert resumed.returncode == 0, talk
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert state_of(tmp_path / "run") == state_of(tmp_path / "whole")
    every_part_had_work(tmp_path / "whole")


def every_part_had_work(run: Path) -> None:
    steps = train_lines(run)
    first, last = steps[0], steps[-1]
    assert {"rewards/math/mean", "rewards/reasoning/mean", "rewards/brevity/mean"} <= set(first)
    assert first["rewards/preference/unscored"] == 1.0 and last["rewards/preference/unscored"] < 1.0
    assert last["pref/buffer"] > 8 and last["pref/loss"] > 0
    assert first["paired/gap_mean"] > 0 and {"reward_T/0.7/mean", "reward_T/1.3/mean"} <= set(first)
    assert first["grad_norm"] > 0 and last["kl"] > 0
    assert first["invariant/ratio_dev_step0"] < 1e-4
    assert (run / "checkpoints/best").is_dir() and list((run / "tensorboard").iterdir())
    assert {"step-000002", "step-000004"} <= {folder.name for folder in (run / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def small_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under every key of Qwen2.5-3B-Instruct's configuration, scaled down, with a chat template."""
    published = yaml.safe_load(PUBLISHED.read_text())["Qwen/Qwen2.5-3B-Instruct"]
    folder = tmp_path_factory.mktemp("small") / "Qwen2.5-small"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEMPLATE
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = Qwen2Config(**published | SMALL | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 2048})
    assert config.tie_word_embeddings
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights, in the place of google-bert/bert-base-uncased."""
    folder = tmp_path_factory.mktemp("bert") / "bert"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_recipe_of_3b_runs_with_nothing_overridden_but_sizes(
    tmp_path: Path, shared: Path, program: Any, small_qwen: Path, small_bert: Path
) -> None:
    process = program.popen(
        "train", "gsm8k-qwen2.5-3b", "--model", str(small_qwen), "--output", "run", "--max-steps", "2", "--set",
        f"data.options.path={shared / 'data/gsm8k'}", "data.options.num_validation=64", "data.num_eval=4",
        f"rewards.preference.model={small_bert}", "rewards.preference.min_pairs=4", "rewards.preference.batch_size=2",
        "sampler.num_sample_pairs=8", "sampler.paired_batch_size=4", "sampler.max_completion_length=16",
        "batch={prompts_per_step: 8, minibatch_size: 8, micro_batch_size: 4}", "eval.batch_size=4",
    )  # fmt: skip
    _, talk = process.communicate()
    assert process.returncode == 0, talk
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert config["model"]["precision"] == "bf16" and config["model"]["gradient_checkpointing"]
    assert config["model"]["lora"]["r"] == 16 and config["kl"]["beta"] == 0.1 and config["batch"]["epochs"] == 3
    steps = train_lines(tmp_path / "run")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["grad_norm"] >= 0 for line in steps)
    assert (tmp_path / "run/checkpoints/step-000002/adapter_model.safetensors").is_file()
    rows = parquet.read_table(tmp_path / "run/rollouts/step-000001.parquet").to_pylist()
    assert rows[0]["prompt"].startswith("<|im_start|>system\nSolve the problem step by step.")
