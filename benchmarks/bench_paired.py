"""Does paired sampling learn as much from as many completions as plain GRPO? Held-out accuracy of both, seed by seed.

    python benchmarks/bench_paired.py [--seeds 0 1 2] [--reward math:1.0]... [--plugin FILE]... [--set KEY=VALUE]...
                                      [--json FILE]

Both train the embedded model by the real command line, a process each: `grpoforge train tiny-math` as it is, and
`grpoforge train tiny-math paired` for as many steps as use the same number of completions. Accuracy and mean length are
measured by `grpoforge eval` on the last checkpoint, on 512 problems that are never trained on. `--set` changes the
paired runs only. Wall time is of the whole `train` process. Runs that are in the file already are not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpoforge.cli.settings import base_layers
from grpoforge.layers import build

TODAY = datetime.date.today().isoformat()
RESULTS = Path(__file__).parent / "results" / f"paired-{TODAY}.json"
RECIPES = {"grpo": ["tiny-math"], "paired": ["tiny-math", "paired"]}
REWARDS = ["math:1.0", "brevity:0.1"]


def grpoforge(*arguments: str) -> str:
    """Standard output of a grpoforge command on one thread."""
    command = [sys.executable, "-m", "grpoforge", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout


def evaluate(*arguments: str) -> dict[str, float]:
    """Accuracy in percent and mean completion length in tokens on the held-out problems."""
    metrics = json.loads(grpoforge("eval", *arguments, "--json"))["metrics"]
    length = metrics["eval_completions/mean_length"]
    return {"accuracy": round(100 * metrics["eval_pass@1"], 2), "length": round(length, 2)}


def steps_of(names: Sequence[str]) -> tuple[int, int]:
    """Steps of the recipes that are stacked, and completions of a step."""
    config = build(base_layers(names))
    assert config.max_steps is not None
    return config.max_steps, config.batch.prompts_per_step * config.batch.completions_per_prompt


def train(names: Sequence[str], steps: int, seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """One run: its wall time, and accuracy and length after it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        start = time.perf_counter()
        chosen = ["--max-steps", str(steps), "--seed", str(seed), "--output", str(folder), *flags]
        grpoforge("train", *names, *chosen, "--set", "eval.every=0", "--set", "checkpoint.every=0")
        seconds = time.perf_counter() - start
        return {"seconds": round(seconds, 1), **evaluate(str(folder), "--checkpoint", "last")}


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


def flags_of(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The flags of the runs of each kind."""
    common = [flag for reward in arguments.reward or REWARDS for flag in ("--reward", reward)]
    common += [flag for file in arguments.plugin for flag in ("--plugin", file)]
    return {"grpo": common, "paired": common + [flag for change in arguments.set for flag in ("--set", change)]}


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every run that is not in the file yet, which is written after each."""
    flags = flags_of(arguments)
    wanted: dict[str, Any] = {"flags": flags, "runs": {}}
    known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    if known.get("flags") != flags:
        known = wanted | {"before": evaluate("tiny-math")}
    known["machine"] = machine()
    known["completions"] = completions = _completions()
    for seed in arguments.seeds:
        for kind, names in RECIPES.items():
            key = f"{kind}-{seed}"
            if key not in known["runs"]:
                known["runs"][key] = train(names, completions // steps_of(names)[1], seed, flags[kind])
                known["runs"][key]["load"] = [round(load, 2) for load in os.getloadavg()]
                arguments.json.write_text(json.dumps(known, indent=2) + "\n")
            run = known["runs"][key]
            print(f"{key:9}  accuracy {run['accuracy']:5.1f}%  length {run['length']:5.1f}  {run['seconds']:5.1f} s")
    return known


def _completions() -> int:
    """Completions of a plain run, which the paired run divides into steps of its own."""
    steps, completions = steps_of(RECIPES["grpo"])
    per_step = steps_of(RECIPES["paired"])[1]
    assert steps * completions % per_step == 0, f"{steps} x {completions} completions in steps of {per_step}"
    return steps * completions


def table(known: dict[str, Any]) -> str:
    """The runs as rows of a Markdown table: accuracy of each seed, the mean, and the mean length."""
    lines = []
    for kind in RECIPES:
        runs = [run for key, run in sorted(known["runs"].items()) if key.startswith(f"{kind}-")]
        accuracy, length = ([run[name] for run in runs] for name in ("accuracy", "length"))
        each = " | ".join(f"{value:.1f}%" for value in accuracy)
        changes = " ".join(known["flags"][kind][4:])
        label = f"{kind} `{changes}`" if changes else kind
        lines.append(f"| {label} | {each} | {statistics.mean(accuracy):.1f}% | {statistics.mean(length):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--reward", action="append", help=f"a reward and its weight; by default {' '.join(REWARDS)}")
    parser.add_argument("--plugin", action="append", default=[], help="a local plugin file, for its rewards")
    parser.add_argument("--set", action="append", default=[], help="change a key of the paired runs")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures are kept")
    arguments = parser.parse_args()
    known = run_all(arguments)
    print(table(known))
    behind = {
        seed: known["runs"][f"grpo-{seed}"]["accuracy"] - known["runs"][f"paired-{seed}"]["accuracy"]
        for seed in arguments.seeds
    }
    print("points behind plain GRPO: " + ", ".join(f"seed {seed} {gap:+.1f}" for seed, gap in behind.items()))


if __name__ == "__main__":
    main()
