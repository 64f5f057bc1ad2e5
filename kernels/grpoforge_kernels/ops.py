"""The vocabulary: what the engine may call. Each operation has a module of its name, which states its equation."""

from __future__ import annotations

from grpoforge_kernels.decoder_layer import LayerShape, LayerWeights, decoder_layer, rms_norm
from grpoforge_kernels.grpo_loss import ClipOptions, GrpoLoss, KLForm, grpo_loss, grpo_loss_from_logits
from grpoforge_kernels.linear_logprobs import linear_logprobs
from grpoforge_kernels.linear_loss import linear_loss
from grpoforge_kernels.selective_log_softmax import TokenStats, selective_log_softmax
from grpoforge_kernels.tree_attention import Forest, tree_attention

__all__ = [
    "ClipOptions",
    "Forest",
    "GrpoLoss",
    "KLForm",
    "LayerShape",
    "LayerWeights",
    "TokenStats",
    "decoder_layer",
    "grpo_loss",
    "grpo_loss_from_logits",
    "linear_logprobs",
    "linear_loss",
    "rms_norm",
    "selective_log_softmax",
    "tree_attention",
]
