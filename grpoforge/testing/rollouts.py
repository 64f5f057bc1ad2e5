"""Completions to ask rewards and trackers about: plain ones, and text that was written to hurt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grpoforge.types import Completion, Prompt, Rollouts, Scores, StepReport

Columns = dict[str, Any]

HOSTILE = {
    "emoji and combining marks": "👩‍👩‍👧‍👦 e\u0301 \u0928\u093f 한국어 عربى",
    "digits of other scripts": "٤٢ ४२ 四十二 ² ½ ⅷ ４２",
    "control characters": "\x00\x07\x1b[2J\x1b]0;title\x07\r\b\x7f",
    "reversed and hidden text": "\u202e24\u202c \u200b\ufeff\u2066x\u2069",
    "markup": "[red]x[/red] <script>alert(1)</script> {{x}} %s {0} \\N{BELL}",
    "code": "__import__('os').system('true') #### 1/0",
    "a power tower": "#### 9**9**9**9 \\boxed{9^{9^{9^9}}}",
    "a huge number": "#### " + "9" * 5000,
    "a huge exponent": "#### 1e999999999 -inf nan",
    "deep nesting": "\\boxed{" * 2000 + "(" * 2000 + "1",
    "a long line": "a " * 50_000,
    "many answers": "#### 42\n" * 5_000,
    "runs of spaces": " " * 20_000 + "42",
    "only separators": "####" * 2_000 + "\n" * 2_000,
}
"""By what it is. All of it encodes to UTF-8, as the decoded text of a tokenizer does."""

UNREADABLE = ("there is no answer to this", "?")
"""References that are no number, no code, no choice: all that a dataset's row may hold where it should hold one."""

MAX_TOKENS = 32
"""Of a completion."""

ANSWERS = {"0": "42", "1": "7", "2": "1/2"}


def replies(prompt: str) -> list[Completion]:
    """Four completions to a prompt: right and polite, wrong, right and long, cut off."""
    answer = ANSWERS[prompt]
    return [
        reply(f"Please note: 6 * 7 = {answer}.\n#### {answer}"),
        reply("I think that it is 13.\n#### 13"),
        reply(f"<think>\nFirst 1 + 1 = 2, then more.\n</think>\nThe answer is \\boxed{{{answer}}}. Thank you."),
        reply("Let me count: 1, 2, 3, 4, 5, 6, 7", num_tokens=MAX_TOKENS, cut=True),
    ]


def reply(text: str, *, num_tokens: int | None = None, cut: bool = False) -> Completion:
    """A completion with this text: a token for each word and an EOS, up to the limit, if ``num_tokens`` is left out."""
    count = min(len(text.split()) + 1, MAX_TOKENS) if num_tokens is None else num_tokens
    return Completion(
        text=text,
        token_ids=tuple(range(3, 3 + count)),
        logprobs=(-0.5,) * count,
        temperature=1.0,
        finish_reason="length" if cut else "stop",
        policy_version=0,
    )


def row_columns(prompt: str, names: Sequence[str] = ()) -> Columns:
    """A dataset's row: a question, its answer worked out, and under every name of ``names`` the answer."""
    answer = ANSWERS[prompt]
    known = {"question": f"How much is it in case {prompt}?", "answer": f"Work it out.\n#### {answer}"}
    return {name: known.get(name, answer) for name in dict.fromkeys([*known, *names])}


def make_rollouts(completions: Sequence[Sequence[Completion]], rows: Sequence[Columns]) -> Rollouts:
    """Rollouts of these completions, one group for each row of the dataset."""
    prompts = tuple(
        Prompt(text=str(row.get("question", "?")), token_ids=(1, 2), columns=row, index=index, origin=f"kit:{index}")
        for index, row in enumerate(rows)
    )
    return Rollouts(prompts=prompts, completions=tuple(map(tuple, completions)), max_completion_length=MAX_TOKENS)


def make_report(step: int, texts: Sequence[str] = (), metrics: Mapping[str, float] | None = None) -> StepReport:
    """A report of a step of three prompts and four completions, two rewards, one of which abstained once."""
    groups = [replies(str(prompt)) for prompt in range(3)]
    for number, text in enumerate(texts):
        groups[number % 3][number // 3 % 4] = reply(text)
    rollouts = make_rollouts(groups, [row_columns(str(prompt)) for prompt in range(3)])
    rewards = torch.tensor([[1.0, 0.1], [0.0, 0.2], [1.0, 0.3], [0.0, torch.nan]], dtype=torch.float64).repeat(3, 1, 1)
    scores = Scores(
        names=("math", "brevity"),
        rewards=rewards,
        raw=rewards,
        weights=torch.tensor([1.0, 0.5], dtype=torch.float64),
        seconds=(0.001, 0.002),
    )
    advantages = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64).repeat(3, 1)
    shares = torch.stack([advantages, torch.zeros_like(advantages)], dim=2)
    return StepReport(
        step=step,
        metrics={**METRICS, **(metrics or {})},
        rollouts=rollouts,
        scores=scores,
        advantages=advantages,
        shares=shares,
    )


METRICS = {
    "loss": -0.01,
    "reward": 0.55,
    "reward_std": 0.4,
    "rewards/math/mean": 0.5,
    "rewards/brevity/mean": 0.2,
    "frac_reward_zero_std": 0.0,
    "completions/mean_length": 9.5,
    "completions/min_length": 8.0,
    "completions/max_length": 16.0,
    "completions/clipped_ratio": 0.25,
    "entropy": 1.2,
    "kl": 0.001,
    "grad_norm": 0.7,
    "learning_rate": 1e-4,
    "clip_ratio/region_mean": 0.02,
    "num_tokens": 114.0,
    "step_time": 0.5,
    "time/rollout": 0.3,
    "time/reward": 0.01,
    "time/update": 0.2,
}
