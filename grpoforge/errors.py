"""The errors a user can fix, and the only exceptions the command line shows without a traceback.

An error message states what is wrong with the value shown and where the value came from; the hint says what to do.
Everything else (a failed ``assert``, a ``TypeError``) is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GrpoforgeError",
    "Interrupted",
    "ModelError",
    "PluginError",
    "RewardError",
    "RunFailed",
    "first_line",
    "suggest",
]


class GrpoforgeError(Exception):
    """A mistake the user can fix. ``message`` names the value and its origin, ``hint`` the remedy."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[GrpoforgeError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class ConfigError(GrpoforgeError):
    """A configuration key, value or combination that cannot work."""


class DataError(GrpoforgeError):
    """A dataset that is missing, empty or has rows that cannot be used."""


class ModelError(GrpoforgeError):
    """A model folder or tokenizer that cannot be used."""


class PluginError(GrpoforgeError):
    """A plugin that cannot be loaded, or a component name that cannot be resolved."""


class RewardError(GrpoforgeError):
    """A reward that broke its contract during the run; the run stops unless told to skip the rows."""


class CheckpointError(GrpoforgeError):
    """A checkpoint or run directory that cannot be written, read or trusted."""


class RunFailed(GrpoforgeError):
    """The run itself failed (non-finite loss, last checkpoint not written): exit code 1."""

    exit_code = 1


class Interrupted(GrpoforgeError):
    """The user stopped the run; everything finished so far is saved: exit code 130."""

    exit_code = 130


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown ``name``: the nearest known one, else the list of all."""
    candidates = sorted(set(known))
    nearest = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if nearest:
        return f"did you mean `{nearest[0]}`?"
    return f"known: {', '.join(candidates)}" if candidates else "none is known"


def first_line(failure: BaseException) -> str:
    """The first line of an exception's text, for one-line messages."""
    lines = str(failure).strip().splitlines()
    return lines[0] if lines else type(failure).__name__
