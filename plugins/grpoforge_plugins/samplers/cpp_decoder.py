"""The decoder in C++, on the CPU: for Llama, Qwen2, Qwen3 and models that are built like them, in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpoforge import llama_kind
from grpoforge.errors import ModelError
from grpoforge.types import PolicyView
from grpoforge_kernels import decode as kernel
from grpoforge_plugins.samplers.requests import PATIENCE, Decoder, Drawn, Requests


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
        trunk = _causal(policy.model).model
        cosine, sine = llama_kind.rotary_tables(trunk, int(lengths.max()) + requests.max_tokens)
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
        return Drawn(*self._packed.decode(cosine, sine, prompts, limits, look, PATIENCE))

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
    reason = llama_kind.obstacle(causal.config)
    if reason is None and (getattr(causal, "model", None) is None or _has_foreign_adapter(causal)):
        reason = "it has an adapter other than LoRA on its linear layers"
    return reason


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
    return kernel.ModelWeights(
        layers=(llama_kind.layer_weights(layer, _weight) for layer in trunk.layers),
        embedding=trunk.embed_tokens.weight,
        norm=trunk.norm.weight,
        head=_weight(causal.lm_head),
        head_bias=llama_kind.bias_of(causal.lm_head),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=llama_kind.head_size(config),
        eps=config.rms_norm_eps,
    )


def _weight(linear: Any) -> Tensor:
    """``[out, in]``, with what its active adapters add."""
    weight: Tensor = getattr(linear, "base_layer", linear).weight.detach()
    for name in () if getattr(linear, "disable_adapters", True) else linear.active_adapters:
        if name in linear.lora_A:
            weight = weight + linear.get_delta_weight(name)
    return weight
