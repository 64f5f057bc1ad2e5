"""A run that was stopped, killed or damaged goes on as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpoforge import checkpoint
from grpoforge.config import Config
from grpoforge.errors import CheckpointError, ConfigError, Interrupted, ModelError
from grpoforge.launch import find_run, read_run_config, resume, start
from grpoforge.layers import build
from grpoforge.measure import measure
from grpoforge.run_dir import RunDir
from grpoforge_plugins.tiny_math import MODEL_DIR


def resumed(run: Path, *changes: dict[str, Any], checkpoint: Path | None = None) -> Any:
    """What `grpoforge train --resume RUN` does."""
    run_dir = RunDir.open(run)
    config = build([("run.json", read_run_config(run_dir)), *(("change", one) for one in changes)])
    return resume(config, run_dir, checkpoint)


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.published(run / "checkpoints")]


def damage(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, config: Callable[..., Config]) -> Path:
    run = tmp_path_factory.mktemp("once") / "run"
    start(config(), run)
    return run


@pytest.fixture
def whole(tmp_path: Path, once: Path) -> Path:
    """The run of six steps, uninterrupted; a copy to do as one likes with."""
    return Path(shutil.copytree(once, tmp_path / "whole", symlinks=True))


def copy_of(whole: Path, last: int, name: str = "copy") -> Path:
    """The run as it was after step `last`, when nothing came after."""
    run = whole.with_name(name)
    shutil.copytree(whole, run, symlinks=True)
    for folder in checkpoint.published(run / "checkpoints"):
        if checkpoint.step_of(folder) > last:
            shutil.rmtree(folder)
    return run


def test_interrupted_after_any_step_it_ends_as_if_it_had_not_been(
    tmp_path: Path, config: Callable[..., Config], whole: Path, outcome: Any, stop_after: Any
) -> None:
    expected = outcome(whole)
    first, last = ((whole / f"checkpoints/step-00000{step}/model.safetensors").read_bytes() for step in (1, 6))
    assert first != last, "a run that learns nothing would prove nothing"
    for step in range(1, 6):
        run = tmp_path / f"stopped-{step}"
        with pytest.raises(Interrupted) as stopped:
            start(config(stop_after(step)), run)
        assert stopped.value.message == f"stopped after step {step} of 6; everything is saved"
        assert stopped.value.hint == f"continue with `grpoforge train --resume {run}`"
        assert steps(run) == list(range(1, step + 1))
        resumed(run)
        assert outcome(run) == expected, f"stopped after step {step}"


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"model": {"lora": {"r": 4, "alpha": 8}}, "kl": {"beta": 0.1}},
    "kl to a frozen copy": {"kl": {"beta": 0.1}},
    "linear schedule": {"optim": {"schedule": "linear", "warmup_steps": 3}},
    "pairs, baselines by temperature, a common target": {
        "batch": {"completions_per_prompt": 4, "minibatch_size": 4},
        "sampler": {"name": "paired", "num_sample_pairs": 4},
        "advantage": {"name": "paired", "preference_threshold": 0.0, "baseline_decay": 0.5},
        "corrections": [{"name": "target_tis"}],
        "eval": {"samples": 2},
    },
    "tokens drawn by top-p, sampled evaluation": {"sampler": {"top_p": 0.9}, "eval": {"samples": 2}},
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_it_ends_the_same_with(
    tmp_path: Path, config: Callable[..., Config], outcome: Any, stop_after: Any, change: dict[str, Any]
) -> None:
    start(config(change, {"max_steps": 4}), tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(config(change, {"max_steps": 4}, stop_after(2)), tmp_path / "stopped")
    resumed(tmp_path / "stopped")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


EVERYTHING: dict[str, Any] = {
    "rewards": [{"name": "math"}],
    "sampler": {"max_completion_length": 48},
    "advantage": {"name": "reinforce_pp"},
    "loss": {"name": "gspo_token"},
    "kl": {"name": "k1", "beta": 0.4, "placement": "reward", "target": 0.001, "horizon": 20},
    "corrections": [{"name": "sequence_mask", "high": 1.5}, {"name": "opsm"}],
    "entropy": {"coef": 0.01, "target": 9.0, "delta": 0.002},
    "batch": {"dynamic_sampling": 2, "mask_truncated_completions": True, "top_entropy_quantile": 0.7},
    "optim": {"learning_rate": 0.001},
    "max_steps": 4,
}


@pytest.mark.slow
def test_a_killed_run_with_everything_that_is_steered_ends_the_same(
    tmp_path: Path, config: Callable[..., Config], outcome: Any, program: Any, stop_after: Any
) -> None:
    start(config(EVERYTHING), tmp_path / "whole")
    process = program.start(changes=[EVERYTHING, stop_after(3, "SIGKILL")])
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # Killed after its third step and before that was saved.
    assert steps(tmp_path / "run") == [1, 2]
    saved = json.loads((tmp_path / "run/checkpoints/step-000002/trainer_state.json").read_text())["components"]
    lines = {line["step"]: line for line in outcome(tmp_path / "whole").metrics if line["kind"] == "train"}
    assert saved["coefficient beta"]["value"] == lines[3]["coefficient/beta"] != lines[1]["coefficient/beta"]
    assert saved["coefficient entropy"]["value"] == lines[3]["coefficient/entropy_coef"] == 0.014
    assert max(lines[step]["dynamic_sampling/draws"] for step in (3, 4)) > 1, "extra draws after the checkpoint"
    resumed(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_reward_with_a_memory_and_dice_goes_on_where_it_was(
    tmp_path: Path, config: Callable[..., Config], outcome: Any, stop_after: Any, rewards_file: Path
) -> None:
    drifting = {"rewards": [{"name": f"{rewards_file}:Drifting", "rate": 0.25}], "max_steps": 4}
    start(config(drifting), tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(config(drifting, stop_after(2)), tmp_path / "stopped")
    saved = json.loads((tmp_path / "stopped/checkpoints/step-000002/trainer_state.json").read_text())
    # Two steps; before training and after step 2, evaluation asked its own.
    assert saved["components"] == {
        "reward Drifting": {"num_calls": 2},
        "evaluation reward Drifting": {"num_calls": 2},
    }
    resumed(tmp_path / "stopped")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_killed_run_goes_on_from_its_newest_checkpoint(
    tmp_path: Path, config: Callable[..., Config], outcome: Any, program: Any, stop_after: Any
) -> None:
    every_two = {"checkpoint": {"every": 2, "keep_last": 10}}
    start(config(every_two), tmp_path / "whole")
    process = program.start(changes=[every_two, stop_after(5, "SIGKILL")])
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert steps(tmp_path / "run") == [2, 4]
    resumed(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    tmp_path: Path, whole: Path, outcome: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(whole, last=0)
    (run / "checkpoints/best").unlink()
    (run / "checkpoints/.tmp-step-000001-999999999").mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "ki')
    with caplog.at_level(logging.WARNING, "grpoforge"):
        resumed(run)
    assert f"{run} has no checkpoint: starting over" in caplog.messages
    assert outcome(run) == outcome(whole)
    assert not (run / "checkpoints/.tmp-step-000001-999999999").exists()


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    whole: Path, outcome: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(whole, last=4)
    damage(run / "checkpoints/step-000004")
    with caplog.at_level(logging.INFO, "grpoforge"):
        resumed(run, {"checkpoint": {"keep_last": 1}})
    assert (
        "checkpoint step-000004 is damaged (model.safetensors: sha256 mismatch); resuming from step-000003"
        in caplog.messages
    )
    assert "step-000004 is later than the step resumed from: it is now aside-step-000004" in caplog.messages
    assert f"resuming {run} after step 3 of 6" in caplog.messages
    assert outcome(run) == outcome(whole)


def test_when_every_checkpoint_is_damaged_nothing_is_repeated_or_changed(whole: Path) -> None:
    run = copy_of(whole, last=2)
    for number in (1, 2):
        damage(run / f"checkpoints/step-{number:06d}")
    before = contents(run)
    with pytest.raises(CheckpointError) as error:
        resumed(run)
    assert error.value.message == f"no checkpoint of {run} is intact"
    assert error.value.hint == "restore one from a copy, or start a new run; nothing was changed"
    assert contents(run) == before


def test_what_was_asked_of_a_finished_run_is_not_recorded(whole: Path) -> None:
    before = (whole / "run.json").read_bytes()
    resumed(whole, {"eval": {"every": 2}})
    assert (whole / "run.json").read_bytes() == before


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error_and_changes_nothing(whole: Path) -> None:
    damage(whole / "checkpoints/step-000003")
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    run_dir, folder = find_run(str(whole / "checkpoints/step-000003"))
    with pytest.raises(CheckpointError) as error:
        resumed(run_dir.path, checkpoint=folder)
    assert error.value.message == "checkpoint step-000003 is damaged (model.safetensors: sha256 mismatch)"
    assert error.value.hint == "resume from an earlier checkpoint, or restore this one from a copy"
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"} == before


def test_going_back_to_an_earlier_checkpoint_keeps_the_later_ones_aside(whole: Path, outcome: Any) -> None:
    expected = outcome(whole)
    run_dir, folder = find_run(str(whole / "checkpoints/step-000002"))
    # With one checkpoint kept, stale step-000006 would have pushed out each new one.
    resumed(run_dir.path, {"checkpoint": {"keep_last": 1}, "eval": {"every": 0}}, checkpoint=folder)
    kept = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert [name for name in kept if name.startswith("aside")] == [f"aside-step-00000{n}" for n in (3, 4, 5, 6)]
    assert steps(whole)[-1] == 6
    assert outcome(whole).weights == expected.weights
    assert [line["step"] for line in outcome(whole).metrics] == [0, 1, 2, 2, 3, 4, 5, 6, 6]


def test_more_steps_with_a_constant_rate_are_the_longer_run_and_are_remembered(
    tmp_path: Path, config: Callable[..., Config], outcome: Any, caplog: pytest.LogCaptureFixture
) -> None:
    constant = {"optim": {"schedule": "constant"}}
    start(config(constant, {"max_steps": 4}), tmp_path / "four")
    run = tmp_path / "two"
    start(config(constant, {"max_steps": 2}), run)
    assert resumed(run, {"max_steps": 4}).step == 4 and steps(run) == [1, 2, 3, 4]
    assert outcome(run) == outcome(tmp_path / "four")
    with caplog.at_level(logging.INFO, "grpoforge"):
        assert resumed(run).step == 4
    assert f"{run} has finished (step 4 of 4); `--max-steps N` trains on" in caplog.messages
    assert read_run_config(RunDir.open(run))["max_steps"] == 4


def test_settings_given_when_resuming_are_used(whole: Path, outcome: Any) -> None:
    run = copy_of(whole, last=4)
    resumed(run, {"optim": {"learning_rate": 0.25, "schedule": "constant", "warmup_steps": 0}})
    rates = [line["learning_rate"] for line in outcome(run).metrics if line["kind"] == "train"]
    assert rates[4:] == [0.25, 0.25]


def test_a_finished_run_is_left_as_it_is(
    whole: Path, config: Callable[..., Config], outcome: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != ".lock"}
    with caplog.at_level(logging.INFO, "grpoforge"):
        summary = resumed(whole)
    assert f"{whole} has finished (step 6 of 6); `--max-steps N` trains on" in caplog.messages
    assert summary.step == 6 and set(summary.metrics_before) == set(summary.metrics_after)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file() and path.name != ".lock"} == before


@pytest.mark.parametrize("direction", ["max", "min"])
def test_the_best_is_chosen_by_metric_and_direction_and_is_never_pruned(
    tmp_path: Path, config: Callable[..., Config], direction: str, outcome: Any
) -> None:
    run = tmp_path / "run"
    by_length = {
        "eval": {"every": 1, "metric": "eval_reward", "direction": direction},
        "checkpoint": {"every": 1, "keep_last": 1},
        "optim": {"learning_rate": 0.05},
    }
    start(config(by_length), run)
    values = {line["step"]: line["eval_reward"] for line in outcome(run).metrics if line["kind"] == "eval"}
    del values[0]
    pick = max if direction == "max" else min
    best = min(step for step, value in values.items() if value == pick(values.values()))
    assert checkpoint.best(run / "checkpoints") == run / f"checkpoints/step-{best:06d}"
    assert steps(run) == sorted({best, 6})


def test_a_metric_that_evaluation_does_not_have_is_refused(tmp_path: Path, config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError) as error:
        start(config({"eval": {"every": 0, "metric": "eval_pas@1"}}), tmp_path / "run")
    assert error.value.message.startswith(
        "`eval.metric` is `eval_pas@1`, which evaluation does not report; it has: eval_completions/"
    )
    assert error.value.hint == "did you mean `eval_pass@1`?"
    assert not (tmp_path / "run").exists(), "refused before the first step"


def test_latest_is_the_run_that_was_written_to_last(tmp_path: Path) -> None:
    for number, name in enumerate(("older", "newer")):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("run.json", "metrics.jsonl"):
            (folder / file).write_text("{}")
            os.utime(folder / file, (1000 + number, 1000 + number))
        os.utime(folder, (1000 + number, 1000 + number))
    assert find_run("latest", tmp_path)[0].path.name == "newer"
    os.utime(tmp_path / "older/metrics.jsonl", (2000, 2000))
    assert find_run("latest", tmp_path)[0].path.name == "older"


def test_what_there_is_to_resume_is_said(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no run in .*/nothing/ to resume"):
        find_run("latest", tmp_path / "nothing")
    run_dir, folder = find_run(str(whole / "checkpoints/best"))
    assert run_dir.path == whole and folder == checkpoint.best(whole / "checkpoints")
    (whole / "checkpoints/best").unlink()
    with pytest.raises(CheckpointError) as error:
        find_run(str(whole / "checkpoints/best"))
    assert error.value.message == f"{whole} has no best checkpoint"
    assert error.value.hint == f"resume its newest: `--resume {whole}`"
    with pytest.raises(CheckpointError, match="step-000009 does not exist"):
        resumed(whole, checkpoint=whole / "checkpoints/step-000009")


def test_a_checkpoint_of_another_component_is_refused(
    tmp_path: Path, config: Callable[..., Config], rewards_file: Path
) -> None:
    run = tmp_path / "drifting"
    start(config({"rewards": [{"name": f"{rewards_file}:Drifting"}], "max_steps": 1}), run)
    with pytest.raises(CheckpointError) as error:
        resumed(run, {"rewards": [{"name": f"{rewards_file}:digits"}]})
    assert error.value.message == "checkpoint step-000001 has state for `reward Drifting`, which this run does not use"
    assert error.value.hint == "resume with the components that the run was started with"


def test_a_run_can_be_resumed_from_another_folder(
    tmp_path: Path, config: Callable[..., Config], problems: Path, stop_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(problems.parent)
    relative = {"data": {"dataset": problems.name}, "max_steps": 2}
    with pytest.raises(Interrupted):
        start(config(relative, stop_after(1)), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resumed(tmp_path / "run").step == 2


def test_a_plugin_file_that_changed_is_mentioned(
    tmp_path: Path, config: Callable[..., Config], stop_after: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Interrupted):
        start(config({"max_steps": 2}, stop_after(1)), tmp_path / "run")
    plugin = tmp_path / "stop_after_1.py"
    plugin.write_text(plugin.read_text() + "\n# changed\n")
    with caplog.at_level(logging.WARNING, "grpoforge"):
        resumed(tmp_path / "run")
    assert any(
        message.startswith("plugin `stop_after_1` (") and message.endswith("changed since the run began")
        for message in caplog.messages
    )


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "`seed` was `0` when the run began and is `7` now"),
        (
            {"model": {"name": "other/model"}},
            '`model.name` was `"tiny-math"` when the run began and is `"other/model"`',
        ),
        ({"model": {"lora": {"r": 4}}}, '`model.lora` was `null` when the run began and is `{"r": 4, "alpha": 32, '),
    ],
)
def test_another_model_or_seed_is_refused_and_nothing_is_touched(
    whole: Path, change: dict[str, Any], message: str
) -> None:
    before = contents(whole)
    with pytest.raises(ConfigError) as error:
        resumed(whole, change, checkpoint=whole / "checkpoints/step-000002")
    assert error.value.message.startswith(message)
    assert error.value.hint == "start a new run for it; a resumed run keeps its model and its seed"
    assert contents(whole) == before


def test_what_changes_the_rest_of_the_run_is_warned_of(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {
        "batch": {"epochs": 1},
        "kl": {"beta": 0.5},
        "eval": {"every": 0},
        "model": {"gradient_checkpointing": True},
    }
    with caplog.at_level(logging.WARNING, "grpoforge"):
        resumed(copy_of(whole, last=5), changes)
    assert caplog.messages == [
        "`kl.beta` was `0.0` and is `0.5` from here on",
        "`batch.epochs` was `2` and is `1` from here on",
    ]


def test_start_weights_that_changed_are_refused_and_nothing_is_touched(
    tmp_path: Path, config: Callable[..., Config], whole: Path
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(whole / "checkpoints/step-000001", model)
    start(config({"model": {"name": str(model)}, "max_steps": 2}), run)
    assert resumed(run, {"max_steps": 3}).step == 3
    shutil.copy(whole / "checkpoints/step-000006/model.safetensors", model)
    before = contents(run)
    with pytest.raises(ModelError) as error:
        resumed(run, {"max_steps": 4}, checkpoint=run / "checkpoints/step-000001")
    assert error.value.message == (
        f"the model folder {model} changed since the run began: `model.safetensors` is not what it was"
    )
    assert error.value.hint == "put the old weights back, or start a new run from the new ones"
    assert contents(run) == before


def test_the_weights_of_an_embedded_model_are_recorded(whole: Path) -> None:
    recorded = json.loads((whole / "run.json").read_text())["weights"]
    assert recorded == {"model.safetensors": hashlib.sha256((MODEL_DIR / "model.safetensors").read_bytes()).hexdigest()}


def test_an_adapter_without_its_model_is_evaluated_but_not_trained(
    tmp_path: Path, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    shutil.copytree(whole / "checkpoints/step-000001", tmp_path / "mdl")
    monkeypatch.chdir(tmp_path)
    start(config({"model": {"name": "./mdl", "lora": {"r": 2}}, "max_steps": 1}), tmp_path / "run")
    adapter = tmp_path / "run/checkpoints/step-000001"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert 0 <= measure(config({"model": {"name": str(adapter)}})).metrics["eval_reward"] <= 1
    with pytest.raises(ModelError) as error:
        start(config({"model": {"name": str(adapter)}}), tmp_path / "second")
    assert error.value.message == f"the model {adapter} has no trainable parameters"
    assert error.value.hint == (
        "if it is an adapter: name its base model and set `model.lora`, merge it into its base model, or go on with "
        "its run by `--resume`"
    )
    with pytest.raises(ModelError) as error:
        start(config({"model": {"name": str(adapter), "lora": {"r": 2}}}), tmp_path / "third")
    assert error.value.message == (
        f"the model {adapter} is an adapter already: `model.lora` would put a second one on it"
    )
    assert error.value.hint == "name its base model, or merge the adapter into it"
    assert not (tmp_path / "second").exists() and not (tmp_path / "third").exists()
