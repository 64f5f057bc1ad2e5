"""The same command under torchrun: one run directory, one voice, and a signal that stops every process."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from grpoforge import checkpoint

pytestmark = pytest.mark.slow

SMALL = ("--set", "data.num_eval=4", "--set", "batch.prompts_per_step=2", "--set", "batch.completions_per_prompt=2",
         "--set", "batch.minibatch_size=4", "--set", "batch.micro_batch_size=4",
         "--set", "sampler.max_completion_length=16", "--set", "checkpoint.every=1")  # fmt: skip


def torchrun(program: Any, *arguments: str) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}")
    return program.popen(*arguments, python=[*launcher, "-m", "grpoforge"])


def test_two_processes_are_one_run(tmp_path: Path, program: Any) -> None:
    process = torchrun(program, "train", "--max-steps", "2", *SMALL)
    shown, talk = process.communicate(timeout=240)
    assert process.returncode == 0, talk
    (run,) = (tmp_path / "runs").iterdir()
    assert shown.count("accuracy (pass@1, greedy)") == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [(0, "eval"), (1, "train"), (2, "train"), (2, "eval")]
    assert [checkpoint.step_of(folder) for folder in checkpoint.published(run / "checkpoints")] == [1, 2]

    resumed = torchrun(program, "train", "--resume", "--max-steps", "3")
    _, talk = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, talk
    assert talk.count("after step 2 of 3") == 1
    assert [checkpoint.step_of(folder) for folder in checkpoint.published(run / "checkpoints")][-1] == 3


def test_two_processes_measure_what_one_measures(tmp_path: Path, program: Any) -> None:
    # 5 problems in blocks of 2: 8 completions at a time, 4 samples each.
    evaluate = ("eval", "tiny-math", "--num-problems", "5", "--samples", "4", "--set", "eval.batch_size=8", "--json")
    alone = program.popen(*evaluate, "--output", "one.parquet")
    shown, talk = alone.communicate(timeout=240)
    assert alone.returncode == 0, talk
    both = torchrun(program, *evaluate, "--output", "two.parquet", "--compare", "one.parquet")
    shown_by_two, talk = both.communicate(timeout=240)
    assert both.returncode == 0, talk
    one, two = json.loads(shown), json.loads(shown_by_two)
    compared = two.pop("comparison")
    assert compared["only_a_right"] == compared["only_b_right"] == 0
    metrics = one.pop("metrics")
    assert two.pop("metrics") == pytest.approx(metrics, abs=1e-12) and 0 < metrics["eval_mean@4"] < 1
    assert one.pop("comparison") is None and one == two
    rows = [parquet.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("one", "two")]
    assert rows[0] == rows[1] and [row["index"] for row in rows[0]] == list(range(5))


def test_a_signal_stops_both_after_the_step(tmp_path: Path, program: Any) -> None:
    process = torchrun(program, "train", "--max-steps", "200", "--output", "run", *SMALL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/step-000001").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, talk = process.communicate(timeout=120)
    assert "everything is saved" in talk and "continue with `grpoforge train --resume run`" in talk
    newest = checkpoint.published(tmp_path / "run/checkpoints")[-1]
    checkpoint.verify(newest)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == checkpoint.step_of(newest)


def test_a_preference_model_learns_from_the_pairs_of_both(tmp_path: Path, program: Any, rewards_file: Path) -> None:
    preference = "{name: preference, batch_size: 2, min_pairs: 2, min_accuracy: 0, preference_threshold: 0.001}"
    rewards = f"rewards=[{{name: '{rewards_file}:digits'}}, {preference}]"
    flags = ("--set", rewards, "--set", "eval.reward=digits", "--set", "kl.beta=0")
    process = torchrun(program, "train", "--max-steps", "6", "--output", "run", *SMALL, *flags)
    _, talk = process.communicate(timeout=240)
    assert process.returncode == 0, talk
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    # Each process has one prompt, and so one pair at most.
    assert max(line["pref/pairs"] for line in steps) == 2.0
    assert steps[-1]["pref/buffer"] == sum(line["pref/pairs"] for line in steps)
    assert steps[-1]["rewards/preference/unscored"] < 1.0
