"""A decoder layer in plain torch: the definition, for every dtype and device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint

from grpoforge_kernels.tree_attention import Forest, tree_attention

if TYPE_CHECKING:
    from grpoforge_kernels.decoder_layer import LayerShape, LayerWeights, Rotary


def decoder_layer(
    hidden: Tensor, weights: LayerWeights, forest: Forest, rotary: Rotary, shape: LayerShape, *, recompute: bool
) -> Tensor:
    """As `grpoforge_kernels.decoder_layer.decoder_layer`."""
    if recompute and torch.is_grad_enabled():
        result: Tensor = checkpoint(_layer, hidden, weights, forest, rotary, shape, use_reentrant=False)
        return result
    return _layer(hidden, weights, forest, rotary, shape)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `grpoforge_kernels.decoder_layer.rms_norm`; the statistics in float32 at least."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(hidden.dtype)


def _layer(hidden: Tensor, weights: LayerWeights, forest: Forest, rotary: Rotary, shape: LayerShape) -> Tensor:
    attended = _attended(rms_norm(hidden, weights.norm, shape.eps), weights, forest, rotary, shape)
    middle = hidden + linear(attended, weights.out, weights.out_bias)
    normed = rms_norm(middle, weights.mlp_norm, shape.eps)
    gate, up = linear(normed, weights.gate, weights.gate_bias), linear(normed, weights.up, weights.up_bias)
    return middle + linear(silu(gate) * up, weights.down, weights.down_bias)


def _attended(normed: Tensor, weights: LayerWeights, forest: Forest, rotary: Rotary, shape: LayerShape) -> Tensor:
    """What each head of each token attends to, ``[N, h d]``."""
    qkv = linear(normed, torch.cat([weights.q, weights.k, weights.v]), weights.qkv_bias)
    first, last = shape.heads, shape.heads + shape.kv_heads
    heads = qkv.view(len(qkv), last + shape.kv_heads, shape.head_size)
    query, key, value = heads[:, :first], heads[:, first:last], heads[:, last:]
    if weights.q_norm is not None and weights.k_norm is not None:
        query, key = rms_norm(query, weights.q_norm, shape.eps), rms_norm(key, weights.k_norm, shape.eps)
    cosine, sine = (table.to(qkv.dtype)[forest.positions][:, None] for table in rotary)
    query, key = (one * cosine + _halves_turned(one) * sine for one in (query, key))
    return tree_attention(query, key, value, forest, scale=shape.scale).flatten(1)


def _halves_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
