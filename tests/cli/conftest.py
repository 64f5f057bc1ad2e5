"""The command line in this process, in an empty folder: what it says, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from grpoforge.cli.main import main
from grpoforge_plugins.tiny_math import MODEL_DIR

SMALL = (
    *("--max-steps", "2"),
    *("--set", "data.num_eval=2"),
    *("--set", "batch={prompts_per_step: 2, completions_per_prompt: 2, minibatch_size: 4, micro_batch_size: 4}"),
    *("--set", "sampler.max_completion_length=4"),
    *("--set", "trackers=[{name: jsonl}]"),
)


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it said."""

    code: Any
    out: str
    err: str


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs ``grpoforge ARGUMENTS`` in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Said:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        return Said(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def small() -> Sequence[str]:
    """Flags for a run of two steps that takes a second."""
    return SMALL


@pytest.fixture
def refused(cli: Callable[..., Said], tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Runs a command that must end as a user's mistake; returns the message and the hint.

    Exit code 2, nothing on stdout, no traceback, no run left behind.
    """

    def run(*arguments: str) -> tuple[str, str]:
        said = cli(*arguments)
        assert said.code == 2, said.err
        assert said.out == ""
        assert "Traceback" not in said.err
        assert list(tmp_path.glob("runs/*")) == []
        _, _, text = said.err.partition("error: ")
        message, _, hint = text.rstrip("\n").partition("\nhint: ")
        return message, hint

    return run


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a ``.jsonl`` file and names it."""

    def write(*rows: Mapping[str, Any] | bytes, name: str = "train.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines))
        return name

    return write


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    """Copies the embedded model to a folder, without ``left_out``, with keys of its JSON files changed."""

    def copy(name: str, *left_out: str, **changes: Mapping[str, Any]) -> str:
        folder = tmp_path / name
        shutil.copytree(MODEL_DIR, folder)
        for file in left_out:
            (folder / file).unlink()
        for file, values in changes.items():
            path = folder / f"{file}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | dict(values)))
        return f"./{name}"

    return copy
