"""Seconds and peak memory of a training step with the fused kernels and with plain torch, the same step otherwise.

    python benchmarks/bench_steps.py [--rounds 5] [--case tiny-math|vocabulary]

Two cases: the default recipe `tiny-math`, and a model of two layers with random weights whose vocabulary is that of
Qwen2.5 (151,936 tokens, hidden size 896, tied). Every figure comes from a process of its own; the two variants take
turns, and medians over the rounds are reported. Writes benchmarks/results/steps-DATE.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
VARIANTS = {"kernels": "", "plain torch": "reference"}
SKIPPED = 1
"""Steps before those that count: the first one warms up."""

VOCABULARY: dict[str, Any] = {
    "batch": {"prompts_per_step": 2, "completions_per_prompt": 8, "minibatch_size": 16, "micro_batch_size": 8},
    "sampler": {"max_completion_length": 64},
    "max_steps": 4,
    "data": {"num_eval": 2},
}
TINY_MATH: dict[str, Any] = {"max_steps": 6, "data": {"num_eval": 2}}


def make_model(folder: Path) -> None:
    """A Qwen2 of two layers with the vocabulary of Qwen2.5, random weights, and the tokenizer of `tiny-math`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from grpoforge.config import ModelConfig
    from grpoforge.plugins import load_plugins

    torch.manual_seed(0)
    tokenizer = load_plugins([]).hook.load_policy(model=ModelConfig()).tokenizer
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def one_run(case: str, model: str, output: str) -> None:
    """Train a few steps in this process and print what they took."""
    from grpoforge.launch import start
    from grpoforge.layers import build
    from grpoforge.yaml_source import recipe_layers

    changes = TINY_MATH if case == "tiny-math" else VOCABULARY | {"model": {"name": model}}
    quiet = {"trackers": [{"name": "jsonl"}], "checkpoint": {"every": 0}, "eval": {"every": 0, "batch_size": 2}}
    start(build([*recipe_layers("tiny-math"), ("bench_steps", changes), ("quiet", quiet)]), Path(output))
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "train"][SKIPPED:]
    print(
        json.dumps(
            {
                "log_probs_and_update_s": statistics.median(s["time/logprobs"] + s["time/update"] for s in steps),
                "step_s": statistics.median(s["step_time"] for s in steps),
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                "loss": steps[-1]["loss"],
            }
        )
    )


def measure(case: str, variant: str, model: str) -> dict[str, float]:
    """`one_run` in a process of its own."""
    environment = os.environ | ({"GRPOFORGE_KERNELS": VARIANTS[variant]} if VARIANTS[variant] else {})
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", case, "--model", model, "--output", f"{folder}/run"]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(case: str, rounds: int, model: str) -> dict[str, dict[str, float]]:
    """Medians of each variant over ``rounds``, the variants taking turns."""
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            found[variant].append(measure(case, variant, model))
    return {
        variant: {name: statistics.median(one[name] for one in runs) for name in runs[0]}
        for variant, runs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=["tiny-math", "vocabulary"], action="append")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        one_run(asked.run, asked.model, asked.output)
        return
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    results: dict[str, Any] = {"date": date, "machine": platform.platform(), "cores": os.cpu_count(), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for case in asked.case or ["tiny-math", "vocabulary"]:
            results["cases"][case] = compare(case, asked.rounds, folder)
            show(case, results["cases"][case])
    path = ROOT / f"benchmarks/results/steps-{date}.json"
    if path.is_file():  # of another case, measured on the same day
        results["cases"] = json.loads(path.read_text(encoding="utf-8"))["cases"] | results["cases"]
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def show(case: str, found: dict[str, dict[str, float]]) -> None:
    ours, plain = found["kernels"], found["plain torch"]
    for name in ("log_probs_and_update_s", "step_s", "peak_gb"):
        ratio = plain[name] / ours[name]
        print(f"{case:<12} {name:<24} kernels {ours[name]:8.3f}  plain torch {plain[name]:8.3f}  ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
