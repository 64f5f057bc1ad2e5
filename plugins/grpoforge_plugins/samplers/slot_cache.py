"""A key-value cache of fixed size: one slot for each completion that is being decoded.

All slots write their next token into the same column. A prompt of ``L`` tokens that enters at column ``c`` is put into
columns ``c - L`` to ``c``, so what transformers believes about left-padded rows (masks, sliding windows, positions)
holds for rows that entered at different times too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class Place:
    """Where the layers write: into slots ``0 .. used`` at ``column``."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.used = 0


class SlotLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, ``[slots, heads, columns, d]``."""

    def __init__(self, place: Place, like: tuple[Tensor, Tensor], slots: int, columns: int) -> None:
        super().__init__()
        self.place = place
        self.keys, self.values = (
            torch.zeros((slots, one.shape[1], columns, one.shape[3]), dtype=one.dtype, device=one.device)
            for one in like
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store one token of each used slot; what attention may look at."""
        used, column = self.place.used, self.place.column
        self.keys[:used, :, column] = key_states[:, :, 0]
        self.values[:used, :, column] = value_states[:, :, 0]
        return self.keys[:used, :, : column + 1], self.values[:used, :, : column + 1]

    def get_seq_length(self) -> int:
        return self.place.column

    def enter(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put a prompt, ``[heads, L, d]``, before the column of ``slots``."""
        columns = slice(self.place.column - keys.shape[1], self.place.column)
        self.keys[slots, :, columns] = keys
        self.values[slots, :, columns] = values

    def keep(self, slots: Tensor) -> None:
        """Move ``slots``, ascending, to the front."""
        for states in (self.keys, self.values):
            states[: len(slots)] = states[slots]

    def shift(self, by: int) -> None:
        """Move everything ``by`` columns to the left."""
        for states in (self.keys, self.values):
            states[: self.place.used, :, : self.place.column - by] = states[
                : self.place.used, :, by : self.place.column
            ].clone()


class SlotCache(Cache):  # type: ignore[misc]
    """The cache of all layers; made like the keys and values ``[.., heads, L, d]`` of a first prompt."""

    def __init__(self, place: Place, like: Sequence[tuple[Tensor, Tensor]], slots: int, columns: int) -> None:
        super().__init__(layers=[SlotLayer(place, one, slots, columns) for one in like])
        self.place = place
        self.columns = columns
