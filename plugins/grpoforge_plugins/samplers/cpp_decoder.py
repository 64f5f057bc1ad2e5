"""The decoder in C++, on the CPU: for Llama, Qwen2, Qwen3 and models that are built like them, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grpoforge.errors import ModelError
from grpoforge.types import PolicyView
from grpoforge_kernels import decode as kernel
from grpoforge_plugins.samplers.requests import PATIENCE, Decoder, Drawn, Requests

FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on how long a text is."""


class CppDecoder(Decoder):
    """Packs the policy's weights when they have changed, a LoRA adapter merged into them, and decodes in C++."""

    name = "cpp"

    def __init__(self) -> None:
        self._packed: kernel.PackedModel | None = None
        self._version: tuple[int, ...] = ()

    def decode(self, policy: PolicyView, requests: Requests) -> Drawn:
        """As `Decoder.decode`."""
        check(policy)
        self._pack(policy)
        assert self._packed is not None
        lengths = torch.tensor([len(prompt) for prompt in requests.prompts])
        rotary = _causal(policy.model).model.rotary_emb
        positions = torch.arange(int(lengths.max()) + requests.max_tokens)[None]
        with torch.no_grad():
            cosine, sine = rotary(torch.zeros(1), positions)
        prompts = kernel.Prompts(
            tokens=torch.tensor([token for prompt in requests.prompts for token in prompt]),
            ends=lengths.cumsum(dim=0),
            prompt_of=requests.prompt_of,
            streams=requests.streams,
            temperatures=requests.temperatures,
        )
        limits = kernel.Limits(
            max_tokens=requests.max_tokens,
            slots=requests.slots,
            eos=requests.eos,
            do_sample=requests.do_sample,
            top_k=requests.cuts.top_k,
            top_p=requests.cuts.top_p,
            min_p=requests.cuts.min_p,
        )
        look = None if requests.ended is None else _look(requests)
        return Drawn(*self._packed.decode(cosine[0], sine[0], prompts, limits, look, PATIENCE))

    def _pack(self, policy: PolicyView) -> None:
        """Nothing, where the weights are those of the last time: torch counts what is written into a tensor."""
        version = (policy.version, *(parameter._version for parameter in policy.model.parameters()))
        if self._packed is None:
            self._packed = kernel.PackedModel()
        if version != self._version:
            with torch.no_grad():
                self._packed.pack(weights_of(policy.model))
            self._version = version


def _look(requests: Requests) -> kernel.Look:
    def look(tokens: Tensor, lengths: Tensor) -> list[int]:
        assert requests.ended is not None
        rows = ((lengths > 0) & (lengths < requests.max_tokens)).nonzero()[:, 0].tolist()
        return [row for row in rows if requests.ended(tokens[row, : lengths[row]].tolist())]

    return look


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check(policy: PolicyView) -> None:
    """Refuse what C++ cannot compute. What it takes for a model of this kind and is none, `decoders.obstacle` finds.

    Raises:
        ModelError: the device, the precision or a part of the model is not supported; the message says which.
    """
    reason = kernel.obstacle() or _foreign_numbers(policy) or _foreign_parts(_causal(policy.model))
    if reason:
        raise ModelError(reason)


def _foreign_numbers(policy: PolicyView) -> str | None:
    if policy.device.type != "cpu":
        return f"the model is on {policy.device}"
    if policy.precision.autocast is not None:
        return f"the model is cast to {policy.precision.autocast}"
    kinds = {parameter.dtype for parameter in policy.model.parameters()} - {torch.float32}
    return f"it has weights in {kinds.pop()}" if kinds else None


def _foreign_parts(causal: Any) -> str | None:
    """What a model of another kind has that those of this kind have not."""
    config, trunk = causal.config, getattr(causal, "model", None)
    if config.model_type not in ("llama", "qwen2", "qwen3", "mistral"):
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
    if trunk is None or _has_foreign_adapter(causal):
        return "it has an adapter other than LoRA on its linear layers"
    return None


def _has_foreign_adapter(causal: Any) -> bool:
    for module in causal.modules():
        if hasattr(module, "base_layer"):
            plain = isinstance(module.base_layer, torch.nn.Linear) and hasattr(module, "lora_A")
            if not plain or any(getattr(module, "use_dora", {}).values()) or getattr(module, "lora_variant", None):
                return True
    return False


def weights_of(model: Any) -> kernel.ModelWeights:
    """The weights of a model that passed `check`, by what they do; adapters are merged into a copy."""
    causal = _causal(model)
    config, trunk = causal.config, causal.model
    heads = config.num_attention_heads
    return kernel.ModelWeights(
        layers=_layers(trunk),
        embedding=trunk.embed_tokens.weight,
        norm=trunk.norm.weight,
        head=_weight(causal.lm_head),
        head_bias=_bias(causal.lm_head),
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        eps=config.rms_norm_eps,
    )


def _layers(trunk: Any) -> Iterator[kernel.LayerWeights]:
    for layer in trunk.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [bias for one in projections if (bias := _bias(one)) is not None]
        yield kernel.LayerWeights(
            norm=layer.input_layernorm.weight,
            q=_weight(attention.q_proj),
            k=_weight(attention.k_proj),
            v=_weight(attention.v_proj),
            qkv_bias=torch.cat(biases) if biases else None,
            q_norm=_norm(attention, "q_norm"),
            k_norm=_norm(attention, "k_norm"),
            out=_weight(attention.o_proj),
            out_bias=_bias(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate=_weight(mlp.gate_proj),
            up=_weight(mlp.up_proj),
            gate_bias=_bias(mlp.gate_proj),
            up_bias=_bias(mlp.up_proj),
            down=_weight(mlp.down_proj),
            down_bias=_bias(mlp.down_proj),
        )


def _norm(attention: Any, name: str) -> Tensor | None:
    norm = getattr(attention, name, None)
    return None if norm is None else norm.weight


def _weight(linear: Any) -> Tensor:
    """``[out, in]``, with what its active adapters add."""
    weight: Tensor = getattr(linear, "base_layer", linear).weight.detach()
    for name in () if getattr(linear, "disable_adapters", True) else linear.active_adapters:
        if name in linear.lora_A:
            weight = weight + linear.get_delta_weight(name)
    return weight


def _bias(linear: Any) -> Tensor | None:
    bias: Tensor | None = getattr(linear, "base_layer", linear).bias
    return bias
