"""Seconds and memory of an update (old log-probs, reference, gradient, optimizer) with and without shared prompts.

    python benchmarks/bench_update.py [--case tiny-math ...] [--rounds 5] [--variant shared ...] [--threads 2]

Rollouts are made up: random prompts and completions of the lengths that the case names, on a model with the weights or
the shape that the case names. All variants see the same ones and take turns in one process, which gives the medians;
peak memory, above weights, gradients and optimizer state, comes from a process of its own for each variant. Both wall
and processor time are kept: on a machine that other programs share, the second says more.

- `ours`: the defaults: packed rows, and old log-probs from wherever they are known.
- `shared`: packed rows, old log-probs by a pass of the policy.
- `plain`: as `shared`, with padded rows and every prompt once per completion.
- `trl-form`: the update written as TRL writes it: the padded rectangle through the whole model, logits of all
  completion columns (`logits_to_keep`), old and reference passes, autograd. It is not TRL.

Writes benchmarks/results/update-DATE.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("GRPOFORGE_SHARED", ROOT / "shared"))


Seconds = tuple[float, float]
"""Wall and processor time."""


def now() -> Seconds:
    """Wall and processor time so far."""
    return time.perf_counter(), time.process_time()


def since(start: Seconds, skipped: Seconds = (0.0, 0.0)) -> Seconds:
    """What has passed since ``start``, without what was ``skipped``."""
    end = now()
    return end[0] - start[0] - skipped[0], end[1] - start[1] - skipped[1]


@dataclass(frozen=True)
class Case:
    """The shape of a step."""

    model: str
    """``tiny-math``, ``stories260K``, or a shape of `SHAPES` with random weights."""
    prompts: int
    group: int
    prompt_tokens: tuple[int, int]
    """Least and most."""
    completion_tokens: tuple[int, int]
    minibatch: int
    micro: int


QWEN = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
VOCABULARIES = (32_768, 151_936)
SHAPES: dict[str, dict[str, int]] = {
    "qwen2.5-0.5b": QWEN | {"num_hidden_layers": 24},
    "qwen2.5-0.5b, 6 layers": QWEN | {"num_hidden_layers": 6},
    "small": SMALL,
    **{f"small V={size}": SMALL | {"vocab_size": size} for size in VOCABULARIES},
}

CASES: dict[str, Case] = {
    "tiny-math": Case("tiny-math", 24, 8, (40, 80), (20, 64), 96, 96),
    "stories260K": Case("stories260K", 8, 8, (40, 90), (64, 64), 64, 64),
    "qwen2.5-0.5b": Case("qwen2.5-0.5b", 1, 8, (256, 256), (32, 32), 8, 8),
    "qwen2.5-0.5b, 6 layers": Case("qwen2.5-0.5b, 6 layers", 1, 8, (256, 256), (32, 32), 8, 8),
    **{
        f"small L={length} G={group}": Case("small", 1, group, (length, length), (64, 64), group, group)
        for length in (64, 256, 1024)
        for group in (2, 4, 8, 16)
    },
    **{f"small V={size} L=256 G=8": Case(f"small V={size}", 1, 8, (256, 256), (64, 64), 8, 8) for size in VOCABULARIES},
}

OURS: dict[str, dict[str, str]] = {
    "ours": {},
    "shared": {"old_logprobs": "recompute"},
    "plain": {"old_logprobs": "recompute", "shared_prefix": "off"},
}
VARIANTS = (*OURS, "trl-form")


def make_model(name: str) -> Any:
    """The model of a case in float32."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from grpoforge.config import ModelConfig
    from grpoforge.plugins import load_plugins

    torch.manual_seed(0)
    if name == "tiny-math":
        return load_plugins([]).hook.load_policy(model=ModelConfig()).model
    if name == "stories260K":
        return AutoModelForCausalLM.from_pretrained(SHARED / "models/stories260K", dtype=torch.float32)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPES[name], tie_word_embeddings=True, max_position_embeddings=4096))


class Tokenizer:
    """As much of one as a step asks for."""

    pad_token_id = 0


