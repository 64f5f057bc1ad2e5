"""Tokens per second of vLLM's rollouts, measured in vLLM's own environment, as one line of JSON.

    $GRPOFORGE_VLLM_ENV/bin/python benchmarks/vllm/rollout.py --model FOLDER --prompts FILE --group-size 8 \\
        --lengths FILE --repeats 5 --threads 2

``--prompts`` is a JSON list of lists of token ids, ``--lengths`` a JSON list with the number of tokens of each
completion, prompt by prompt (``P * G`` of them), or one number for all. Lengths are forced: EOS does not end a
completion. One warm-up, then ``repeats`` timed rounds with other seeds; every round draws the same number of tokens
with their log-probs. ``--on-demand`` draws a round for every line on stdin instead. Imports nothing of grpoforge, so
any process may call it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--lengths", required=True, help="a number, or a file")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--on-demand", action="store_true", help="a round for every line on stdin, until it ends")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model (slower to start)")
    return parser.parse_args()


def load(asked: argparse.Namespace) -> Any:
    """The engine, without a tokenizer: token ids in, token ids out."""
    from vllm import LLM

    return LLM(
        model=str(asked.model),
        skip_tokenizer_init=True,
        dtype=asked.dtype,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        enforce_eager=not asked.compile,
        enable_chunked_prefill=False,  # vLLM 0.32 on a CPU dies of a seeded request whose prompt is read in two pieces
        disable_log_stats=True,
    )


def draw(llm: Any, prompts: list[list[int]], lengths: list[int], temperature: float, seed: int) -> float:
    """Seconds of one round. Each completion is a request of its own, because each has its own length."""
    from vllm import SamplingParams

    group_size = len(lengths) // len(prompts)
    rows = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(group_size)]
    params = [
        SamplingParams(
            temperature=temperature,
            max_tokens=length,
            ignore_eos=True,
            seed=1_000_003 * seed + row,
            logprobs=0,
            detokenize=False,
        )
        for row, length in enumerate(lengths)
    ]
    llm.reset_prefix_cache()  # the weights of a step are new, and so is everything computed from them
    start = time.perf_counter()
    outputs = llm.generate(rows, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    drawn = [len(one.outputs[0].token_ids) for one in outputs]
    if drawn != lengths:
        raise SystemExit(f"asked for {sum(lengths)} tokens, vLLM drew {sum(drawn)}")
    return seconds


def on_demand(round_: Callable[[int], float]) -> None:
    """A round for every line on stdin, so that another process can take turns with this one."""
    sys.stdout.write(json.dumps({"ready": True}) + "\n")
    sys.stdout.flush()
    for number, _ in enumerate(sys.stdin, start=1):
        sys.stdout.write(json.dumps({"seconds": round_(number)}) + "\n")
        sys.stdout.flush()


def main() -> None:
    asked = options()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    prompts = json.loads(asked.prompts.read_text())
    given = int(asked.lengths) if asked.lengths.isdigit() else json.loads(Path(asked.lengths).read_text())
    lengths = [given] * (len(prompts) * asked.group_size) if isinstance(given, int) else given
    import torch
    import vllm

    torch.set_num_threads(asked.threads)
    llm = load(asked)
    draw(llm, prompts, lengths, asked.temperature, seed=0)
    if asked.on_demand:
        on_demand(lambda number: draw(llm, prompts, lengths, asked.temperature, seed=number))
        return
    seconds = [draw(llm, prompts, lengths, asked.temperature, seed=1 + number) for number in range(asked.repeats)]
    result = {
        "engine": f"vllm {vllm.__version__}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "prompts": len(prompts),
        "group_size": asked.group_size,
        "tokens": sum(lengths),
        "seconds": seconds,
        "tokens_per_second": sum(lengths) / statistics.median(seconds),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
