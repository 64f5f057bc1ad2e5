"""The trunk of a decoder of Llama's kind on packed rows, layer by layer through the kernels.

It computes what the model's own modules compute, from their parameters, and their gradients are the same parameters'. A
model that has more to it than its parameters (adapters, hooks, quantized layers) goes through its own modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpoforge import llama_kind
from grpoforge.precision import Precision
from grpoforge.trie import Trie
from grpoforge_kernels import ops
from grpoforge_kernels.decoder_layer import is_fused


def obstacle(trunk: Any, precision: Precision) -> str | None:
    """Why `hidden_states` cannot stand for ``trunk`` now, or is not faster; None when it can and is."""
    try:
        return _obstacle(trunk, precision)
    except AttributeError as error:  # Anybody's model may call itself one of Llama's kind.
        return f"its parts have other names ({error})"


def _obstacle(trunk: Any, precision: Precision) -> str | None:
    if precision.autocast is not None or precision.weights != torch.float32:
        return "it is not computed in float32"
    parameters = list(trunk.parameters())
    if any(parameter.dtype != torch.float32 or not parameter.is_contiguous() for parameter in parameters):
        return "it has other weights than float32"
    if not is_fused(parameters[0].device, torch.float32):
        return "no kernel is faster"
    return llama_kind.obstacle(trunk.config) or _foreign_parts(trunk)


def _foreign_parts(trunk: Any) -> str | None:
    """What a layer has beside the parameters that `hidden_states` reads."""
    for name, module in trunk.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"`{name}` has hooks"
    for layer in trunk.layers:
        kinds = {type(one) for one in layer.modules() if isinstance(one, torch.nn.Linear) or hasattr(one, "base_layer")}
        if kinds != {torch.nn.Linear}:
            return "its linear layers are not plain"
        others = (layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        if any(llama_kind.bias_of(one) is not None for one in others):
            return "it has biases beside those of queries, keys and values"
        if layer.self_attn.scaling != llama_kind.head_size(trunk.config) ** -0.5:
            return "its scores are scaled in another way"
    return None


def hidden_states(trunk: Any, packed: Trie) -> Tensor:
    """The trunk's last hidden states, ``[N, H]``, with gradient; only where there is no `obstacle`."""
    config = trunk.config
    shape = ops.LayerShape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=llama_kind.head_size(config),
        eps=config.rms_norm_eps,
    )
    rotary = llama_kind.rotary_tables(trunk, packed.longest)
    checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in trunk.layers)
    recompute = torch.is_grad_enabled() and trunk.training and checkpointing
    hidden = trunk.embed_tokens(packed.input_ids[0])
    for layer in trunk.layers:
        weights = llama_kind.layer_weights(layer, _weight)
        hidden = ops.decoder_layer(hidden, weights, packed.forest, rotary, shape, recompute=recompute)
    return ops.rms_norm(hidden, trunk.norm.weight, shape.eps)


def _weight(linear: Any) -> Tensor:
    weight: Tensor = linear.weight
    return weight
