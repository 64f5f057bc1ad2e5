"""What trackers are told: the run they belong to, and a step's rollouts as rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpoforge.sanitize import sanitize

if TYPE_CHECKING:
    from grpoforge.types import Prompt, StepReport

__all__ = ["RunInfo", "columns_json", "rollout_rows", "sample_question", "sample_row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What is being trained on what: known before the first step, the same for every tracker."""

    run_dir: Path
    model: str
    num_parameters: int
    dataset: str
    num_train: int | None
    """Rows of the training split; None when they are a stream."""
    num_eval: int
    """Rows of the evaluation split; 0 when there is none."""
    rewards: tuple[str, ...]
    """One line per reward, for people: ``brevity x0.1 (only where math is right)``."""
    device: str
    dtype: str
    prompts_per_step: int
    completions_per_prompt: int
    first_step: int
    """Steps finished before this process started: 0, or the step the run was resumed from."""
    max_steps: int
    notes: tuple[str, ...] = ()
    """What a person should know before it starts: ``no chat template: plain prompt template``."""


def rollout_rows(report: StepReport) -> list[dict[str, Any]]:
    """One flat row per completion, ``B`` of them, prompt-major; see `sample_row` for its keys."""
    return [
        _row(report, prompt, completion)
        for prompt in range(report.rollouts.num_prompts)
        for completion in range(report.rollouts.group_size)
    ]


def sample_row(report: StepReport, turn: int) -> dict[str, Any]:
    """One of the step's rows, chosen by ``turn`` alone: successive turns visit all prompts and all places.

    Keys: ``step``, ``prompt_index``, ``origin`` (where the row stands in its dataset), ``columns`` (that row, as one
    line of JSON), ``prompt`` and ``completion`` (made safe to show), ``completion_ids``, ``finish_reason``,
    ``temperature``, ``num_tokens``, ``advantage``, and for each reward ``{name}/raw`` (as returned),
    ``{name}/reward`` (after its gate), ``{name}/weighted``, ``{name}/share``.
    The shares sum to the advantage; NaN means the reward did not score the row.
    """
    num_prompts = report.rollouts.num_prompts
    # Without the second term a step with as many prompts as completions would only ever show the diagonal.
    completion = (turn + turn // num_prompts) % report.rollouts.group_size
    return _row(report, turn % num_prompts, completion)


def sample_question(report: StepReport, turn: int) -> str:
    """What `sample_row` of the same ``turn`` was asked, without the template around it, made safe to show.

    That is the longest column of the dataset's row that stands in the prompt word for word; the prompt where none does.
    """
    prompt = report.rollouts.prompts[turn % report.rollouts.num_prompts]
    texts = [value.strip() for value in prompt.columns.values() if isinstance(value, str)]
    return sanitize(max((text for text in texts if text in prompt.text), key=len, default="") or prompt.text)


def _row(report: StepReport, prompt: int, completion: int) -> dict[str, Any]:
    asked = report.rollouts.prompts[prompt]
    answered = report.rollouts.completions[prompt][completion]
    return {
        "step": report.step,
        "prompt_index": asked.index,
        "origin": sanitize(asked.origin),
        "columns": columns_json(asked),
        "prompt": sanitize(asked.text),
        "completion": sanitize(answered.text),
        "completion_ids": list(answered.token_ids),
        "finish_reason": answered.finish_reason,
        "temperature": answered.temperature,
        "num_tokens": len(answered.token_ids),
        "advantage": report.advantages[prompt, completion].item(),
        **_ledger(report, prompt, completion),
    }


def columns_json(prompt: Prompt) -> str:
    """The dataset's row as JSON, in ASCII: what would act on a terminal is escaped and comes back when it is read."""
    try:
        text = json.dumps(dict(prompt.columns), default=str, allow_nan=False)
    except (TypeError, ValueError):  # a NaN, a key that is no string
        text = json.dumps({name: str(value) for name, value in prompt.columns.items()})
    return text.replace("\x7f", "\\u007f")


def _ledger(report: StepReport, prompt: int, completion: int) -> Mapping[str, float]:
    scores = report.scores
    row = (prompt, completion)
    raw, rewards = scores.raw[row].tolist(), scores.rewards[row].tolist()
    weighted = (scores.rewards[row] * scores.weights).tolist()
    shares = report.shares[row].tolist()
    ledger: dict[str, float] = {}
    for k, name in enumerate(scores.names):
        ledger[f"{name}/raw"] = raw[k]
        ledger[f"{name}/reward"] = rewards[k]
        ledger[f"{name}/weighted"] = weighted[k]
        ledger[f"{name}/share"] = shares[k]
    return ledger
