"""Tokens of several trees in one sequence, each in depth-first preorder: who follows whom, from their depths alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from grpoforge_kernels.errors import KernelError

T = TypeVar("T")


class Forest:
    """``N`` tokens in preorder and what is derived from them, made once for all layers that attend over them.

    The parent of a token at depth ``p`` is the last one before it at depth ``p - 1``; a token at depth 0 begins a tree.
    """

    def __init__(self, positions: Tensor) -> None:
        """See `of`, which checks."""
        self.positions = positions
        self._derived: dict[Hashable, object] = {}

    @classmethod
    def of(cls, positions: Tensor) -> Forest:
        """The forest of tokens with these depths.

        Args:
            positions: ``[N]`` int64, 0 at the root of each tree. It must not change afterwards.

        Raises:
            KernelError: it is not ``[N]`` int64, or a token has no parent.
        """
        if positions.ndim != 1 or positions.dtype != torch.int64:
            raise KernelError(f"positions are {positions.dtype} {list(positions.shape)}, not torch.int64 [N]")
        highest = torch.cat([positions.new_zeros(1), positions[:-1] + 1])[: len(positions)]
        is_wrong = (positions < 0) | (positions > highest)
        if bool(is_wrong.any()):
            at = int(is_wrong.nonzero()[0])
            above = f"token {at - 1} has {int(positions[at - 1])}" if at else "it is the first"
            raise KernelError(
                f"token {at} has position {int(positions[at])}: {above}, so it may have 0 to {int(highest[at])}",
                "tokens must stand in depth-first preorder; positions count from 0 at the root of each tree",
            )
        return cls(positions.contiguous())

    def __len__(self) -> int:
        return len(self.positions)

    def derived(self, key: Hashable, make: Callable[[Forest], T]) -> T:
        """What ``make`` makes of this forest, made once for each ``key``."""
        if key not in self._derived:
            self._derived[key] = make(self)
        return self._derived[key]  # type: ignore[return-value]
