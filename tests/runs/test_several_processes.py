"""The same command under torchrun: one run directory, one voice, and a signal that stops every process."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

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
    process = torchrun(program, "train", "--max-steps", "3", "--output", "run", *SMALL, *flags)
    _, talk = process.communicate(timeout=240)
    assert process.returncode == 0, talk
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    # Each process has one prompt, and so one pair at most.
    assert max(line["pref/pairs"] for line in steps) == 2.0
    assert steps[-1]["pref/buffer"] == sum(line["pref/pairs"] for line in steps)
    assert steps[-1]["rewards/preference/unscored"] < 1.0