def make_rollouts(case: Case, vocabulary: int) -> Any:
    """Random tokens of the lengths of ``case``."""
    from grpoforge.types import Completion, Prompt, Rollouts

    draw = random.Random(0)

    def some(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(draw.randint(least, most)))

    def completion() -> Any:
        ids = some(*case.completion_tokens)
        return Completion(
            text="", token_ids=ids, logprobs=(-5.0,) * len(ids), temperature=1.0, finish_reason="stop", policy_version=0
        )

    prompts = [Prompt(text="", token_ids=some(*case.prompt_tokens), columns={}, index=i) for i in range(case.prompts)]
    return Rollouts(
        prompts=tuple(prompts),
        completions=tuple(tuple(completion() for _ in range(case.group)) for _ in prompts),
        max_completion_length=case.completion_tokens[1],
    )


class Given:
    """A sampler that answers with what it was given, and with the log-probs that the policy would have drawn it at."""

    def __init__(self, rollouts: Any) -> None:
        self.rollouts = rollouts
        self.seconds: Seconds = (0.0, 0.0)

    def sample(self, policy: Any, prompts: Any, group_size: int, seed: int) -> Any:
        """The rollouts; the time is kept to be subtracted."""
        from grpoforge.collate import collate

        start = now()
        batch = collate(self.rollouts, pad_token_id=0)
        found = policy.frozen_logprobs(batch, 8).logprobs
        rows = iter(values[kept].tolist() for values, kept in zip(found, batch.completion_mask, strict=True))
        drawn = tuple(
            tuple(replace(one, logprobs=tuple(next(rows)), policy_version=policy.version) for one in group)
            for group in self.rollouts.completions
        )
        self.seconds = since(start)
        return replace(self.rollouts, completions=drawn)

    def sync(self, policy: Any) -> None:
        """Nothing to do."""


def alternate(completions: Any) -> list[float]:
    """Rewards that differ within every group."""
    return [float(row % 2) for row in range(len(completions))]


def ours(case: Case, options: dict[str, str]) -> Callable[[], Seconds]:
    """One step of grpoforge on given rollouts; gives its seconds without drawing."""
    from grpoforge.algorithm import make_algorithm
    from grpoforge.assembly import make_engine
    from grpoforge.distributed import Workers
    from grpoforge.layers import build
    from grpoforge.parts import resolve
    from grpoforge.plugins import load_plugins
    from grpoforge.policy import Policy
    from grpoforge.precision import Precision
    from grpoforge.scoring import BoundReward
    from grpoforge.yaml_source import recipe_layers

    size = {
        "prompts_per_step": case.prompts,
        "completions_per_prompt": case.group,
        "minibatch_size": case.minibatch,
        "micro_batch_size": case.micro,
    }
    config = build([*recipe_layers("tiny-math"), ("bench_update", {"batch": size | options})])
    host = load_plugins([])
    model = make_model(case.model)
    policy = Policy(model, Tokenizer(), Precision(torch.float32))
    rollouts = make_rollouts(case, model.config.vocab_size)
    sampler = Given(rollouts)
    algorithm = make_algorithm(config, resolve(config, host), sampler, ["question", "answer"])
    reward = BoundReward(name="alternate", function=alternate, data=("completions",), weight=1.0)
    algorithm = replace(algorithm, drawing=replace(algorithm.drawing, rewards=[reward]))
    engine = make_engine(config, algorithm, policy, Workers(), 10_000)
    # As if it had moved: the first step of a run asks no reference.
    policy.version = 1

    def step() -> Seconds:
        start = now()
        engine.step(rollouts.prompts, step=1, seed=0)
        return since(start, sampler.seconds)

    return step


