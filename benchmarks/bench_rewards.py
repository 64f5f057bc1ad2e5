"""What the rewards that read arithmetic say of GSM8K's own solutions, and what a row costs.

    python benchmarks/bench_rewards.py FOLDER [--json FILE]

FOLDER holds GSM8K's train.jsonl and test.jsonl. For `math` by every verifier: solutions scored right, and right with
another number. For `reasoning`: the distribution over the solutions, over those of another problem, and over solutions
with one result changed. Times are the median and the slowest of single rows; a symbolic row that is stopped is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grpoforge_plugins.rewards.math import Math
from grpoforge_plugins.rewards.reasoning import reasoning


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (arguments.folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    prompts, solutions = [row["question"] for row in rows], [row["answer"] for row in rows]
    figures: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rows": len(rows),
        "math": {verifier: math_figures(verifier, solutions) for verifier in ("exact", "auto", "symbolic")},
        "reasoning": reasoning_figures(prompts, solutions),
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def math_figures(verifier: Any, solutions: Sequence[str]) -> dict[str, Any]:
    """How many solutions are right as they are, and with another number; and the time of a row."""
    reward = Math(verifier=verifier)
    parts = [solution.rpartition("#### ") for solution in solutions]
    changed = [f"{work}#### {int(number.replace(',', '')) + 1:,}" for work, _, number in parts]
    right, seconds = timed(lambda row: reward([solutions[row]], [solutions[row]])[0], len(solutions))
    wrong, _ = timed(lambda row: reward([changed[row]], [solutions[row]])[0], len(solutions))
    return {
        "right": right.count(1.0),
        "right_with_another_number": wrong.count(1.0),
        "stopped": reward.stopped,
    } | seconds


def reasoning_figures(prompts: Sequence[str], solutions: Sequence[str]) -> dict[str, Any]:
    """The distribution over whole solutions, and the means over damaged ones."""
    rng = random.Random(0)
    own, seconds = timed(lambda row: reasoning([prompts[row]], [solutions[row]])[0], len(prompts))
    values = [value for value in own if value is not None]
    others = reasoning(prompts, [*solutions[1:], solutions[0]])
    damaged = reasoning(prompts, [changed_result(solution, rng) for solution in solutions])
    return {
        "scored": len(values),
        "mean": mean(values),
        **{f"share_at_least_{bound}": mean([float(value >= bound) for value in values]) for bound in (0.5, 0.8, 0.95)},
        "mean_of_another_problem": mean(others),
        "mean_with_one_result_changed": mean(damaged),
    } | seconds


def changed_result(solution: str, rng: random.Random) -> str:
    """A solution with another result in one of its annotations and behind it."""
    places = [place for place in range(len(solution)) if solution.startswith(">>", place)]
    if not places:
        return solution
    place = rng.choice(places)
    before, after = solution[:place], solution[place + 2 :]
    digits = len(after) - len(after.lstrip("0123456789."))
    return f"{before.rpartition('=')[0]}=7919>>7919{after[digits:]}"


def timed(score: Callable[[int], float | None], num_rows: int) -> tuple[list[float | None], dict[str, float]]:
    """The scores of all rows, and the milliseconds of one: median and slowest."""
    scores, times = [], []
    for row in range(num_rows):
        started = time.perf_counter()
        scores.append(score(row))
        times.append(1000 * (time.perf_counter() - started))
    return scores, {"median_ms": round(statistics.median(times), 3), "slowest_ms": round(max(times[1:]), 3)}


def mean(values: Sequence[float | None]) -> float:
    """The mean of what was scored."""
    scored = [value for value in values if value is not None]
    return round(sum(scored) / len(scored), 3)


if __name__ == "__main__":
    main()
