"""Damage to a checkpoint is always noticed and named."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from grpoforge.checkpoint import MANIFEST, newest, publish, verify
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


@pytest.fixture
def two(tmp_path: Path) -> Path:
    publish(tmp_path, 100, writer("a"))
    publish(tmp_path, 123, writer("b"))
    return tmp_path


def delete(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncate_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncate_one_percent(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 99 // 100])


def zero_tail(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def swap_with_other_step(path: Path) -> None:
    other = Path(str(path).replace("step-000123", "step-000100"))
    path.write_bytes(other.read_bytes())


def link_to_a_copy(path: Path) -> None:
    shutil.copy(path, path.parents[2] / "copy")
    path.unlink()
    os.symlink(path.parents[2] / "copy", path)


def turn_into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def turn_into_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [
    delete,
    empty,
    truncate_half,
    truncate_one_percent,
    zero_tail,
    append,
    swap_with_other_step,
    link_to_a_copy,
    turn_into_a_folder,
    turn_into_a_pipe,
]
CHANGE_NOTHING_IN_AN_EMPTY_FILE = [empty, truncate_half, truncate_one_percent, swap_with_other_step]
CASES = [
    (name, damage)
    for name in FILES
    for damage in DAMAGES
    if name != "empty.txt" or damage not in CHANGE_NOTHING_IN_AN_EMPTY_FILE
]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damage_is_noticed_and_the_older_checkpoint_is_found(
    two: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(two / "step-000123" / name)
    with pytest.raises(CheckpointError) as caught:
        verify(two / "step-000123")
    assert caught.value.message.startswith(f"checkpoint step-000123 is damaged ({name}: ")
    assert caught.value.hint == "resume from an earlier checkpoint, or restore this one from a copy"
    warnings: list[str] = []
    assert newest(two, warnings.append) == two / "step-000100"
    assert warnings == [f"{caught.value.message}; resuming from step-000100"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", MANIFEST])
def test_every_flipped_byte_is_noticed(two: Path, name: str) -> None:
    path = two / "step-000123" / name
    content = path.read_bytes()
    for index in range(len(content)):
        changed = bytearray(content)
        changed[index] ^= 1 << (index % 8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="step-000123 is damaged"):
            verify(two / "step-000123")
    path.write_bytes(content)
    verify(two / "step-000123")


@pytest.mark.parametrize(
    ("name", "damage", "flaw"),
    [
        ("trainer_state.json", delete, "trainer_state.json: missing"),
        ("trainer_state.json", append, "trainer_state.json: 11 bytes instead of 10"),
        ("trainer_state.json", swap_with_other_step, "trainer_state.json: sha256 mismatch"),
        ("tokenizer/vocab.json", link_to_a_copy, "tokenizer/vocab.json: symbolic link"),
        ("empty.txt", turn_into_a_pipe, "empty.txt: not a regular file"),
        (MANIFEST, delete, "MANIFEST.json: missing"),
        (MANIFEST, truncate_half, "MANIFEST.json: unreadable"),
        (MANIFEST, append, "MANIFEST.json: edited"),
        (MANIFEST, swap_with_other_step, "MANIFEST.json: written for step-000100"),
        (MANIFEST, link_to_a_copy, "MANIFEST.json: symbolic link"),
    ],
)
def test_damage_is_named(two: Path, name: str, damage: Callable[[Path], None], flaw: str) -> None:
    damage(two / "step-000123" / name)
    with pytest.raises(CheckpointError) as caught:
        verify(two / "step-000123")
    assert caught.value.message == f"checkpoint step-000123 is damaged ({flaw})"


@pytest.mark.parametrize("name", ["extra.bin", "tokenizer/.hidden", "tokenizer/MANIFEST.json"])
def test_extra_file_is_noticed(two: Path, name: str) -> None:
    (two / "step-000123" / name).write_text("x")
    with pytest.raises(CheckpointError, match=rf"\({re.escape(name)}: extra file\)"):
        verify(two / "step-000123")


def test_linked_folder_is_noticed(two: Path) -> None:
    shutil.move(two / "step-000123/tokenizer", two / "elsewhere")
    os.symlink(two / "elsewhere", two / "step-000123/tokenizer")
    with pytest.raises(CheckpointError, match=r"\(tokenizer: symbolic link\)"):
        verify(two / "step-000123")


def forge_manifest(folder: Path, manifest: dict[str, object]) -> None:
    """Write a manifest whose own sha256 is right: what an attacker, or a newer version, would write."""

    def render(value: dict[str, object]) -> str:
        return json.dumps(value, indent=2, sort_keys=True) + "\n"

    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(render(body).encode()).hexdigest()
    (folder / MANIFEST).write_text(render({**body, "sha256": digest}))


@pytest.mark.parametrize("name", ["../step-000100/model.safetensors", "/etc/hostname", "a/../../b"])
def test_names_outside_the_folder_are_refused(two: Path, name: str) -> None:
    folder = two / "step-000123"
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    forge_manifest(folder, manifest)
    with pytest.raises(CheckpointError, match=rf"\({re.escape(name)}: outside the checkpoint\)"):
        verify(folder)


def test_other_schema_is_refused(two: Path) -> None:
    manifest = json.loads((two / "step-000123" / MANIFEST).read_text())
    forge_manifest(two / "step-000123", {**manifest, "schema": 2})
    with pytest.raises(CheckpointError, match=r"\(MANIFEST.json: schema 2, this version reads 1\)"):
        verify(two / "step-000123")


@pytest.mark.parametrize(
    "text",
    ["null", "[]", '{"schema": 1}', "[" * 50_000, '{"schema": 1, "step": 1e999, "files": {}}', "9" * 5000],
    ids=["null", "list", "bare", "deep", "infinite", "huge"],
)
def test_hostile_manifest_is_unreadable(two: Path, text: str) -> None:
    (two / "step-000123" / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"\(MANIFEST.json: unreadable\)"):
        verify(two / "step-000123")


def test_renamed_step_is_noticed_and_a_renamed_copy_is_not(two: Path) -> None:
    os.rename(two / "step-000123", two / "step-000999")
    with pytest.raises(CheckpointError, match=r"step-000999 is damaged \(.*written for step-000123\)"):
        verify(two / "step-000999")
    os.rename(two / "step-000999", two / "my-model")
    verify(two / "my-model")


def test_missing_checkpoint_suggests_the_nearest(two: Path) -> None:
    with pytest.raises(CheckpointError, match="step-000124 does not exist") as caught:
        verify(two / "step-000124")
    assert caught.value.hint == "did you mean `step-000123`?"
