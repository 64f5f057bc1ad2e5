"""The head of a causal language model, told from its trunk so that it can be applied where it is needed.

Recognized by asking, not by name: a short input goes through the model and through trunk and head apart, and only a
model that gives the same logits both ways is taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from grpoforge.precision import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``; without softcap the inside."""

    trunk: Any
    """The module under the head; gives ``last_hidden_state [b, W, H]``."""
    layer: torch.nn.Linear
    scale: float
    softcap: float | None

    @property
    def weight(self) -> Tensor:
        """``[V, H]``"""
        return self.layer.weight

    @property
    def is_trained(self) -> bool:
        return self.weight.requires_grad

    def weight_like(self, hidden: Tensor) -> Tensor:
        """`weight` in the dtype of ``hidden``."""
        return self.weight.to(hidden.dtype)

    def bias_like(self, hidden: Tensor) -> Tensor | None:
        """The bias, if there is one, in the dtype of ``hidden``."""
        return None if self.layer.bias is None else self.layer.bias.to(hidden.dtype)

    def options(self, hidden: Tensor) -> dict[str, Any]:
        """What the kernels need to know beside the weight."""
        return {"bias": self.bias_like(hidden), "scale": self.scale, "softcap": self.softcap}

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """``[n, H]`` to ``[n, V]`` before scale and softcap, which the kernels apply themselves."""
        return linear(hidden, self.weight_like(hidden), self.bias_like(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, H]`` to ``[n, V]`` as the model gives them."""
        scaled = self.raw_logits(hidden) * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def find_head(model: Any, precision: Precision) -> Head | None:
    """The head of ``model``, or None where it cannot be told from the trunk with certainty."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = causal.get_output_embeddings()
    trunk = causal.get_decoder() if hasattr(causal, "get_decoder") else None
    if type(layer) is not torch.nn.Linear or trunk is None or trunk is causal:
        return None
    config = causal.config.get_text_config()
    # The names under which transformers' models keep a factor on their logits: Cohere, Granite, Falcon-H1; Gemma's cap.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    head = Head(trunk=trunk, layer=layer, scale=scale, softcap=getattr(config, "final_logit_softcapping", None))
    return head if _agrees(model, head, precision) else None


@torch.no_grad()
def _agrees(model: Any, head: Head, precision: Precision) -> bool:
    """Whether trunk and head apart give the logits of the whole."""
    vocabulary = min(head.weight.shape[0], 32)
    ids = torch.arange(vocabulary, device=head.weight.device)[None, -3:]
    with precision.context(ids.device):
        whole = model(input_ids=ids, use_cache=False).logits[0]
        apart = head.logits(head.trunk(input_ids=ids, use_cache=False).last_hidden_state[0])
    return bool(whole.shape == apart.shape and torch.allclose(whole.float(), apart.float(), rtol=1e-2, atol=1e-3))
