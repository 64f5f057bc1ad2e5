"""Checkpoints are published whole, found, pruned and marked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grpoforge.checkpoint import MANIFEST, best, mark_best, newest, prune, publish, published, step_of, verify
from grpoforge.errors import CheckpointError

FILES = ["model.safetensors", "tokenizer/vocab.json", "trainer_state.json", "empty.txt", MANIFEST]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing for real takes most of the time and shows nothing unless the power fails."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def writer(text: str) -> Callable[[Path], None]:
    """A `write` that leaves four files, all but one depending on `text`."""

    def write(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        (folder / "model.safetensors").write_bytes(f"weights of {text} ".encode() * 20)
        (folder / "tokenizer/vocab.json").write_text(f"vocabulary of {text}")
        (folder / "trainer_state.json").write_text(f"state of {text}")
        (folder / "empty.txt").write_text("")

    return write


def text_of(folder: Path) -> str:
    return (folder / "trainer_state.json").read_text().removeprefix("state of ")


def leftovers(checkpoints: Path) -> list[str]:
    return sorted(name for name in os.listdir(checkpoints) if name.startswith("."))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    publish(tmp_path, 100, writer("a"))
    publish(tmp_path, 123, writer("b"))
    return tmp_path


# Publishing


def test_publish_writes_files_and_a_manifest_with_bytes_and_sha256(tmp_path: Path) -> None:
    folder = publish(tmp_path / "checkpoints", 123, writer("a"))
    assert folder == tmp_path / "checkpoints/step-000123"
    assert leftovers(folder.parent) == []
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["schema"] == 1 and manifest["step"] == 123
    assert sorted(manifest["files"]) == sorted(set(FILES) - {MANIFEST})
    # sha256 of no bytes at all, as sha256sum prints it
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert manifest["files"]["empty.txt"] == {"bytes": 0, "sha256": empty}
    verify(folder)


def test_everything_is_synced_before_the_rename_and_the_manifest_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    temp = f".tmp-step-000007-{os.getpid()}"

    def record(event: str) -> None:
        events.append(event.removeprefix(f"{tmp_path}/"))

    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda number: record(os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(os, "rename", lambda old, new: (record("rename"), rename(old, new)))
    publish(tmp_path / "checkpoints", 7, writer("a"))
    inside = f"checkpoints/{temp}/"
    assert events == [
        *(inside + name for name in sorted(FILES) if name != MANIFEST),
        inside + MANIFEST,
        inside + "tokenizer",
        f"checkpoints/{temp}",
        "rename",
        "checkpoints",
        str(tmp_path),
    ]


def test_publish_replaces_the_same_step(tmp_path: Path) -> None:
    publish(tmp_path, 5, writer("first"))
    folder = publish(tmp_path, 5, writer("second"))
    verify(folder)
    assert text_of(folder) == "second" and sorted(os.listdir(tmp_path)) == ["step-000005"]


def test_files_get_the_permissions_of_the_folder(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1, lambda temp: save_file({"x": torch.ones(2)}, temp / "m.safetensors"))
    assert (folder / "m.safetensors").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666


def test_publish_refuses_a_link(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"could not be written: model: symbolic link \("):
        publish(tmp_path, 1, lambda temp: os.symlink("/etc/hostname", temp / "model"))
    assert os.listdir(tmp_path) == []


def test_failing_write_leaves_nothing_and_is_attributed(tmp_path: Path) -> None:
    earlier = publish(tmp_path, 100, writer("earlier"))

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise TypeError("state['lr'] is a numpy.float64")

    with pytest.raises(CheckpointError) as caught:
        publish(tmp_path, 200, write)
    assert re.fullmatch(
        rf"checkpoint {tmp_path}/step-000200 could not be written: "
        r"TypeError: state\['lr'\] is a numpy.float64 "
        r"\(about [0-9.e+]+ (bytes|kB) needed, [0-9.e+]+ (kB|MB|GB|TB) free\)",
        caught.value.message,
    )
    assert caught.value.hint == "earlier checkpoints are untouched"
    assert isinstance(caught.value.__cause__, TypeError)
    assert os.listdir(tmp_path) == ["step-000100"]
    verify(earlier)


def test_interrupt_cleans_up_and_is_raised_again(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 1, write)
    assert os.listdir(tmp_path) == []


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".tmp-step-000007-{dead.pid}").mkdir()
    (tmp_path / f".tmp-step-000007-{dead.pid}/model").write_text("half")
    os.symlink("step-000001", tmp_path / f".tmp-best-{dead.pid}")
    (tmp_path / f".tmp-step-000007-{os.getppid()}").mkdir()
    (tmp_path / ".tmp-of-someone-else").mkdir()
    publish(tmp_path, 8, writer("a"))
    assert leftovers(tmp_path) == sorted([".tmp-of-someone-else", f".tmp-step-000007-{os.getppid()}"])


# Finding, pruning, best


def test_newest_is_none_without_checkpoints(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent", pytest.fail) is None
    assert newest(tmp_path, pytest.fail) is None


def test_newest_counts_steps_and_ignores_links_and_strangers(two: Path) -> None:
    publish(two, 1_000_000, writer("million"))
    os.symlink(two / "step-000100", two / "step-2000000")
    (two / "step-3000000").write_text("a file")
    (two / "step-latest").mkdir()
    assert newest(two, pytest.fail) == two / "step-1000000"


def test_newest_says_when_nothing_is_left(two: Path) -> None:
    (two / "step-000100" / MANIFEST).write_text("")
    (two / "step-000123" / MANIFEST).unlink()
    warnings: list[str] = []
    assert newest(two, warnings.append) is None
    assert warnings == [
        "checkpoint step-000123 is damaged (MANIFEST.json: missing); no intact checkpoint is left",
        "checkpoint step-000100 is damaged (MANIFEST.json: unreadable); no intact checkpoint is left",
    ]


def test_step_of_reads_the_name() -> None:
    assert step_of(Path("runs/x/checkpoints/step-000500")) == 500
    with pytest.raises(CheckpointError, match="runs/x/final is not a checkpoint folder") as caught:
        step_of(Path("runs/x/final"))
    assert caught.value.hint == "checkpoints are named `step-000123`"


def test_prune_keeps_the_newest_the_best_and_what_is_not_sealed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        publish(tmp_path, step, writer(str(step)))
    mark_best(tmp_path, 2)
    (tmp_path / "step-000000").mkdir()
    prune(tmp_path, 2)
    assert [step_of(folder) for folder in published(tmp_path)] == [0, 2, 4, 5]
    assert leftovers(tmp_path) == []
    prune(tmp_path, 1)
    assert [step_of(folder) for folder in published(tmp_path)] == [0, 2, 5]


def test_best_is_a_relative_link(two: Path) -> None:
    assert best(two) is None
    mark_best(two, 100)
    assert os.readlink(two / "best") == "step-000100" and best(two) == two / "step-000100"
    mark_best(two, 123)
    assert best(two) == two / "step-000123"
    verify(two / "best")


def test_best_ignores_links_that_lead_elsewhere_or_nowhere(two: Path) -> None:
    for target in (str(two / "step-000100"), "../step-000100", "step-000777", "best"):
        os.symlink(target, two / "best")
        assert best(two) is None
        os.unlink(two / "best")


def test_best_needs_a_checkpoint(two: Path) -> None:
    with pytest.raises(CheckpointError, match="step-000122 does not exist") as caught:
        mark_best(two, 122)
    assert caught.value.hint == "did you mean `step-000123`?"
