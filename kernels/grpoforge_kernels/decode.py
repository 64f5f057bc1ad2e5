"""Decoding on the CPU in C++, for decoders of Llama's kind: what it is given, what it returns, and whether it can run.

Such a model has, in each layer, attention with rotary positions and shared key heads (GQA) and a gated MLP with SiLU,
each behind an RMSNorm; queries and keys may be normed (Qwen3), and every matrix may have a bias. Weights are float32.
There is no reference beside it: callers that cannot use it decode with the model's own forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpoforge_kernels import dispatch
from grpoforge_kernels.decoder_layer import LayerWeights

__all__ = ["LayerWeights", "Limits", "Look", "ModelWeights", "PackedModel", "Prompts", "obstacle"]

OP = "decode"


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """A model. Layers may be made one by one: each is packed before the next is asked for."""

    layers: Iterable[LayerWeights]
    embedding: Tensor
    """``[V, H]``; not packed: it must stay as it is until the next `pack`."""
    norm: Tensor
    head: Tensor
    """``[V, H]``; may be the embedding."""
    head_bias: Tensor | None
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    """Of the RMSNorms."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What to decode: ``B`` rows, those of one prompt neighbors."""

    tokens: Tensor
    """All prompts' tokens one after the other, int64."""
    ends: Tensor
    """``[P]`` int64: where each prompt ends in ``tokens``."""
    prompt_of: Tensor
    """``[B]`` int64: each row's prompt, ascending."""
    streams: Tensor
    """``[B]`` int64: where each row's uniform numbers come from (splitmix64)."""
    temperatures: Tensor
    """``[B]`` float64, positive."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How completions are drawn and where they end."""

    max_tokens: int
    slots: int
    """Completions decoded at a time at most."""
    eos: tuple[int, ...]
    do_sample: bool
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


Look = Callable[[Tensor, Tensor], list[int]]
"""Given tokens ``[B, T]`` and lengths ``[B]`` so far, the rows that end there."""


def obstacle() -> str | None:
    """Why it cannot run here; None when it can. The first call compiles it."""
    forced = os.environ.get(dispatch.VARIABLE) or "cpp"
    if forced != "cpp":
        return f"{dispatch.VARIABLE}={forced}"
    return dispatch.obstacle("cpp", OP, "cpu", torch.float32)


class PackedModel:
    """The weights of a model in the order in which C++ reads them: a second copy of all but the embedding."""

    def __init__(self) -> None:
        self._backend: Any = dispatch.backend(OP, torch.device("cpu"), torch.float32)
        self._packed = self._backend.Packed()

    def pack(self, weights: ModelWeights) -> None:
        """Take these weights, into the memory of those before if there were any."""
        self._packed.fill(weights)

    def decode(
        self, cosine: Tensor, sine: Tensor, prompts: Prompts, limits: Limits, look: Look | None, patience: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[B, T]`` int64, their log-probs ``[B, T]`` float32 and lengths ``[B]`` int64; zeros behind a length.

        Args:
            cosine: ``[positions, head_size]`` of the rotary embedding, for every position that is reached.
            sine: beside it.
            prompts: what to decode.
            limits: how, and how far.
            look: called every ``patience`` tokens of a row, to end rows.
            patience: see ``look``; Python's signals are handled as often.
        """
        found: tuple[Tensor, Tensor, Tensor] = self._packed.decode(cosine, sine, prompts, limits, look, patience)
        return found
