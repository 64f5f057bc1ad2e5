"""Two processes with half the prompts each take the step of one process with all of them.

This file is also the program that the two processes run.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpoforge.collate import collate
from grpoforge.distributed import Workers, start_workers, stop_workers
from grpoforge.engine import Frozen
from grpoforge.metrics import Meter, averages
from grpoforge.reduction import REDUCTIONS, Counts

PROMPTS = [[5, 9, 3, 12], [7], [4, 4, 21], [6, 2]]
COMPLETIONS: list[list[list[int]]] = [
    [[3, 8, 1], [14, 6, 20, 9, 2, 7]],
    [[22], [5, 1]],
    [[9, 13, 4, 4], [17, 2, 8, 19, 1]],
    [[4, 5], [6, 1]],
]
# The second process has no token at all: its rows are masked, and it must still take part in every sum.
NOTHING_LATE: list[list[list[int]]] = [*COMPLETIONS[:2], [[], []], [[], []]]
ADVANTAGES = [[0.7, -0.7], [0.2, -0.2], [-1.1, 1.1], [0.4, -0.4]]
CASES = {"whole": COMPLETIONS, "nothing-late": NOTHING_LATE}


def take_part(workers: Workers) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gradients, metrics and updated weights of this process's share of every case."""
    build = runpy.run_path(str(Path(__file__).parent / "conftest.py"))
    tensors: dict[str, torch.Tensor] = {}
    metrics: dict[str, Any] = {}
    share = workers.share(len(PROMPTS))
    for case, completions in CASES.items():
        rollouts = build["make_rollouts"](PROMPTS[share], completions[share])
        batch = collate(rollouts, torch.tensor(ADVANTAGES, dtype=torch.float64)[share], pad_token_id=0)
        for reduction in sorted(REDUCTIONS):
            policy, reference = build["tiny_policy"](0), build["tiny_policy"](2)
            engine = build["make_engine"](
                policy, reference=reference, beta=0.1, reduction=reduction, micro_batch_size=3, workers=workers
            )
            frozen = engine.freeze(batch, Meter())
            frozen = Frozen(old=build["tiny_policy"](1).frozen_logprobs(batch, 8), reference=frozen.reference)
            meter = Meter()
            engine.update(batch, frozen, rollouts.max_completion_length, meter)
            name = f"{case}/{reduction}"
            tensors[name] = torch.cat([parameter.detach().flatten() for parameter in policy.trainable()])
            metrics[name] = averages(workers.sum_totals(meter.totals))
            # `update` has spent the gradient: take it again, without the step.
            engine.accumulate(batch, frozen, rollouts.max_completion_length, Meter())
            workers.sum_gradients(policy.trainable())
            tensors[f"{name}/gradient"] = build["flat_gradient"](policy)
    metrics["any"] = [workers.any(workers.rank == 1), workers.any(False)]
    return tensors, metrics


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [
        subprocess.Popen([sys.executable, __file__, str(folder)], env=common | {"RANK": str(rank)}) for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")))
        for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def one() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return take_part(Workers())


def test_gradients_and_weights_are_those_of_one_process(one: Any, two: Any) -> None:
    assert len(one[0]) == 16
    for name, expected in one[0].items():
        assert float(expected.norm()) > 0.1
        for tensors, _ in two:
            assert float((tensors[name] - expected).norm() / expected.norm()) <= 1e-12, name


def test_all_processes_hold_the_same_weights_bit_for_bit(two: Any) -> None:
    for name, tensor in two[0][0].items():
        assert tensor.equal(two[1][0][name]), name


def test_metrics_are_those_of_one_process(one: Any, two: Any) -> None:
    alone = one[1]
    for case in (f"{case}/{reduction}" for case in CASES for reduction in REDUCTIONS):
        assert {"loss", "kl", "entropy", "grad_norm", "learning_rate", "clip_ratio/region_mean"} <= set(alone[case])
        for _, metrics in two:
            assert set(metrics[case]) == set(alone[case])
            averaged = {name: value for name, value in alone[case].items() if not name.startswith("invariant/")}
            assert {name: metrics[case][name] for name in averaged} == pytest.approx(averaged, rel=1e-11)


def test_a_flag_of_one_process_is_seen_by_all(two: Any) -> None:
    assert [metrics["any"] for _, metrics in two] == [[True, False]] * 2


def test_one_process_needs_no_peers() -> None:
    workers = Workers()
    counts = Counts(rows=2, tokens=5, max_completion_length=8)
    parameter = torch.nn.Parameter(torch.zeros(2))
    workers.sum_gradients([parameter])
    assert workers.is_main and workers.share(6) == slice(0, 6)
    assert workers.sum_counts(counts) is counts and parameter.grad is None
    assert workers.any(True) and not workers.any(False)


def test_prompts_are_shared_without_overlap() -> None:
    assert [Workers(rank, 3).share(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert [Workers(rank, 3).is_main for rank in range(3)] == [True, False, False]


@pytest.mark.parametrize(("cuda", "calls"), [(True, ["device 1", "nccl"]), (False, ["gloo"])])
def test_each_rank_takes_its_device_before_it_meets_the_others(
    cuda: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: made.append(f"device {index}"))
    monkeypatch.setattr("torch.distributed.init_process_group", made.append)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert start_workers() == Workers(rank=1, size=2)
    assert made == calls


def main(folder: Path) -> None:
    workers = start_workers()
    tensors, metrics = take_part(workers)
    save_file(tensors, folder / f"{workers.rank}.safetensors")
    (folder / f"{workers.rank}.json").write_text(json.dumps(metrics), encoding="utf-8")
    stop_workers()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
