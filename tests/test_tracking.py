"""The rows that trackers write: one per completion, with the ledger."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from grpoforge.tracking import rollout_rows, sample_question, sample_row
from grpoforge.types import Completion, Prompt, Rollouts, Scores, StepReport

NAN = float("nan")


def completion(text: str, num_tokens: int) -> Completion:
    return Completion(
        text=text,
        token_ids=tuple(range(num_tokens)),
        logprobs=(-0.5,) * num_tokens,
        temperature=0.7,
        finish_reason="stop",
        policy_version=3,
    )


def step_report() -> StepReport:
    """Two prompts, two completions each; brevity is gated to 0 in the first row and abstains in the last."""
    prompts = tuple(
        Prompt(text=text, token_ids=(1,), columns={}, index=index) for index, text in ((7, "2+2?"), (9, "3+3?"))
    )
    texts = (("five", "4\x1b[2J"), ("6", "\ud800"))
    raw = torch.tensor([[[0.0, 0.9], [1.0, 0.5]], [[1.0, 1.0], [0.0, NAN]]])
    rewards = torch.tensor([[[0.0, 0.0], [1.0, 0.5]], [[1.0, 1.0], [0.0, NAN]]])
    shares = torch.tensor([[[-0.5, -0.25], [0.5, 0.25]], [[0.5, 0.125], [-0.5, 0.0]]], dtype=torch.float64)
    return StepReport(
        step=12,
        metrics={"reward": 0.5},
        rollouts=Rollouts(
            prompts=prompts,
            completions=tuple(tuple(completion(text, len(text)) for text in group) for group in texts),
            max_completion_length=8,
        ),
        scores=Scores(
            names=("math", "brevity"),
            rewards=rewards,
            raw=raw,
            weights=torch.tensor([1.0, 0.5]),
            seconds=(0.0, 0.0),
        ),
        advantages=shares.sum(dim=2),
        shares=shares,
    )


def test_a_row_holds_the_completion_and_its_ledger() -> None:
    row = rollout_rows(step_report())[1]
    assert row == {
        "step": 12,
        "prompt_index": 7,
        "origin": "",
        "columns": "{}",
        "prompt": "2+2?",
        "completion": "4\\x1b[2J",
        "completion_ids": [0, 1, 2, 3, 4],
        "finish_reason": "stop",
        "temperature": 0.7,
        "num_tokens": 5,
        "advantage": 0.75,
        "math/raw": 1.0,
        "math/reward": 1.0,
        "math/weighted": 1.0,
        "math/share": 0.5,
        "brevity/raw": 0.5,
        "brevity/reward": 0.5,
        "brevity/weighted": 0.25,
        "brevity/share": 0.25,
    }


def test_rows_are_prompt_major() -> None:
    rows = rollout_rows(step_report())
    assert [(row["prompt_index"], row["completion"]) for row in rows] == [
        (7, "five"),
        (7, "4\\x1b[2J"),
        (9, "6"),
        (9, "\\ud800"),
    ]


def test_a_gate_shows_as_a_raw_value_that_was_not_paid() -> None:
    first = rollout_rows(step_report())[0]
    assert abs(first["brevity/raw"] - 0.9) < 1e-7
    assert first["brevity/reward"] == first["brevity/weighted"] == 0.0


def test_an_abstention_is_nan_everywhere_but_in_the_shares() -> None:
    last = rollout_rows(step_report())[3]
    assert all(math.isnan(last[f"brevity/{part}"]) for part in ("raw", "reward", "weighted"))
    assert last["brevity/share"] == 0.0


def test_shares_sum_to_the_advantage() -> None:
    for row in rollout_rows(step_report()):
        assert row["math/share"] + row["brevity/share"] == row["advantage"]


def test_samples_visit_every_row_in_turn() -> None:
    shown = [sample_row(step_report(), turn)["completion"] for turn in range(4)]
    assert shown == ["five", "\\ud800", "4\\x1b[2J", "6"]


def report_on(text: str, columns: dict[str, Any]) -> StepReport:
    """A report whose first prompt is `text` with `columns`."""
    report = step_report()
    first, second = report.rollouts.prompts
    prompts = (dataclasses.replace(first, text=text, columns=columns), second)
    return dataclasses.replace(report, rollouts=dataclasses.replace(report.rollouts, prompts=prompts))


def test_a_row_holds_the_columns_of_the_dataset_as_json() -> None:
    columns = {"question": "2+2?", "answer": "#### 4", "meta": {"level": 1, "tags": ["a", None]}}
    rows = rollout_rows(report_on("Question: 2+2?\nAnswer:", columns))
    assert [json.loads(row["columns"]) for row in rows] == [columns, columns, {}, {}]


def test_columns_are_ascii_and_come_back_as_they_were() -> None:
    columns = {"answer": "\x1b[2J\x7f\u202e\ud800 問"}
    written = rollout_rows(report_on("2+2?", columns))[0]["columns"]
    assert written == '{"answer": "\\u001b[2J\\u007f\\u202e\\ud800 \\u554f"}'
    assert json.loads(written) == columns


@pytest.mark.parametrize(
    ("columns", "written"),
    [
        ({"image": b"\xff", "shape": {1}}, {"image": "b'\\xff'", "shape": "{1}"}),
        ({"score": NAN, "answer": 4}, {"score": "nan", "answer": "4"}),
        ({"by_pair": {(1, 2): 3}}, {"by_pair": "{(1, 2): 3}"}),
    ],
)
def test_columns_that_json_does_not_know_are_written_as_text(columns: dict[str, Any], written: dict[str, str]) -> None:
    assert json.loads(rollout_rows(report_on("2+2?", columns))[0]["columns"]) == written


def test_the_question_is_shown_without_its_template() -> None:
    prompt = "<|im_start|>user\nWhat is\x1b 2+2?<|im_end|>\n<|im_start|>assistant\n"
    columns = {"id": 7, "answer": "2", "question": " What is\x1b 2+2?\n", "solution": "It is 4, which is not there."}
    assert sample_question(report_on(prompt, columns), 0) == "What is\\x1b 2+2?"
    assert sample_question(report_on(prompt, columns), 1) == "3+3?"
    assert sample_question(report_on("2+2?", {"question": "", "answer": "4"}), 0) == "2+2?"
