"""How large a Hugging Face policy will be, without its weights.

Parameters are counted on the meta device. What a token leaves behind for the backward pass is measured: one layer of
the real architecture, with adapters and precision as the run will have them, takes a few tokens on the CPU.
"""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from grpoforge.distributed import local_device
from grpoforge.errors import ModelError
from grpoforge.policy import PolicySize
from grpoforge_plugins.policies.huggingface import add_adapter, choose_precision

if TYPE_CHECKING:
    from grpoforge.config import ModelConfig
    from grpoforge.precision import Precision

logger = logging.getLogger(__name__)

PUBLISHED = Path(__file__).parent / "published.yaml"
TOKENS = 16
"""Tokens by which two measurements differ; what attention keeps for pairs of them is too small to count."""
SMALL_VOCABULARY = 64


def policy_size(model: ModelConfig) -> PolicySize | None:
    """The size of the policy that ``model`` names; None where its configuration is not at hand."""
    config = read_config(model)
    try:
        return None if config is None else _measured(config, model)
    except ModelError:
        raise
    except Exception as failure:  # the boundary: what an architecture needs to be built, nobody documents
        logger.debug("the size of %s is unknown: %s", model.name, failure)
        return None


def _measured(config: Any, model: ModelConfig) -> PolicySize:
    precision = choose_precision(model, local_device())
    whole = _skeleton(config, model, precision)
    trainable = [parameter for parameter in whole.parameters() if parameter.requires_grad]
    weight_bytes = _bytes(whole.parameters())
    is_cast = precision.autocast is not None and precision.autocast != precision.weights
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = precision.computed.itemsize
    return PolicySize(
        num_parameters=sum(parameter.numel() for parameter in whole.parameters()),
        num_trainable=sum(parameter.numel() for parameter in trainable),
        weight_bytes=weight_bytes,
        trainable_bytes=_bytes(trainable),
        autocast_bytes=weight_bytes * width // precision.weights.itemsize if is_cast else 0,
        has_adapter=model.lora is not None,
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        context_length=getattr(text, "max_position_embeddings", None),
        hidden_bytes_per_token=text.hidden_size * width,
        saved_bytes_per_token=_saved_by_a_layer(config, model, precision) * text.num_hidden_layers,
        cache_bytes_per_token=2 * heads * head_dim * width * text.num_hidden_layers,
    )


def read_config(model: ModelConfig) -> Any:
    """The model's configuration: of its folder, of the hub's cache on this machine, or as published; else None."""
    from transformers import AutoConfig

    source = os.path.expanduser(model.name)
    try:
        return AutoConfig.from_pretrained(
            source, revision=model.revision, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        # Not here, not a causal model of transformers, an adapter: the loader will say so where it matters.
        published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")).get(model.name)
        return AutoConfig.for_model(**published) if published else None


def _skeleton(config: Any, model: ModelConfig, precision: Precision) -> Any:
    """The network on the meta device: shapes and dtypes, no numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=precision.weights, trust_remote_code=False)
        return network if model.lora is None else add_adapter(network, model)


def _saved_by_a_layer(config: Any, model: ModelConfig, precision: Precision) -> int:
    """Bytes per token that one layer keeps for the backward pass.

    Two layers less one, and so many tokens less half as many: what embeddings, head and copies of weights keep cancels.
    """
    networks = [_skeleton(_layers(config, number), model, precision).to_empty(device="cpu") for number in (1, 2)]
    few, many = (
        [_saved(network, precision, num_tokens) for network in networks] for num_tokens in (TOKENS, 2 * TOKENS)
    )
    return max((many[1] - many[0]) - (few[1] - few[0]), 0) // TOKENS


def _layers(config: Any, number: int) -> Any:
    """``config`` with so many layers and a vocabulary that weighs nothing."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size = number, SMALL_VOCABULARY
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1] * number
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, None)
    return small


def _saved(network: Any, precision: Precision, num_tokens: int) -> int:
    """Bytes that the network keeps for the backward pass of so many tokens, its own weights left out."""
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros((1, num_tokens), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), precision.context(ids.device):
        network(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


def _bytes(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
