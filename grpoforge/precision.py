"""How numbers are held."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Precision:
    """The weights' dtype, and the dtype the forward pass is cast to (None: not cast)."""

    weights: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def computed(self) -> torch.dtype:
        """The dtype of hidden states and logits."""
        return self.autocast or self.weights

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The autocast region of a forward pass on ``device``."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)
