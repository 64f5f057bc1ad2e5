"""linear_logprobs at 512 x 151,936 x 896 against the three peers that its goals name, in minutes.

    python benchmarks/kernels/linear_at_full_size.py [--rounds 3] [--dtype bf16] [--dtype fp32]

`linear_logprobs.py` measures every installed peer and the errors too, which takes an hour at this size. Times are
medians of interleaved rounds after a warm-up; peak memory is that above the inputs, gradients included. What tokens
without gradient and a frozen head save is measured against ourselves.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from grpoforge_kernels.bench import contenders as all_contenders
from grpoforge_kernels.bench import lineup, machine, memory
from grpoforge_kernels.bench.measure import Runner, interleave
from grpoforge_kernels.bench.plan import VARIANTS, Case, Plan
from grpoforge_kernels.bench.problems import build

SHAPE = (512, 151_936, 896)
PEERS = ("torch.compile", "trl-form chunked", "Liger fused linear GRPO")
RESULTS = Path(__file__).parents[1] / "results"


def measured(dtype: str, variant: str, rounds: int) -> dict[str, Any]:
    """Seconds and peak bytes of our modes and of the named peers, which have no variants."""
    case = Case("linear_logprobs", dtype, SHAPE, variant=variant)
    plan = Plan(ops=("linear_logprobs",), dtypes=(dtype,), shapes=(SHAPE,), backends=("cpp",), effort="full")
    chosen: list[all_contenders.Contender] = [
        one for one in lineup.contenders(case, plan) if (one.ours or one.name in PEERS) and not one.unable(case)
    ]
    problem = build(case)
    steps = {one.name: one.start(problem) for one in chosen}
    for step in steps.values():
        step()
    timings = interleave({name: Runner(step, lambda: None) for name, step in steps.items()}, rounds=rounds, limit=90.0)
    peaks = memory.peak_bytes(case, chosen)
    return {name: {"median_s": timings[name].median, "peak_bytes": peaks.get(name)} for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", action="append", choices=["bf16", "fp32"])
    given = parser.parse_args()
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    found: dict[str, Any] = {
        "date": date,
        "command": " ".join(["python", "benchmarks/kernels/linear_at_full_size.py", *sys.argv[1:]]),
        "commit": machine.commit(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "shape": SHAPE,
        "dtypes": {},
        "variants": {},
    }
    for dtype in given.dtype or ["bf16", "fp32"]:
        each = {variant: measured(dtype, variant, given.rounds) for variant in VARIANTS["linear_logprobs"]}
        found["dtypes"][dtype] = each.pop("")
        found["variants"][dtype] = each
        for variant, rows in {"": found["dtypes"][dtype], **each}.items():
            for name, row in rows.items():
                seconds, peak = row["median_s"], (row["peak_bytes"] or 0) / 1e6
                print(f"{dtype}  {variant:<7} {name:<28} {seconds:7.3f} s  {peak:8.0f} MB", flush=True)
    path = RESULTS / f"linear-at-full-size-{date}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
