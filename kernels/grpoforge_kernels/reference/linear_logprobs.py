"""Log-prob, entropy and logsumexp of the tokens of an output layer, differentiated by autograd: the definition.

It shares no arithmetic with the panels of `grpoforge_kernels.linear_panels`: logits of a few rows at a time, softmax
by torch. Under autograd it keeps all logits, so it is an oracle and no way to train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpoforge_kernels.rows import UNDERFLOW, TokenStats, check_ids, inverse_temperature, statistics_dtype

CHUNK_ELEMENTS = 2**21


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: Tensor | float,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> TokenStats:
    """What `grpoforge_kernels.linear_logprobs.linear_logprobs` must equal; same arguments, same results.

    Inputs are widened to float32 (float64 stays) before any product. Rows outside the mask give 0.
    """
    check_ids(ids, len(weight), mask)
    dtype = statistics_dtype(hidden.dtype)
    inv_temperature = inverse_temperature(temperature, hidden)
    kept = torch.arange(len(ids), device=ids.device) if mask is None else mask.nonzero().squeeze(1)
    wide_weight, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    parts = []
    for rows in torch.split(kept, max(1, CHUNK_ELEMENTS // len(weight))):
        scores = torch.nn.functional.linear(hidden[rows].to(dtype), wide_weight, wide_bias) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        parts.append(_token_stats(scores * inv_temperature[rows, None], ids[rows]))
    zeros = hidden.new_zeros(len(ids), dtype=dtype)
    return TokenStats(*(zeros.index_put((kept,), torch.cat(values)) for values in zip(*parts, strict=True)))


def _token_stats(scores: Tensor, ids: Tensor) -> TokenStats:
    log_p = scores.log_softmax(dim=1)
    # A banned token has probability 0 and contributes 0, not 0 * -inf.
    entropy = -(log_p.exp() * log_p.clamp(min=UNDERFLOW)).sum(dim=1)
    return TokenStats(log_p.gather(1, ids[:, None]).squeeze(1), entropy, scores.logsumexp(dim=1))
