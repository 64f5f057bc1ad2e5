"""A layer of a decoder of Llama's kind on packed rows, with gradient.

    y = x + O attention(rotate(Q n1(x)), rotate(K n1(x)), V n1(x)),      n(x) = w x / sqrt(mean(x^2) + eps)
    out = y + D (silu(G n2(y)) * U n2(y))

Attention is that of `grpoforge_kernels.tree_attention`. Queries, keys and values may have biases (Qwen2), queries and
keys an RMSNorm for each head before they are turned (Qwen3). Llama is 2302.13971, rotary positions are 2104.09864,
SwiGLU is 2002.05202.

In float32 on the CPU everything between the products is C++, and little is kept for the backward pass: ``x``, ``y``,
what attention needs, and the two products of the MLP. Everything else goes through plain torch, the definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from grpoforge_kernels import dispatch
from grpoforge_kernels.reference import decoder_layer as reference
from grpoforge_kernels.tree_attention import Forest

OP = "decoder_layer"


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer: matrices are ``[out, in]`` as in ``torch.nn.Linear``, biases and norms ``[n]`` or None."""

    norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None = None
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down: Tensor
    down_bias: Tensor | None = None

    @property
    def other_biases(self) -> list[Tensor]:
        """Biases beside those of queries, keys and values."""
        biases = (self.out_bias, self.gate_bias, self.up_bias, self.down_bias)
        return [bias for bias in biases if bias is not None]


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What the weights alone do not say."""

    heads: int
    kv_heads: int
    head_size: int
    eps: float
    """Of the RMSNorms."""

    @property
    def scale(self) -> float:
        """Factor on the scores of attention."""
        return float(self.head_size**-0.5)


Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary embedding, ``[positions, head_size]`` each."""


def is_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `decoder_layer` is more than plain torch for such weights."""
    return dtype == torch.float32 and dispatch.backend_name(OP, device, dtype) == "cpp"


def decoder_layer(
    hidden: Tensor, weights: LayerWeights, forest: Forest, rotary: Rotary, shape: LayerShape, *, recompute: bool = False
) -> Tensor:
    """Hidden states behind the layer, ``[N, H]``, of the tokens' hidden states before it, ``[N, H]``.

    Args:
        forest: which tokens each token sees, and at which positions they stand.
        rotary: for every position of ``forest``.
        recompute: keep ``hidden`` only, and compute the rest again in the backward pass (gradient checkpointing).

    Raises:
        KernelError: weights, tables or tokens do not fit together.
    """
    backend = reference if weights.other_biases else _backend(hidden)
    result: Tensor = backend.decoder_layer(hidden, weights, forest, rotary, shape, recompute=recompute)
    return result


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` of each row of ``[N, H]`` (1910.07467), with gradient."""
    result: Tensor = _backend(hidden).rms_norm(hidden, weight, eps)
    return result


def _backend(hidden: Tensor) -> ModuleType:
    """C++ computes in float32 only."""
    return dispatch.backend(OP, hidden.device, hidden.dtype) if hidden.dtype == torch.float32 else reference
