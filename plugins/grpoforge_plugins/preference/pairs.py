"""Pairs of completions of one prompt, one of them better: from files, and from the rollouts of a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpoforge.errors import DataError
from grpoforge.sources import BadRow, read_path

if TYPE_CHECKING:
    from torch import Tensor

    from grpoforge.types import Rollouts

__all__ = ["Pair", "pairs_of_rollouts", "read_pairs", "write_pairs"]

TEXTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt."""

    prompt: str
    chosen: str
    """The better completion."""
    rejected: str
    margin: float = 0.0
    """How far apart their scores should at least be; of a run, the gap between their rewards."""
    kind: str = ""
    """What makes the rejected one worse, where that is known: figures are told apart by it."""
    origin: str = ""
    """Where the pair stands: ``pairs.jsonl:17``."""


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a ``.jsonl`` or ``.parquet`` file with the columns prompt, chosen, rejected, and margin and kind.

    Raises:
        DataError: the file is missing or empty, or a row (named by its line) is no pair.
    """
    name = str(path)
    if not os.path.isfile(os.path.expanduser(name)):
        raise DataError(f"there is no pairs file {name}", "give a .jsonl file with prompt, chosen and rejected")
    rows = read_path(name)
    if not rows:
        raise DataError(f"{name} is empty", "give at least one pair")
    faults = [(row.origin, row.reason if isinstance(row, BadRow) else _fault(row.columns)) for row in rows]
    bad = [(origin, reason) for origin, reason in faults if reason]
    if bad:
        others = f" (and {len(bad) - 1} more of {len(rows)} rows)" if len(bad) > 1 else ""
        raise DataError(
            f"{bad[0][0]}: {bad[0][1]}{others}", "a pair has the texts prompt, chosen and rejected, the last two unlike"
        )
    return [_pair(row.columns, row.origin) for row in rows if not isinstance(row, BadRow)]


def _pair(columns: Any, origin: str) -> Pair:
    return Pair(
        prompt=columns["prompt"],
        chosen=columns["chosen"],
        rejected=columns["rejected"],
        margin=float(columns.get("margin") or 0.0),
        kind=columns.get("kind") or "",
        origin=origin,
    )


def _fault(columns: Any) -> str:
    """Why these columns are no pair; empty when they are one."""
    for name in TEXTS:
        if not isinstance(columns.get(name), str):
            found = f"is {_shown(columns[name])}, not text" if columns.get(name) is not None else "is missing"
            return f"column `{name}` {found}"
    if columns["chosen"] == columns["rejected"]:
        return f"`chosen` and `rejected` are the same text, {_shown(columns['chosen'])}"
    margin, kind = columns.get("margin"), columns.get("kind")
    if margin is not None and not _is_margin(margin):
        return f"column `margin` is {_shown(margin)}, not a number of at least 0"
    return "" if kind is None or isinstance(kind, str) else f"column `kind` is {_shown(kind)}, not text"


def _is_margin(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write ``pairs`` as ``read_pairs`` reads them, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            file.write(json.dumps(row | {"margin": pair.margin, "kind": pair.kind}) + "\n")


def pairs_of_rollouts(rollouts: Rollouts, totals: Tensor, threshold: float) -> list[Pair]:
    """The pairs of a step whose rewards differ by at least ``threshold`` and whose texts differ.

    Where a group alternates between two temperatures (paired sampling), neighbors are pairs; elsewhere the best and the
    worst completion of a group are one. A row that is not scored is in no pair.

    Args:
        rollouts: ``P`` groups of ``G`` completions.
        totals: what each completion is worth, ``[P, G]`` float64, NaN where nothing scored it.
        threshold: smallest gap in reward that says which of two is better.
    """
    found = []
    for prompt, group, worth in zip(rollouts.prompts, rollouts.completions, totals.tolist(), strict=True):
        for first, second in _places([one.temperature for one in group], worth):
            gap = worth[first] - worth[second]
            better, worse = (first, second) if gap > 0 else (second, first)
            chosen, rejected = group[better].text, group[worse].text
            if gap != 0 and abs(gap) >= threshold and chosen != rejected:
                found.append(Pair(prompt.text, chosen, rejected, margin=abs(gap), origin=prompt.origin))
    return found


def _places(temperatures: Sequence[float], worth: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Which rows of a group are compared: neighbors of unlike temperature, or its best and its worst."""
    scored = [row for row, value in enumerate(worth) if not math.isnan(value)]
    if _alternate(temperatures):
        yield from ((row, row + 1) for row in range(0, len(worth), 2) if row in scored and row + 1 in scored)
    elif scored:
        yield max(scored, key=lambda row: worth[row]), min(scored, key=lambda row: worth[row])


def _alternate(temperatures: Sequence[float]) -> bool:
    """True for cold, hot, cold, hot, ..."""
    is_even = len(temperatures) % 2 == 0 and temperatures[0] != temperatures[1]
    return is_even and all(own == temperatures[row % 2] for row, own in enumerate(temperatures))
