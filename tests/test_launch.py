"""From a configuration to a run directory, and what is left when it fails."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grpoforge import __version__, checkpoint
from grpoforge.config import Config
from grpoforge.errors import CheckpointError, RewardError, RunFailed
from grpoforge.fused import FusedObjective
from grpoforge.launch import describe_run, load_host, pin_paths, read_run_config, start, wind_back
from grpoforge.layers import build
from grpoforge.objective import Objective
from grpoforge.run_dir import RunDir
from grpoforge.trainer import Trainer
from grpoforge.yaml_source import read_recipe
from grpoforge_kernels import certify, dispatch

SMALL: dict[str, Any] = {
    "data": {"num_eval": 2},
    "batch": {"prompts_per_step": 1, "completions_per_prompt": 2, "minibatch_size": 2, "micro_batch_size": 2},
    "sampler": {"max_completion_length": 8},
    "eval": {"every": 0, "reward": None, "metric": "eval_reward"},
    "max_steps": 1,
    "trackers": [{"name": "jsonl"}],
}


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A file with rewards that fail at a call, and a hook that fails."""
    path = tmp_path / "faulty.py"
    path.write_text(
        "num_calls = 0\n\n\n"
        "def at_first(completions):\n    raise KeyError('no such thing')\n\n\n"
        "def at_second(completions):\n    global num_calls\n    num_calls += 1\n"
        "    return [0.0] * len(completions) if num_calls == 1 else [1 / 0]\n\n\n"
        "def never(completions):\n    return [float(len(text)) for text in completions]\n"
    )
    return path


def small(*changes: dict[str, Any]) -> Config:
    return build([("recipe", read_recipe("tiny-math")), ("small", SMALL), *(("change", one) for one in changes)])


@pytest.mark.parametrize("reward", ["at_first", "at_second"])
@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_fails_before_its_first_step_leaves_nothing(
    tmp_path: Path, plugin: Path, reward: str, existed: bool
) -> None:
    run = tmp_path / "runs/one"
    if existed:
        run.mkdir(parents=True)
    with pytest.raises(RewardError):
        start(small({"rewards": [{"name": f"{plugin}:{reward}"}]}), run)
    assert run.exists() == existed
    assert not existed or list(run.iterdir()) == []


def test_a_run_that_fails_later_stays(tmp_path: Path, plugin: Path) -> None:
    hook = tmp_path / "hooked.py"
    hook.write_text(
        "from grpoforge import hookimpl\n\n\n@hookimpl\ndef step_finished(report):\n    raise LookupError('lost')\n"
    )
    run = tmp_path / "run"
    with pytest.raises(RunFailed) as error:
        start(small({"rewards": [{"name": f"{plugin}:never"}], "plugins": [str(hook)]}), run)
    assert error.value.message == (f"plugin `hooked`, hook `step_finished`, failed: LookupError: lost at {hook}:6")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [(0, "eval"), (1, "train")]


def test_hooks_are_told_once_and_in_order(tmp_path: Path, plugin: Path) -> None:
    hook = tmp_path / "told.py"
    hook.write_text(
        "from pathlib import Path\nfrom grpoforge import hookimpl\n\nlog = Path(__file__).with_suffix('.txt')\n\n\n"
        "def write(text):\n    with log.open('a') as file:\n        file.write(text + '\\n')\n\n\n"
        "@hookimpl\ndef step_finished(report):\n    write(f'step {report.step}')\n\n\n"
        "@hookimpl\ndef run_finished(summary):\n    write(f'run {summary.step} {Path(summary.run_dir).name}')\n"
    )
    rewards = {"rewards": [{"name": f"{plugin}:never"}], "plugins": [str(hook)], "max_steps": 2}
    start(small(rewards), tmp_path / "run")
    assert (tmp_path / "told.txt").read_text() == "step 1\nstep 2\nrun 2 run\n"


