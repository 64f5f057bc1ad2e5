"""Attention over packed trees, forward and backward, against torch's flash attention of plain rows and packed prompts.

    python benchmarks/kernels/tree_attention.py [--rounds 30] [--shape tries ...] [--malloc stock|reuse|both]

`plain rows` are prompt and completion of every row, padded to the longest; `packed prompts` computes each prompt once
(`grpoforge.prefix_attention`), and every completion whole. Times are medians of interleaved rounds, in milliseconds;
GFLOP/s count the products of each token with its ancestors, twice forward and five times backward. `reuse` keeps freed
memory, so that no contender waits for pages from the system.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpoforge.packing import Packed, pack
from grpoforge.prefix_attention import prefix_attention
from grpoforge.types import Batch
from grpoforge_kernels.bench import machine
from grpoforge_kernels.bench.measure import Runner, interleave
from grpoforge_kernels.ops import Forest, tree_attention

RESULTS = Path(__file__).parents[1] / "results"
ROWS = 8
"""Completions of each prompt."""
REUSE = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**30)}


@dataclass(frozen=True)
class Shape:
    """``trees`` prompts, each with 8 completions; those that share beginnings do so up to any token."""

    trees: int
    prompt: int
    completion: int
    shares: bool
    heads: int
    kv_heads: int
    d: int

    def rows(self) -> list[list[tuple[int, ...]]]:
        """Of each tree the completions, sorted."""
        drawn = random.Random(0)
        own = range(1, ROWS + 1)
        most = self.completion if self.shares else 1
        shared = [[drawn.randrange(most) for _ in own] for _ in range(self.trees)]
        return [
            sorted((*[0] * n, *[name] * (self.completion - n)) for name, n in zip(own, tree, strict=True))
            for tree in shared
        ]

    def positions(self) -> list[int]:
        """Depths of the tokens of all trees, every shared beginning once."""
        found: list[int] = []
        for tree in self.rows():
            found += range(self.prompt)
            for before, row in pairwise([(), *tree]):
                same = next((at for at, (a, b) in enumerate(zip(row, before, strict=False)) if a != b), 0)
                found += range(self.prompt + same, self.prompt + self.completion)
        return found


SHAPES = {
    "tries": Shape(24, 30, 64, True, 4, 2, 32),
    "small heads": Shape(8, 48, 64, False, 8, 4, 8),
    "one prompt": Shape(1, 256, 32, False, 14, 2, 64),
    "long": Shape(1, 512, 512, False, 14, 2, 64),
}

Heads = tuple[Tensor, Tensor, Tensor]
"""Query, key and value; leaves."""


def leaves(shape: Shape, *sizes: int) -> Heads:
    """``[*sizes, heads, d]`` each."""
    made = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(*sizes, heads, shape.d, generator=made).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return query, key, value


def step(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Heads) -> Callable[[], object]:
    """Values and gradients, once."""
    grad = torch.ones_like(attend(*inputs))
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def packed(shape: Shape) -> Packed:
    """Prompts once and completions whole; the token behind a completion's last is one that predicts nothing."""
    rows, length = shape.trees * ROWS, shape.completion + 1
    prompts = torch.arange(shape.trees).repeat_interleave(ROWS)[:, None].expand(rows, shape.prompt)
    completions = torch.zeros(rows, length, dtype=torch.int64)
    return pack(
        Batch(
            prompt_ids=prompts.contiguous(),
            prompt_mask=torch.ones(rows, shape.prompt, dtype=torch.bool),
            completion_ids=completions,
            completion_mask=torch.ones(rows, length, dtype=torch.bool),
            sampling_logprobs=torch.zeros(rows, length),
            temperatures=torch.ones(rows, dtype=torch.float64),
        )
    )


def contenders(shape: Shape) -> dict[str, Callable[[], object]]:
    """What is timed. Heads first is how torch's attention is given rows."""
    scale = shape.d**-0.5
    forest, whole = Forest.of(torch.tensor(shape.positions())), packed(shape)
    rows, length = shape.trees * ROWS, shape.prompt + shape.completion

    def plain(*heads: Tensor) -> Tensor:
        query, key, value = (one.transpose(1, 2) for one in heads)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )

    return {
        "trees": step(lambda *heads: tree_attention(*heads, forest, scale=scale), leaves(shape, len(forest))),
        "packed prompts": step(
            lambda *heads: prefix_attention(*heads, whole, scale=scale, softcap=None),
            leaves(shape, whole.input_ids.shape[1]),
        ),
        "plain rows": step(plain, leaves(shape, rows, length)),
    }


def measured(shape: Shape, rounds: int) -> dict[str, Any]:
    """Tokens, medians in milliseconds, and how many times as long the others take."""
    positions = torch.tensor(shape.positions())
    steps = contenders(shape)
    for one in steps.values():
        one()
    timings = interleave({name: Runner(one, lambda: None) for name, one in steps.items()}, rounds=rounds, limit=20.0)
    ours = timings["trees"].median
    flops = 7 * 2 * float((positions + 1).sum()) * shape.heads * shape.d
    return {
        "tokens": len(positions),
        "tokens of plain rows": shape.trees * ROWS * (shape.prompt + shape.completion),
        "gflops": round(flops / ours / 1e9, 1),
        **{name: {"ms": round(1e3 * t.median, 3), "x ours": round(t.median / ours, 2)} for name, t in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shape", action="append", choices=[*SHAPES])
    parser.add_argument("--malloc", choices=["stock", "reuse", "both"], default="both")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the report goes")
    given = parser.parse_args()
    names = given.shape or [*SHAPES]
    if given.malloc == "stock":
        print(json.dumps({name: measured(SHAPES[name], given.rounds) for name in names}))
        return
    found: dict[str, Any] = {
        "date": machine.today(), "commit": machine.commit(), "machine": machine.machine(),
        "versions": machine.versions(), "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    for malloc in ("stock", "reuse")[given.malloc == "reuse" :]:
        command = [sys.executable, __file__, "--malloc", "stock", "--rounds", str(given.rounds)]
        command += [word for name in names for word in ("--shape", name)]
        environment = os.environ | (REUSE if malloc == "reuse" else {})
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[malloc] = json.loads(done.stdout)
        for name, row in found[malloc].items():
            times = ", ".join(f"{who} {row[who]['ms']:.2f} ms" for who in ("trees", "packed prompts", "plain rows"))
            print(f"{malloc:<6} {name:<12} {row['tokens']:>6} tokens: {times}; {row['gflops']:.0f} GFLOP/s", flush=True)
    path = given.folder / f"tree_attention-{found['date'][:10]}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
