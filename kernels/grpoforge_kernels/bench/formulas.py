"""The plain formulas, in torch alone: in float64 the exact answer, in the format of the inputs the plain torch path."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON_LOW = 0.2
EPSILON_HIGH = 0.2
BETA = 0.04


def token_stats(logits: Tensor, ids: Tensor, *, entropy: bool = True) -> dict[str, Tensor]:
    """Log-probs, logsumexp and (without gradient) entropy ``[N]`` of finite logits ``[N, V]`` at temperature 1."""
    log_softmax = logits.log_softmax(dim=1)
    stats = {"logprobs": log_softmax.gather(1, ids[:, None]).squeeze(1)}
    with torch.no_grad():
        chosen = logits.gather(1, ids[:, None]).squeeze(1)
        stats["logsumexp"] = chosen - stats["logprobs"]
        if entropy:
            rows = max(1, 2**24 // logits.shape[1])
            parts = torch.split(log_softmax, rows)
            stats["entropy"] = torch.cat([-(part.exp() * part).sum(dim=1) for part in parts])
    return stats


def grpo_loss(logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """``sum w (-min(r A, clip(r) A) + beta k3)``, ``r = exp(logprobs - old)``, ``k3 = exp(d) - d - 1``.

    ``d = ref - logprobs`` (GRPO, 2402.03300, equations 3 and 4). All of one shape; a scalar.
    """
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - EPSILON_LOW, 1 + EPSILON_HIGH)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    difference = ref - logprobs
    per_token = per_token + BETA * (difference.exp() - difference - 1)
    return (per_token * weights).sum()
