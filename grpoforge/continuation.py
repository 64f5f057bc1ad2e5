"""What a resumed run must share with its beginning: the start weights, how they are held, and the seed.

The reference policy is the model that the run began with, loaded again: another one would change the loss in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from grpoforge.config import Config
from grpoforge.errors import ConfigError, ModelError
from grpoforge.policy import Policy

FREE = frozenset({"recipe", "max_steps", "epochs", "eval", "checkpoint", "trackers", "plugins", "scoring"})
"""Keys that change how long a run is and what is reported, not what a step does."""

FIXED = frozenset({"model", "seed"})

SAME_GRADIENTS = ("model", "gradient_checkpointing")
"""The one key of the model that a run short of memory may change."""


def compare(recorded: Config, config: Config) -> list[str]:
    """One line for each key that changes the rest of the run, for a warning.

    Raises:
        ConfigError: the model or the seed is another one.
    """
    lines = []
    for path, old, new in _changes(recorded.model_dump(mode="json"), config.model_dump(mode="json")):
        key = ".".join(path)
        if path[0] in FREE or path == SAME_GRADIENTS:
            continue
        if path[0] in FIXED:
            raise ConfigError(
                f"`{key}` was {_show(old)} when the run began and is {_show(new)} now",
                "start a new run for it; a resumed run keeps its model and its seed",
            )
        lines.append(f"`{key}` was {_show(old)} and is {_show(new)} from here on")
    return lines


def weights_of(policy: Policy) -> dict[str, str]:
    """sha256 of every weights file in the folder that ``policy`` was loaded from; empty when it was no folder."""
    folder = _folder_of(policy)
    if folder is None:
        return {}
    digests = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def check_weights(recorded: Mapping[str, str], found: Mapping[str, str], policy: Policy) -> None:
    """Refuse start weights that are not those ``recorded`` when the run began; nothing recorded fits all.

    Raises:
        ModelError: a file is missing, new or different.
    """
    changed = sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))
    if recorded and changed:
        raise ModelError(
            f"the model folder {_folder_of(policy)} changed since the run began: `{changed[0]}` is not what it was",
            "put the old weights back, or start a new run from the new ones",
        )


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of the hub model ``name`` that was downloaded for ``revision``; None when there is none."""
    if name.count("/") != 1 or Path(name).expanduser().is_dir():
        return None
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def _folder_of(policy: Policy) -> Path | None:
    source = getattr(policy.model, "name_or_path", None)
    return Path(source) if source and Path(source).is_dir() else None


def _changes(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Every key whose value differs, with both values; a list is one value."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _changes(old.get(key), new.get(key), (*path, key))
    elif old != new:
        yield path, old, new


def _show(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"
