"""Each operation in plain PyTorch: the definition, the oracle of the tests, and the path that runs everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_log_softmax(logits: Tensor, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of the chosen tokens and entropy of the distributions they came from.

    With ``z = logits / temperature`` per row: ``logprobs[n] = z[n, ids[n]] - logsumexp(z[n])`` and
    ``entropy[n] = logsumexp(z[n]) - sum_v softmax(z[n])_v z[n, v]`` (nats, without gradient).

    Args:
        logits: ``[N, V]`` float; half precision is widened to float32 before any arithmetic.
        ids: ``[N]`` int64, each in ``[0, V)``.
        temperature: ``[N]`` float, positive.

    Returns:
        ``logprobs [N]`` with gradient and ``entropy [N]`` without, in float32 (float64 for float64 logits).
    """
    assert logits.ndim == 2 and ids.shape == temperature.shape == logits.shape[:1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.to(wide) / temperature.to(wide)[:, None]
    normalizer = scaled.logsumexp(dim=1)
    logprobs = scaled.gather(1, ids[:, None]).squeeze(1) - normalizer
    with torch.no_grad():
        entropy = torch.cat([_entropy(*rows) for rows in _row_chunks(scaled, normalizer)])
    return logprobs, entropy


CHUNK_ELEMENTS = 2**23
"""Elements of ``[n, V]`` that the entropy holds at a time beside its input: 32 MiB in float32."""


def _row_chunks(scaled: Tensor, normalizer: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, CHUNK_ELEMENTS // scaled.shape[1])
    return list(zip(torch.split(scaled, rows), torch.split(normalizer, rows), strict=True))


def _entropy(scaled: Tensor, normalizer: Tensor) -> Tensor:
    log_softmax = scaled - normalizer[:, None]
    # A banned token has log-prob -inf and probability 0: it contributes 0, not 0 * -inf.
    return -(log_softmax.exp() * log_softmax.clamp(min=torch.finfo(scaled.dtype).min)).sum(dim=1)
