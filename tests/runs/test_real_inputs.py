"""A foreign model (stories260K, a Llama with 512 tokens of vocabulary) on a foreign dataset (GSM8K)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

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


@pytest.mark.slow
def test_gsm8k_trains_on_its_training_rows_and_leaves_the_test_rows_to_eval(
    tmp_path: Path, program: Any, shared: Path
) -> None:
    process = program.popen(
        "train", "--model", str(shared / "models/stories260K"), "--dataset", "gsm8k", "--reward", "math",
        "--reward", "brevity", "--max-steps", "1", "--output", "run", "--set",
        f"data.options.path={shared / 'data/gsm8k'}", "data.num_eval=8", "data.instruction='End with ####.'",
        "batch={prompts_per_step: 4, completions_per_prompt: 2, minibatch_size: 8}",
    )  # fmt: skip
    shown, talk = process.communicate()
    assert process.returncode == 0, talk
    left_out = re.search(r"left out (\d+) of 6961 prompts", talk)
    assert left_out, talk
    assert f"{6961 - int(left_out[1]):,} prompts to train on, 8 to evaluate" in shown + talk
    rows = parquet.read_table(tmp_path / "run/rollouts/step-000001.parquet").to_pylist()
    assert len(rows) == 8
    for row in rows:
        columns = json.loads(row["columns"])
        assert row["origin"].startswith("train.jsonl:")
        assert columns["solution"].endswith(f"#### {int(columns['answer']):,}") or columns["solution"].endswith(
            f"#### {columns['answer']}"
        )
        assert f"{columns['question']}\nEnd with ####." in row["prompt"]
    evaluated = program.popen("eval", "run", "--num-problems", "5", "--json")
    measured, talk = evaluated.communicate()
    assert evaluated.returncode == 0, talk
    found = json.loads(measured)
    assert (found["dataset"], found["num_problems"]) == ("gsm8k", 5)
