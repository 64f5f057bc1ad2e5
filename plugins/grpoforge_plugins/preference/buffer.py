"""The pairs that a preference model remembers: the newest ones, drawn from by a seed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from grpoforge.seeds import mix
from grpoforge_plugins.preference.pairs import Pair

__all__ = ["Buffer"]

Row = list[str | float]
"""A pair as JSON: prompt, chosen, rejected, margin."""


class Buffer:
    """At most ``size`` pairs; a new one takes the place of the oldest."""

    def __init__(self, size: int, seed: int) -> None:
        self.seed = seed
        self._pairs: deque[Pair] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def pairs(self) -> list[Pair]:
        """Oldest first."""
        return list(self._pairs)

    def add(self, pairs: Sequence[Pair]) -> None:
        """Remember ``pairs``, in this order."""
        self._pairs.extend(pairs)

    def draw(self, count: int, number: int) -> list[Pair]:
        """``count`` different pairs, or all there are; a function of the seed, ``number`` and the content."""
        generator = torch.Generator().manual_seed(mix(self.seed, number))
        places: list[int] = torch.randperm(len(self._pairs), generator=generator)[:count].tolist()
        return [self._pairs[place] for place in places]

    def rows(self) -> list[Row]:
        """The content as JSON values, oldest first."""
        return [as_row(pair) for pair in self._pairs]

    def load(self, rows: Sequence[Row]) -> None:
        """Hold what `rows` returned, and nothing else."""
        self._pairs.clear()
        self._pairs.extend(as_pair(row) for row in rows)


def as_row(pair: Pair) -> Row:
    """A pair as JSON values."""
    return [pair.prompt, pair.chosen, pair.rejected, pair.margin]


def as_pair(row: Sequence[str | float]) -> Pair:
    """What `as_row` made."""
    prompt, chosen, rejected, margin = row
    return Pair(str(prompt), str(chosen), str(rejected), margin=float(margin))
