"""Decoders of Llama's kind: what makes a model one, and where transformers keeps the weights of its layers.

In each layer attention with rotary positions and shared key heads (GQA), then a gated MLP with SiLU, each behind an
RMSNorm and beside a residual; queries, keys and values may have biases (Qwen2), queries and keys norms (Qwen3).
What only looks like this kind its user has to find out by asking the model: `obstacle` knows configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpoforge_kernels.decoder_layer import LayerWeights

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on how long a text is."""

WeightOf = Callable[[Any], Tensor]
"""The weight ``[out, in]`` of a linear layer."""


def obstacle(config: Any) -> str | None:
    """What a model of another kind has that those of this kind have not; None when ``config`` is of this kind."""
    if config.model_type not in MODEL_TYPES:
        return f"it is a {config.model_type} model"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in FIXED_ROTATIONS:
        return f"its rotary embedding is {rotation}"
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if not hasattr(config, "layer_types") else None
    if kinds - {"full_attention"} or window:
        return "it attends to a sliding window"
    return None


def head_size(config: Any) -> int:
    """Columns of each head of attention."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary_tables(trunk: Any, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of each position, ``[num_positions, head_size]`` float32 each."""
    positions = torch.arange(num_positions, device=trunk.embed_tokens.weight.device)[None]
    with torch.no_grad():
        like = torch.zeros(1, dtype=torch.float32, device=positions.device)
        cosine, sine = trunk.rotary_emb(like, positions)
    return cosine[0].contiguous(), sine[0].contiguous()


def layer_weights(layer: Any, weight_of: WeightOf) -> LayerWeights:
    """The weights of one of the trunk's ``layers``, by what they do."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return LayerWeights(
        norm=layer.input_layernorm.weight,
        q=weight_of(attention.q_proj),
        k=weight_of(attention.k_proj),
        v=weight_of(attention.v_proj),
        qkv_bias=_joined_biases(projections),
        q_norm=_norm(attention, "q_norm"),
        k_norm=_norm(attention, "k_norm"),
        out=weight_of(attention.o_proj),
        out_bias=bias_of(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate=weight_of(mlp.gate_proj),
        up=weight_of(mlp.up_proj),
        gate_bias=bias_of(mlp.gate_proj),
        up_bias=bias_of(mlp.up_proj),
        down=weight_of(mlp.down_proj),
        down_bias=bias_of(mlp.down_proj),
    )


def _joined_biases(projections: Sequence[Any]) -> Tensor | None:
    """One after the other, 0 where a projection has none; None where none has."""
    biases = [bias_of(one) for one in projections]
    if all(bias is None for bias in biases):
        return None
    whole = [
        next(one.parameters()).new_zeros(one.out_features) if bias is None else bias
        for one, bias in zip(projections, biases, strict=True)
    ]
    return torch.cat(whole)


def _norm(attention: Any, name: str) -> Tensor | None:
    norm = getattr(attention, name, None)
    return None if norm is None else norm.weight


def bias_of(linear: Any) -> Tensor | None:
    """The bias of a linear layer, an adapter around it or not."""
    bias: Tensor | None = getattr(linear, "base_layer", linear).bias
    return bias