class Stopped(Exception):
    """A run that was only to begin."""


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Starts a run up to its first step; returns what ``look`` finds on its trainer."""

    def begin(config: Config, look: Callable[[Trainer], Any]) -> Any:
        found = []

        def run(trainer: Trainer) -> None:
            found.append(look(trainer))
            raise Stopped

        monkeypatch.setattr(Trainer, "run", run)
        with pytest.raises(Stopped):
            start(config, tmp_path / "begun")
        (one,) = found
        return one

    return begin


def test_kernels_are_tried_before_the_first_step(
    begun: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(backend: str, device: str) -> certify.Failure:
        return certify.Failure(certify.identity(backend, device), f"tried {backend} on {device}")

    monkeypatch.setattr(certify, "folder", lambda: tmp_path / "certificates")
    monkeypatch.setattr(certify, "available", lambda device: ["cpp"])
    monkeypatch.setattr(certify, "certify", fail)
    op, cpu = "selective_log_softmax", torch.device("cpu")
    dispatch.forget()
    try:
        why, used = begun(
            small(),
            lambda _: (
                dispatch.obstacle("cpp", op, "cpu", torch.float32),
                dispatch.backend_name(op, cpu, torch.float32),
            ),
        )
    finally:
        dispatch.forget()
    assert why is not None and why.startswith("they are wrong on this machine (tried cpp on cpu);")
    assert used == "reference"


@pytest.mark.parametrize(("loss", "expected"), [("clip", FusedObjective), ("cispo", Objective)])
def test_the_engine_gets_what_the_plan_says(begun: Callable[..., Any], loss: str, expected: type) -> None:
    objective = begun(small({"loss": {"name": loss}}), lambda trainer: trainer.engine.algorithm.objective)
    assert type(objective) is expected


def test_what_run_json_says(plugin: Path) -> None:
    config = small({"rewards": [{"name": f"{plugin}:never"}], "plugins": [], "seed": 7})
    host = load_host(config)
    host.add_function(plugin, "never")
    described = describe_run(config, host, {"model.safetensors": "00ff"})
    assert described["weights"] == {"model.safetensors": "00ff"}
    assert described["schema"] == 1 and described["grpoforge"] == __version__ and described["seed"] == 7
    assert described["config"]["rewards"] == [{"name": f"{plugin}:never", "weight": None, "gate": "default"}]
    assert described["packages"]["torch"] and described["python"] and described["threads"] >= 1
    by_name = {one["name"]: one for one in described["plugins"]}
    assert by_name["grpoforge"]["version"] and by_name["grpoforge"]["sha256"] is None
    assert by_name["faulty"]["sha256"] == hashlib.sha256(plugin.read_bytes()).hexdigest()
    # It is read back as the configuration that it was.
    assert build([("run.json", described["config"])]).model_dump() == config.model_dump()


def test_paths_in_run_json_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    pinned = pin_paths(
        small({"model": {"name": "models/one"}, "data": {"dataset": "train.jsonl", "eval_dataset": "./test.parquet"}})
    )
    assert pinned.model.name == f"{tmp_path}/models/one"
    assert pinned.data.dataset == f"{tmp_path}/train.jsonl" and pinned.data.eval_dataset == f"{tmp_path}/test.parquet"
    names = pin_paths(small({"model": {"name": "Qwen/Qwen2.5-3B-Instruct"}, "data": {"dataset": "openai/gsm8k"}}))
    assert (names.model.name, names.data.dataset) == ("Qwen/Qwen2.5-3B-Instruct", "openai/gsm8k")
    assert names.model.revision is None
    assert pin_paths(small()).data.dataset == "tiny-math" and pin_paths(small()).model.name == "tiny-math"


def test_a_model_of_the_hub_is_pinned_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--one--model"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert pin_paths(small({"model": {"name": "one/model"}})).model.revision == commit
    assert pin_paths(small({"model": {"name": "one/model", "revision": commit}})).model.revision == commit
    assert pin_paths(small({"model": {"name": "one/model", "revision": "next"}})).model.revision == "next"


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}'])
def test_a_damaged_run_json_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        read_run_config(RunDir.open(tmp_path))
    assert error.value.message.startswith(f"{tmp_path}/run.json is damaged: ")
    assert error.value.hint == "start a new run from the recipe it was started with"


def write_weights(folder: Path) -> None:
    (folder / "weights").write_text("x")


def recorded(tmp_path: Path) -> RunDir:
    """A run of three steps with a checkpoint of each."""
    run_dir = RunDir(tmp_path)
    run_dir.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in (0, 1, 2, 3)))
    run_dir.tensorboard.mkdir()
    for step in (1, 2, 3):
        checkpoint.publish(run_dir.checkpoints, step, write_weights)
    return run_dir


def test_winding_back_keeps_later_checkpoints_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = recorded(tmp_path)
    (run_dir.checkpoints / "aside-step-000003").mkdir()
    with caplog.at_level(logging.WARNING, "grpoforge"):
        wind_back(run_dir, run_dir.checkpoints / "step-000001")
    assert run_dir.metrics.read_text() == '{"step": 0}\n{"step": 1}\n'
    names = sorted(path.name for path in run_dir.checkpoints.iterdir())
    assert names == ["aside-step-000002", "aside-step-000003", "step-000001"]
    assert (run_dir.checkpoints / "aside-step-000003/weights").read_text() == "x"
    assert caplog.messages == [
        f"step-00000{step} is later than the step resumed from: it is now aside-step-00000{step}" for step in (2, 3)
    ]


def test_winding_back_to_nothing_forgets_the_first_evaluation_too(tmp_path: Path) -> None:
    run_dir = recorded(tmp_path)
    wind_back(run_dir, None)
    assert run_dir.metrics.read_text() == ""
    assert not run_dir.tensorboard.exists()
    assert checkpoint.published(run_dir.checkpoints) == []


def test_the_folder_of_a_rewards_model_is_pinned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    rewards = [{"name": "math"}, {"name": "preference", "model": "encoder"}, {"name": "reward_model", "model": "a/hub"}]
    pinned = pin_paths(small({"rewards": rewards})).rewards
    assert [part.options.get("model") for part in pinned] == [None, str(tmp_path / "encoder"), "a/hub"]
