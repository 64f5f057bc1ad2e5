"""Does every algorithm recipe learn? Held-out accuracy and length before and after 30 steps of tiny-math, one by one.

    python benchmarks/bench_recipes.py [--only NAME]... [--jobs 1|2] [--steps 30] [--seed 0] [--json FILE]
                                       [--page docs/guides/algorithms.md]

Each run is the real command line in a process of its own, with one thread. Accuracy is the run's own greedy evaluation
on 512 problems that are never trained on. A recipe that is in the file already, with the same text and the same
settings, is not run again: an interrupted benchmark goes on where it was. Wall time is of the whole `train` process.
`--page` puts the table in the place of the one that a document has.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpoforge.yaml_source import read_recipe, recipe_names, recipe_text

TODAY = datetime.date.today().isoformat()
RESULTS = Path(__file__).parent / "results" / f"recipes-{TODAY}.json"
HEADER = "| recipe | accuracy before | after | length before | after | KL | wall time |"


def algorithms() -> list[str]:
    """Recipes that build on a task; those that change how it samples have benchmarks of their own."""
    recipes = {name: read_recipe(name) for name in recipe_names()}
    return [name for name, values in recipes.items() if "recipe" in values and "sampler" not in values]


def train(name: str, steps: int, seed: int) -> dict[str, Any]:
    """One run: its wall time, and what it measured before and after.

    Raises:
        subprocess.CalledProcessError: the command failed; its output is in the error.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        flags = ["--max-steps", str(steps), "--seed", str(seed), "--output", str(folder)]
        flags += ["--set", "eval.every=0", "--set", "checkpoint.every=0"]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "grpoforge", "train", "tiny-math", name, *flags],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return figures([line for line in lines if line["kind"] == "eval"], lines, seconds)


def figures(
    evaluations: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    """What the table shows of a run, from the lines of its ``metrics.jsonl``."""
    before, after = evaluations[0], evaluations[-1]
    divergences = [line["kl"] for line in lines if "kl" in line]
    return {
        "accuracy_before": round(100 * before["eval_pass@1"], 2),
        "accuracy_after": round(100 * after["eval_pass@1"], 2),
        "length_before": round(before["eval_completions/mean_length"], 2),
        "length_after": round(after["eval_completions/mean_length"], 2),
        "kl": round(divergences[-1], 5) if divergences else None,
        "seconds": round(seconds, 1),
    }


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The runs as Markdown, sorted by name; KL is that of the last step, where the recipe measures it."""
    lines = [HEADER, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, run in sorted(runs.items()):
        kl = "" if run["kl"] is None else f"{run['kl']:.4f}"
        lines.append(
            f"| `{name}` | {run['accuracy_before']:.1f}% | {run['accuracy_after']:.1f}% "
            f"| {run['length_before']:.1f} | {run['length_after']:.1f} | {kl} | {run['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def put_into(page: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the table of ``page`` that has our header."""
    text = page.read_text(encoding="utf-8")
    before, header, rest = text.partition(HEADER)
    after = rest.partition("\n\n")[2]
    if not header:
        sys.exit(f"{page} has no table that begins with {HEADER}")
    page.write_text(f"{before}{table(runs)}\n\n{after}", encoding="utf-8")


def settings(name: str, steps: int, seed: int) -> dict[str, Any]:
    """What a run is known by: the same settings need no second run."""
    text = recipe_text("tiny-math") + recipe_text(name)
    return {"steps": steps, "seed": seed, "recipe_sha256": hashlib.sha256(text.encode()).hexdigest()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "date": TODAY,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def run_all(names: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Every recipe of ``names`` that is not in the file yet, which is written after each."""
    known: dict[str, Any] = {"runs": {}}
    if arguments.json.exists():
        known = json.loads(arguments.json.read_text())
    known["machine"] = machine()
    writing = threading.Lock()

    def one(name: str) -> None:
        wanted = settings(name, arguments.steps, arguments.seed)
        if known["runs"].get(name, {}).get("settings") == wanted:
            return
        try:
            run = train(name, arguments.steps, arguments.seed)
        except subprocess.CalledProcessError as failure:
            print(f"{name}: failed\n{failure.stderr[-2000:]}", file=sys.stderr)
            return
        load = [round(value, 2) for value in os.getloadavg()]
        with writing:
            known["runs"][name] = {**run, "load": load, "settings": wanted}
            arguments.json.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        print(f"{name}: {run['accuracy_before']}% to {run['accuracy_after']}%, {run['seconds']} s", file=sys.stderr)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, names))
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--only", action="append", choices=algorithms(), help="this recipe; repeatable")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures are kept")
    parser.add_argument("--page", type=Path, help="a document whose table to replace")
    arguments = parser.parse_args()
    names = arguments.only or algorithms()
    runs = run_all(names, arguments)["runs"]
    print(table(runs))
    if arguments.page:
        put_into(arguments.page, runs)
    missing = [name for name in names if name not in runs]
    worse = [name for name in names if name in runs and runs[name]["accuracy_after"] <= runs[name]["accuracy_before"]]
    for what, listed in (("failed", missing), ("no better than before", worse)):
        if listed:
            sys.exit(f"{what}: {', '.join(listed)}")


if __name__ == "__main__":
    main()
