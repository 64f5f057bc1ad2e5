"""A measurement in a process of its own: a request as JSON on standard input, the answer as JSON on standard output."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch

from grpoforge_kernels.bench.plan import Plan


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    # What a peer prints is no part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        answer = _answer(request)
    json.dump(answer, sys.stdout)


def _answer(request: dict[str, Any]) -> Any:
    from grpoforge_kernels.bench import child, report

    plan = Plan.from_json(request["plan"])
    if request["task"] == "memory":
        return child.answer_memory(plan, request["case"], request["names"])
    if request["task"] == "build":
        return child.answer_build()
    return report.measure_here(plan, say=lambda text: print(text, file=sys.stderr))  # noqa: T201


if __name__ == "__main__":
    main()