def trl_form(case: Case) -> Callable[[], Seconds]:
    """The same update as TRL writes it: padded rectangles, all logits of the completion columns, loss by autograd."""
    import copy

    from grpoforge.collate import collate, split

    model = make_model(case.model).train()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    batch = collate(make_rollouts(case, model.config.vocab_size), pad_token_id=0)
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).long()
    width = batch.completion_ids.shape[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    advantages = torch.tensor([1.0, -1.0]).repeat(batch.num_rows // 2)

    def logprobs(model: Any, rows: Any, *, entropy: bool) -> Tensor:
        logits = model(
            input_ids=ids[rows], attention_mask=mask[rows], use_cache=False, logits_to_keep=width + 1
        ).logits[:, :-1]
        chosen = logits.gather(2, ids[rows][:, -width:, None]).squeeze(2)
        found = chosen - torch.stack([row.logsumexp(dim=1) for row in logits])
        if entropy:
            with torch.no_grad():
                table = logits.log_softmax(dim=2)
                (table.exp() * table).sum(dim=2)
        return found

    def frozen(model: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([logprobs(model, r, entropy=False) for r in split(batch.num_rows, case.micro)])

    def step() -> Seconds:
        start = now()
        old, ref = frozen(model), frozen(reference)
        for rows in torch.randperm(batch.num_rows).split(case.minibatch):
            for part in rows.split(case.micro):
                new, kept = logprobs(model, part, entropy=True), batch.completion_mask[part]
                ratio, gap = (new - old[part]).exp(), ref[part] - new
                by_advantage = advantages[part][:, None]
                gain = torch.minimum(ratio * by_advantage, ratio.clamp(0.8, 1.2) * by_advantage)
                loss = -gain + 0.02 * (gap.exp() - gap - 1)
                ((loss * kept).sum() / kept.sum() * len(part) / case.minibatch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return since(start)

    return step


def make(case: Case, variant: str) -> Callable[[], Seconds]:
    """A step of ``variant``, ready to run; gives its seconds."""
    return trl_form(case) if variant == "trl-form" else ours(case, OURS[variant])


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak(case: Case, variant: str, *, is_warm: bool) -> tuple[Seconds, int]:
    """Seconds of a step, and its peak in bytes above weights, gradients and optimizer state.

    Args:
        is_warm: of the second step in this process, else of the first: half the time, for large cases.
    """
    step = make(case, variant)
    size = 4 * sum(parameter.numel() for parameter in make_model(case.model).parameters())
    if is_warm:
        step()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    seconds = step()
    # The first step makes the two moments of the optimizer too.
    return seconds, status("VmHWM") - before - (1 if is_warm else 3) * size


def peak_elsewhere(name: str, variant: str, rounds: int, threads: int) -> tuple[Seconds, int]:
    """`peak` in a process of its own, of a first step where there are no rounds."""
    command = [sys.executable, __file__, "--peak", "--case", name, "--variant", variant]
    command += ["--threads", str(threads), "--rounds", str(rounds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, size = json.loads(done.stdout.splitlines()[-1])
    return (seconds[0], seconds[1]), int(size)


def medians(case: Case, variants: list[str], rounds: int) -> dict[str, Seconds]:
    """Seconds of each variant, which take turns."""
    steps = {variant: make(case, variant) for variant in variants}
    taken: dict[str, list[Seconds]] = {variant: [] for variant in variants}
    for _ in range(rounds + 1):
        for variant, step in steps.items():
            taken[variant].append(step())
    columns = {variant: list(zip(*times[1:], strict=True)) for variant, times in taken.items()}
    return {variant: (statistics.median(wall), statistics.median(cpu)) for variant, (wall, cpu) in columns.items()}


def compare(name: str, variants: list[str], rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of each variant.

    Args:
        rounds: 0 for the seconds of the one step that gave the peak; below 0 for that many rounds and no peak.
    """
    if rounds < 0:
        return {
            variant: {"wall_s": wall, "processor_s": processor}
            for variant, (wall, processor) in medians(CASES[name], variants, -rounds).items()
        }
    peaks = {variant: peak_elsewhere(name, variant, rounds, threads) for variant in variants}
    seconds = medians(CASES[name], variants, rounds) if rounds else {v: found[0] for v, found in peaks.items()}
    return {
        variant: {
            "wall_s": seconds[variant][0],
            "processor_s": seconds[variant][1],
            "peak_bytes": peaks[variant][1],
        }
        for variant in variants
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--variant", choices=VARIANTS, action="append")
    parser.add_argument(
        "--rounds", type=int, default=5, help="0: one first step, which gives the peak too; -N: N rounds and no peak"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    variants = asked.variant or list(VARIANTS)
    if asked.peak:
        print(json.dumps(peak(CASES[asked.case[0]], variants[0], is_warm=asked.rounds > 0)))
        return
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    file = ROOT / f"benchmarks/results/update-{date}.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cases": {}}
    results |= {"date": date, "machine": platform.platform(), "torch": torch.__version__, "threads": asked.threads}
    for name in asked.case or list(CASES):
        results["cases"][name] = {"rounds": asked.rounds} | compare(name, variants, asked.rounds, asked.threads)
        for variant in variants:
            found = results["cases"][name][variant]
            times = f"{found['wall_s']:8.3f} s  processor {found['processor_s']:8.3f} s"
            size = f"{found['peak_bytes'] / 1e6:8.1f} MB" if "peak_bytes" in found else "not measured"
            print(f"{name:<24} {variant:<10} {times}  peak {size}", flush=True)
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
