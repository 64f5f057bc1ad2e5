from __future__ import annotations

import json
import os
import runpy
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from grpoforge_plugins.rewards.format import format_reward

CHECKOUT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("GRPOFORGE_SHARED", CHECKOUT.parent / "shared"))
HOSTILE: tuple[Any, ...] = runpy.run_path(str(CHECKOUT / "tests/hostile_completions.py"))["HOSTILE"]

Style = Literal["gsm8k", "boxed", "think"]

CASES: list[tuple[Style, str, float]] = [
    ("gsm8k", "9 * 2 = 18\n#### 18", 1.0),
    ("gsm8k", "9 * 2 = 18\n\n#### $1,018 dollars\n \n", 1.0),
    ("gsm8k", "#### 18", 0.0),
    ("gsm8k", "\n\n#### 18", 0.0),
    ("gsm8k", "...\n#### 18", 0.0),
    ("gsm8k", "18\n#### 18", 0.0),
    ("gsm8k", "9 * 2 = 18 #### 18", 0.0),
    ("gsm8k", "9 * 2 = 18\n#### 18\nThat was easy.", 0.0),
    ("gsm8k", "9 * 2 = 18\n#### 18\n#### 18", 0.0),
    ("gsm8k", "#### Step 1\n9 * 2 = 18\n#### 18", 0.0),
    ("gsm8k", "9 * 2 = 18\n##### 18", 0.0),
    ("gsm8k", "9 * 2 = 18\n#### eighteen", 0.0),
    ("gsm8k", "9 * 2 = 18\n#### 18 or 19", 0.0),
    ("gsm8k", "9 * 2 = 18\nThe answer is 18.", 0.0),
    ("gsm8k", "#### Step 1: 9 * 2, the answer is 18", 0.0),
    ("gsm8k", "<think>9 * 2 = 18\n#### 18", 0.0),
    ("gsm8k", "", 0.0),
    ("boxed", "9 * 2 = 18, so\nthe answer is $\\boxed{18}$.", 1.0),
    ("boxed", "9 * 2 = \\boxed{18}", 1.0),
    ("boxed", "\\boxed{18}", 0.0),
    ("boxed", "9 * 2 = 18\n\\boxed{18} \\boxed{18}", 0.0),
    ("boxed", "9 * 2 = 18\n\\boxed{18}\nThat was easy.", 0.0),
    ("boxed", "9 * 2 = 18\n\\boxed{}", 0.0),
    ("boxed", "9 * 2 = 18\n\\boxed{18", 0.0),
    ("boxed", "9 * 2 = 18\n\\boxed{eighteen} The answer is 18.", 0.0),
    ("boxed", "9 * 2 = 18\n#### 18", 0.0),
    ("boxed", "<think>9 * 2 = \\boxed{18}", 0.0),
    ("think", "<think>9 * 2 = 18</think>\n#### 18", 1.0),
    ("think", "9 * 2 = 18</think>\nThe answer is 18.", 1.0),
    ("think", "<think></think>\n#### 18", 0.0),
    ("think", "<think>\n</think>\n#### 18", 0.0),
    ("think", "<think>9 * 2 = 18, #### 18</think>", 0.0),
    ("think", "<think>9 * 2 = 18, #### 18", 0.0),
    ("think", "So <think>9 * 2 = 18</think>\n#### 18", 0.0),
    ("think", "<think>9 * 2</think><think>= 18</think>#### 18", 0.0),
    ("think", "9 * 2 = 18\n#### 18", 0.0),
]


@pytest.mark.parametrize(("style", "completion", "reward"), CASES)
def test_form(style: Style, completion: str, reward: float) -> None:
    assert format_reward([completion], style=style) == [reward]


def test_gsm8k_is_the_default_and_each_row_is_judged_alone() -> None:
    assert format_reward(["9 * 2 = 18\n#### 18", "#### 18"]) == [1.0, 0.0]


@pytest.mark.parametrize(("split", "num_rows"), [("train", 7473), ("test", 1319)])
def test_every_gsm8k_solution_has_the_form(split: str, num_rows: int) -> None:
    lines = (SHARED / "data/gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert format_reward([json.loads(line)["answer"] for line in lines]) == [1.0] * num_rows


@pytest.mark.parametrize("style", ["gsm8k", "boxed", "think"])
def test_hostile_completions_take_no_time(style: Style) -> None:
    for hostile in HOSTILE:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            format_reward([hostile.text], style=style)
            times.append(time.perf_counter() - start)
        assert min(times) <= 0.05, hostile.name
