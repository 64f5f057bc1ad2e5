"""A foreign model (stories260K, a Llama with 512 tokens of vocabulary) on a foreign dataset (GSM8K)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared() -> Path:
    """The folder with the models and the data that no package may carry."""
    folder = Path(os.environ.get("GRPOFORGE_SHARED", ROOT.parent / "shared"))
    assert (folder / "models/stories260K").is_dir(), f"{folder} has no models/stories260K; set GRPOFORGE_SHARED"
    assert (folder / "data/gsm8k/train.jsonl").is_file(), f"{folder} has no data/gsm8k; set GRPOFORGE_SHARED"
    return folder


@pytest.mark.slow
def test_stories_on_gsm8k(tmp_path: Path, program: Any, shared: Path) -> None:
    process = program.popen(
        "train", "--model", str(shared / "models/stories260K"), "--dataset", str(shared / "data/gsm8k/train.jsonl"),
        "--reward", "brevity", "--max-steps", "3", "--output", "run", "--set", "data.num_eval=8",
        "--set", "batch.prompts_per_step=4", "--set", "batch.minibatch_size=16",
        "--set", "batch.micro_batch_size=16",
    )  # fmt: skip
    shown, talk = process.communicate()
    assert process.returncode == 0, talk
    said = shown + talk
    assert "the tokenizer has no chat template: a plain prompt template is used" in said
    assert "left out 3 of 7465 prompts" in said, talk
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]
    assert all(line["invariant/ratio_dev_step0"] < 1e-3 for line in lines if "invariant/ratio_dev_step0" in line)
