"""Does the default command learn? Held-out accuracy and length before and after, for several seeds, and the control.

    python benchmarks/bench_learning.py [--seeds 0 1 2] [--json FILE]

Each run is the real command line in a process of its own; accuracy is measured by `grpoforge eval` on the embedded
model before and on the run's last checkpoint after, never by the training reward. The control replaces `math` by a
constant reward of the same weight: nothing may be learned from it. Wall time is of the whole `train` process.
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
from pathlib import Path
from typing import Any

CONSTANT = '''"""A reward that says nothing."""


def constant(completions):
    """1.0 for every completion."""
    return [1.0] * len(completions)
'''


def grpoforge(*arguments: str) -> str:
    """Standard output of a grpoforge command."""
    done = subprocess.run(
        [sys.executable, "-m", "grpoforge", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def evaluate(*arguments: str) -> tuple[float, float]:
    """Accuracy in percent and mean completion length in tokens on the held-out problems."""
    metrics = json.loads(grpoforge("eval", *arguments, "--json"))["metrics"]
    return 100 * metrics["eval_pass@1"], metrics["eval_completions/mean_length"]


def train(folder: Path, seed: int, rewards: list[str]) -> dict[str, Any]:
    """One run: its wall time, and accuracy and length after it."""
    flags = [flag for reward in rewards for flag in ("--reward", reward)]
    start = time.perf_counter()
    grpoforge("train", *flags, "--seed", str(seed), "--output", str(folder))
    seconds = time.perf_counter() - start
    accuracy, length = evaluate(str(folder), "--checkpoint", "last")
    return {"seed": seed, "accuracy": round(accuracy, 2), "length": round(length, 2), "seconds": round(seconds, 1)}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    accuracy, length = evaluate("tiny-math")
    print(f"before        accuracy {accuracy:5.1f}%  length {length:5.1f}")
    figures: dict[str, Any] = {"machine": machine(), "before": {"accuracy": accuracy, "length": length}, "runs": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "constant.py").write_text(CONSTANT)
        for seed in arguments.seeds:
            run = train(folder / f"seed-{seed}", seed, ["math", "brevity"])
            figures["runs"].append(run)
            print(
                f"seed {seed}        accuracy {run['accuracy']:5.1f}%  length {run['length']:5.1f}  {run['seconds']} s"
            )
        control = train(folder / "control", arguments.seeds[0], [f"{folder / 'constant.py'}:constant:1.0"])
        figures["control"] = control
        print(f"constant      accuracy {control['accuracy']:5.1f}%  length {control['length']:5.1f}")
    median = statistics.median(run["seconds"] for run in figures["runs"])
    print(f"median wall time {median:.0f} s; load at the start {figures['machine']['load']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
