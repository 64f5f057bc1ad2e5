"""Whole training steps against TRL's GRPOTrainer: the same model, prompts, lengths, rewards, group and threads.

    benchmarks/parity/install.sh FOLDER                       TRL in an environment of its own
    python benchmarks/bench_step.py --trl FOLDER/bin/python [--case tiny-math ...] [--rounds 5]
    python benchmarks/bench_step.py --trl FOLDER/bin/python --race [--seeds 0]

A step is what follows one draw of prompts: rollouts, rewards, old and reference log-probs, every optimizer step.
Lengths are forced: no token ends a completion. Both sides run in processes of their own that take turns, a step each;
a process that waits computes nothing. Of the large case one process runs at a time, with a step that warms up. `--race`
trains both with the same hyper-parameters until held-out accuracy is reached; evaluations are not on the clock. Writes
benchmarks/results/step-DATE.json or race-DATE.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
SHARED = Path(os.environ.get("GRPOFORGE_SHARED", ROOT.parent / "shared"))
TINY_MATH = ROOT / "plugins/grpoforge_plugins/tiny_math/model"
ANSWERS = ROOT / "plugins/grpoforge_plugins/rewards/answers.py"

HALF_BILLION = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The shape of a step."""

    model: str
    prompts: int
    prompt_tokens: int | None
    """Of every prompt; None for the word problems of `tiny-math`."""
    group: int
    length: int
    minibatch: int
    at_once: bool = True
    """Whether both processes fit in memory together."""


