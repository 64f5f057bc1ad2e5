"""The rows of a batch as a forest: tokens with equal beginnings of their rows are one, in prompts and in completions.

What a causal model says at a token depends on the tokens up to it and on nothing else, so a token whose row begins as
another's has that one's activations. Sorted by their tokens, rows with equal beginnings are neighbors: the tokens
beyond what a row shares with the row before it are new, and read in this order they stand in depth-first preorder. The
positions alone then say which tokens a token comes after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from grpoforge.packing import CannotShare, Packed
from grpoforge.types import Batch
from grpoforge_kernels import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Trie(Packed):
    """Each distinct beginning of a row once, over all rows of a batch on the CPU: no activation is computed twice.

    A token at position ``p`` comes after the last token before it at position ``p - 1``.
    """

    forest: ops.Forest
    """What attention needs to know."""

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """See `Packed.of`. Rows without a completion token keep their prompt."""
        tokens, prompts, lengths = _aligned(batch)
        nodes, ids, positions = _nodes(tokens, lengths)
        column = np.arange(tokens.shape[1])
        asks = (column + 1 >= prompts[:, None]) & (column + 1 < lengths[:, None])
        seen = np.where(lengths > prompts, lengths - 1, lengths)
        needed = np.zeros(len(ids), dtype=bool)
        needed[nodes[column < seen[:, None]]] = True
        place = np.cumsum(needed) - 1
        position_ids = torch.from_numpy(positions[needed])
        return cls(
            input_ids=torch.from_numpy(ids[needed])[None],
            position_ids=position_ids[None],
            predicted_at=torch.from_numpy(place[nodes[asks]]),
            longest=int(seen.max()),
            forest=ops.Forest.of(position_ids),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """See `Packed.attend`."""
        if softcap is not None:
            raise CannotShare("its scores have a soft cap")
        return ops.tree_attention(query, key, value, self.forest, scale=scale)


def _aligned(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Real tokens of the rows from the left, ``[B, W]`` with -1 behind them; prompt and whole lengths, ``[B]``."""
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1).numpy()
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1).numpy()
    lengths = mask.sum(axis=1)
    inside = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.full(inside.shape, -1, dtype=np.int64)
    tokens[inside] = ids[mask]
    return tokens, batch.prompt_mask.numpy().sum(axis=1), lengths


def _nodes(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The node of each token, ``[B, W]`` (anything behind a row's end); the nodes' ids and positions, in preorder."""
    # Big-endian bytes are in the order of the numbers; what stands behind a row's end becomes 0, the smallest.
    keys = [row.tobytes() for row in (tokens + 1).astype(">u8")]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    tokens = tokens[order]
    is_new = np.arange(tokens.shape[1]) < lengths[order, None]
    is_new[1:] &= ~np.logical_and.accumulate(tokens[1:] == tokens[:-1], axis=1)
    # Numbers rise from row to row: a token that is not new is the last new one above it.
    numbers = np.where(is_new, np.cumsum(is_new).reshape(is_new.shape) - 1, 0)
    nodes = np.empty_like(numbers)
    nodes[order] = np.maximum.accumulate(numbers, axis=0)
    return nodes, tokens[is_new], is_new.nonzero()[1]
