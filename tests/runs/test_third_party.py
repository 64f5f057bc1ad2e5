"""A plugin by somebody else: as a file, and installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from grpoforge.cli.main import main

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples/plugins/grpoforge-politeness"

# Not an index and not a build in isolation: hatchling is there already.
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")


def rewards_of(run: Path) -> list[float]:
    """What `politeness` gave each completion of the first step, and 0 or 1 by reading the completion."""
    rows = parquet.read_table(run / "rollouts/step-000001.parquet").to_pylist()
    given = [row["politeness/raw"] for row in rows]
    assert given == [float("answer" in row["completion"].lower()) for row in rows]
    return given


def test_as_a_local_file_through_the_command_line(
    tmp_path: Path, values: dict[str, Any], program: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = PACKAGE / "grpoforge_politeness.py"
    run = tmp_path / "run"
    main_without_exit(
        "train", "--plugin", str(plugin), "--reward", "politeness:0.5", "--dataset", values["data"]["dataset"],
        "--set", "rewards.politeness.word=answer", "--set", "data.num_eval=4", "--set", "batch.prompts_per_step=2",
        "--set", "batch.minibatch_size=16", "--set", "batch.micro_batch_size=16",
        "--set", "eval.reward=null", "--set", "sampler.max_completion_length=16",
        "--max-steps", "1", "--output", str(run),
    )  # fmt: skip
    assert len(rewards_of(run)) == 16
    described = json.loads((run / "run.json").read_text())
    (local,) = [one for one in described["plugins"] if one["name"] == "grpoforge_politeness"]
    assert len(local["sha256"]) == 64 and local["hooks"] == ["register_rewards"]
    # One reward is named by a flag: no other is left, though the recipe has two.
    assert [reward["name"] for reward in described["config"]["rewards"]] == ["politeness"]
    assert str(run) in capsys.readouterr().out


def main_without_exit(*arguments: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0


@pytest.mark.slow
def test_installed_as_a_package(tmp_path: Path, program: Any) -> None:
    site = tmp_path / "site"
    subprocess.run([*PIP, "--target", site, PACKAGE], check=True)
    listing = program.popen("plugins", "list", "--json", PYTHONPATH=str(site))
    shown, talk = listing.communicate()
    assert listing.returncode == 0, talk
    assert "grpoforge-politeness" in shown and "politeness" in shown
    changes = [{"rewards": [{"name": "grpoforge-politeness:politeness", "word": "answer"}], "max_steps": 1}]
    process = program.start(changes=changes, PYTHONPATH=str(site))
    _, talk = process.communicate()
    assert process.returncode == 0, talk
    assert len(rewards_of(tmp_path / "run")) == 6
    described = json.loads((tmp_path / "run/run.json").read_text())
    (installed,) = [one for one in described["plugins"] if one["name"] == "grpoforge-politeness"]
    assert installed["version"] == "0.1.0" and installed["sha256"] is None