CASES = {
    "tiny-math": Case("tiny-math", 24, None, 8, 64, 96),
    "stories260K": Case("stories260K", 8, 48, 8, 64, 64),
    "0.5b": Case("0.5b", 1, 256, 8, 32, 8, at_once=False),
}
TRL_OPTIONS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL, static cache": {"cache_implementation": "static"},
    "TRL, continuous batching": {"use_transformers_continuous_batching": True},
}


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a model folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def model_folder(name: str, scratch: Path) -> Path:
    """The model of a case; the large one is made, with random weights."""
    if name == "tiny-math":
        return TINY_MATH
    if name == "stories260K":
        return SHARED / "models/stories260K"
    folder = scratch / "half-billion"
    if not folder.exists():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        tokenizer = tokenizer_of(TINY_MATH)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        Qwen2ForCausalLM(Qwen2Config(**HALF_BILLION, **ids, max_position_embeddings=4096)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def problems(split: str, count: int) -> list[dict[str, Any]]:
    """Word problems, as the recipe `tiny-math` renders them."""
    from grpoforge_plugins.datasets.tiny_math import tiny_math

    tokenizer = tokenizer_of(TINY_MATH)

    def rendered(question: str) -> Any:
        message = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    rows = list(tiny_math(split))[:count]
    return [{"prompt": rendered(row["question"]), "answer": str(row["answer"])} for row in rows]


def rows_of(case: Case, folder: Path, count: int) -> list[dict[str, Any]]:
    """Prompts as text: problems, or text of nearly as many tokens as the case says."""
    if case.prompt_tokens is None:
        return problems("train", count)
    text = "Once upon a time there was a little girl who liked to play with 3 red balls and 14 toys. "
    tokenizer, prompt = tokenizer_of(folder), ""
    while len(tokenizer(prompt + text)["input_ids"]) <= case.prompt_tokens:
        prompt += text
    for word in text.split():
        if len(tokenizer(f"{prompt}{word} ")["input_ids"]) <= case.prompt_tokens:
            prompt += f"{word} "
    return [{"prompt": f"{prompt.strip()} {number}", "answer": "0"} for number in range(count)]


def spec_of(case: Case, folder: Path, threads: int, count: int, **more: Any) -> dict[str, Any]:
    """What both halves are told."""
    return {
        "model": str(folder), "rows": rows_of(case, folder, count), "group": case.group, "length": case.length,
        "prompts": case.prompts, "minibatch": case.minibatch, "updates": case.prompts * case.group // case.minibatch,
        "beta": 0.02, "learning_rate": 3e-4, "warmup": 2, "threads": threads, "seed": 0, "max_cycles": 1000,
        "options": {},
    } | more  # fmt: skip


class Worker:
    """A process that takes a step when it is told to."""

    def __init__(self, command: Sequence[str], spec: dict[str, Any], scratch: Path) -> None:
        file = Path(tempfile.mkstemp(dir=scratch, suffix=".json")[1])
        file.write_text(json.dumps(spec), encoding="utf-8")
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*command, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip

    def read(self, event: str) -> dict[str, Any]:
        """The next line that tells of `event`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and json.loads(line).get("event") == event:
                return json.loads(line)  # type: ignore[no-any-return]
        raise RuntimeError(f"the worker ended with exit code {self.process.wait()}")

    def step(self) -> dict[str, Any]:
        """One step."""
        self.read("ready")
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read("step")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def commands(trl: str, names: Sequence[str]) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """How each side is started, and what it is told beside the case."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {"grpoforge": ([sys.executable, __file__, "--worker"], {})}
    worker = str(ROOT / "benchmarks/step/trl_worker.py")
    return found | {name: ([trl, worker], {"options": dict(TRL_OPTIONS[name])}) for name in names}


def take_turns(
    sides: dict[str, tuple[list[str], dict[str, Any]]], spec: dict[str, Any], rounds: int, scratch: Path, at_once: bool
) -> dict[str, list[dict[str, Any]]]:
    """The steps of every side, interleaved; the first of each process is not counted."""
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    if at_once:
        workers = {name: Worker(command, spec | more, scratch) for name, (command, more) in sides.items()}
        try:
            for worker in workers.values():
                worker.step()
            for _ in range(rounds):
                for name, worker in workers.items():
                    steps[name].append(worker.step())
        finally:
            for worker in workers.values():
                worker.close()
        return steps
    for _ in range(rounds):
        for name, (command, more) in sides.items():
            worker = Worker(command, spec | more, scratch)
            try:
                worker.step()
                steps[name].append(worker.step())
            finally:
                worker.close()
            print(f"  {name}: {steps[name][-1]}", file=sys.stderr, flush=True)
    return steps


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spread."""
    medians = {key: statistics.median(step[key] for step in steps) for key in ("step", "rollout", "rest", "peak_mb")}
    return medians | {"steps": [round(step["step"], 4) for step in steps]}


def engine_of(spec: dict[str, Any], scratch: str) -> tuple[Any, Any]:
    """grpoforge's engine and prompts for a spec, with completions that no token ends."""
    from dataclasses import replace

    from grpoforge.algorithm import make_algorithm
    from grpoforge.assembly import make_engine
    from grpoforge.config import ModelConfig
    from grpoforge.distributed import Workers
    from grpoforge.layers import build
    from grpoforge.parts import resolve
    from grpoforge.plugins import load_plugins
    from grpoforge.scoring import BoundReward
    from grpoforge.types import Prompt
    from grpoforge.yaml_source import recipe_layers

    changes = {
        "batch": {
            "prompts_per_step": spec["prompts"], "completions_per_prompt": spec["group"],
            "minibatch_size": spec["minibatch"], "micro_batch_size": spec["minibatch"],
        },
        "sampler": {"max_completion_length": spec["length"]},
        "kl": {"beta": spec["beta"]},
        "optim": {"learning_rate": spec["learning_rate"], "warmup_steps": spec["warmup"]},
    }  # fmt: skip
    config = build([*recipe_layers("tiny-math"), ("bench_step", changes)])
    host = load_plugins([])
    policy = host.hook.load_policy(model=ModelConfig(name=spec["model"], precision="fp32"))
    policy.eos_token_ids = frozenset  # no token ends a completion
    parts = resolve(config, host)
    algorithm = make_algorithm(config, parts, parts.sampler.build(), ["question", "answer"])
    reward = BoundReward(name="alternate", function=alternate, data=("completions",), weight=1.0)
    algorithm = replace(algorithm, drawing=replace(algorithm.drawing, rewards=[reward]))
    engine = make_engine(config, algorithm, policy, Workers(), spec["max_cycles"] * spec["updates"])
    prompts = [
        Prompt(text=row["prompt"], token_ids=tuple(policy.tokenizer(row["prompt"])["input_ids"]), columns=row, index=i)
        for i, row in enumerate(spec["rows"])
    ]
    return engine, prompts


def alternate(completions: Any) -> list[float]:
    """Rewards that differ within every group."""
    return [float(row % 2) for row in range(len(completions))]


def work(file: str) -> None:
    """grpoforge's half: a step whenever the parent says so."""
    import torch

    spec = json.loads(Path(file).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    engine, prompts = engine_of(spec, file)
    gc.freeze()  # As `grpoforge train` does.
    for number in range(spec["max_cycles"]):
        print(json.dumps({"event": "ready"}), flush=True)
        if not sys.stdin.readline().strip():
            return
        at = number * spec["prompts"] % len(prompts)
        chosen = (prompts + prompts)[at : at + spec["prompts"]]
        start = time.perf_counter()
        report = engine.step(chosen, step=number + 1, seed=number)
        seconds, rollout = time.perf_counter() - start, report.metrics["time/rollout"]
        lengths = {len(completion.token_ids) for completion in report.rollouts.flat()}
        assert lengths == {spec["length"]}, lengths
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            json.dumps(
                {"event": "step", "step": seconds, "rollout": rollout, "rest": seconds - rollout, "peak_mb": peak}
            ),
            flush=True,
        )


def compare(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The table of steps."""
    found: dict[str, Any] = {}
    for name in given.case or [*CASES]:
        case = CASES[name]
        spec = spec_of(case, model_folder(case.model, scratch), given.threads, count=4 * case.prompts)
        peers = given.peer or (["TRL"] if not case.at_once else [*TRL_OPTIONS])
        steps = take_turns(commands(given.trl, peers), spec, given.rounds, scratch, case.at_once)
        found[name] = {side: summary(some) for side, some in steps.items()}
        ours = found[name]["grpoforge"]
        for side, row in found[name].items():
            parts = (f"{key} {row[key]:.3f} s ({row[key] / ours[key]:.2f}x)" for key in ("step", "rollout", "rest"))
            print(f"{name:12} {side:26} {'  '.join(parts)}  peak {row['peak_mb']:,.0f} MB", flush=True)
    return found


def race(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds of training until 80% of the held-out problems are right, by seed and side."""
    found: dict[str, Any] = {}
    for seed in given.seeds:
        ours, theirs = race_ours(seed, given, scratch), race_trl(seed, given, scratch)
        found[str(seed)] = {"grpoforge": ours, "TRL": theirs, "ratio": ours[-1]["seconds"] / theirs[-1]["seconds"]}
        print(f"seed {seed}: grpoforge {ours[-1]}  TRL {theirs[-1]}  ratio {found[str(seed)]['ratio']:.2f}", flush=True)
    return found


EVERY, TARGET, HELD_OUT = 2, 0.8, 256


def race_trl(seed: int, given: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """TRL's half."""
    case = CASES["tiny-math"]
    race = {"until_accuracy": TARGET, "every": EVERY, "answers": str(ANSWERS), "held_out": problems("test", HELD_OUT)}
    spec = spec_of(case, TINY_MATH, given.threads, 4096, **race, max_cycles=24, seed=seed)
    worker = Worker(commands(given.trl, ["TRL"])["TRL"][0], spec, scratch)
    return _until_there(worker)


def race_ours(seed: int, given: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Our half: the recipe `tiny-math`, evaluated as often."""
    output = scratch / f"race-{seed}"
    command = [
        sys.executable, "-m", "grpoforge", "train", "tiny-math", "--reward", "math", "--reward", "brevity",
        "--seed", str(seed), "--output", str(output), "--set", f"eval.every={EVERY}",
        "--set", f"data.num_eval={HELD_OUT}", "--set", "checkpoint.every=0",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    seconds, points = 0.0, []
    for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["kind"] == "train":
            seconds += entry["step_time"]
        elif entry["step"] > 0:
            points.append({"step": entry["step"], "seconds": seconds, "accuracy": entry["eval_pass@1"]})
            if entry["eval_pass@1"] >= TARGET:
                break
    return points


def _until_there(worker: Worker) -> list[dict[str, Any]]:
    points = []
    try:
        while not points or points[-1]["accuracy"] < TARGET:
            points.append(worker.read("accuracy"))
    except RuntimeError:
        print(f"TRL did not reach {TARGET:.0%}", file=sys.stderr)
    finally:
        worker.close()
    return points


def main() -> None:
    """Measure, print a table, write the report."""
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", required=True, metavar="PYTHON", help="python of the environment that has TRL")
    parser.add_argument("--case", choices=[*CASES], action="append")
    parser.add_argument("--peer", choices=[*TRL_OPTIONS], action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--race", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = race(given, Path(scratch)) if given.race else compare(given, Path(scratch))
    date = datetime.datetime.now(tz=datetime.UTC)
    report = {
        "date": date.isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/bench_step.py", *sys.argv[1:]]),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "threads": given.threads},
        "rounds": given.rounds,
        "results": found,
    }
    path = RESULTS / f"{'race' if given.race else 'step'}-{date:%Y-%m-%d}.json"
    if path.exists() and not given.race:
        report["results"] = json.loads(path.read_text(encoding="utf-8"))["results"] | found
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
