"""The policy's weights as a checkpoint has them: by the names, and in the folder, that vLLM reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from grpoforge.types import PolicyView


def checkpoint_weights(policy: PolicyView) -> dict[str, Tensor]:
    """The weights by their names in a checkpoint, a LoRA adapter added to the matrices it stands on.

    The tensors are the policy's own where nothing was added to them: read them, and let them go. A head that shares
    the embedding's matrix is there as a copy: vLLM keeps one of its own on a CPU, and a reload that does not name it
    leaves the old one in place.
    """
    weights = _merged(_network(policy))
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place in seen:
            weights[name] = tensor.clone()
        seen.add(place)
    return weights


def _merged(network: Any) -> dict[str, Tensor]:
    """``W + dW`` for every matrix with an adapter, without touching the model: merging and unmerging would round it."""
    weights: dict[str, Tensor] = {}
    adapted = {name: module for name, module in network.named_modules() if hasattr(module, "get_delta_weight")}
    for name, tensor in network.state_dict().items():
        module, _, rest = name.partition(".base_layer.")
        owner = next((one for one in adapted if name.startswith(f"{one}.")), None)
        if owner is None:
            weights[name] = tensor
        elif module == owner and rest:
            weights[f"{owner}.{rest}"] = _with_adapters(tensor, adapted[owner]) if rest == "weight" else tensor
    return weights


def _with_adapters(weight: Tensor, module: Any) -> Tensor:
    total = weight
    for adapter in module.active_adapters:
        total = total + module.get_delta_weight(adapter).to(weight.dtype)
    return total


def original_weights(policy: PolicyView) -> dict[str, Tensor]:
    """`checkpoint_weights` as the model was published: transformers stacks the experts of a mixture, vLLM expects them
    one by one."""
    weights: dict[str, Tensor] = revert_weight_conversion(_network(policy), checkpoint_weights(policy))
    return weights


def save_weights(policy: PolicyView, folder: Path) -> None:
    """Write an ordinary folder, ``config.json`` and safetensors, that holds `original_weights`."""
    _network(policy).save_pretrained(folder, state_dict=checkpoint_weights(policy), safe_serialization=True)


def _network(policy: PolicyView) -> Any:
    """The model without an adapter's wrapping."""
    return policy.model.get_base_model() if hasattr(policy.model, "disable_adapter") else policy.model
