r"""Statistics of rows of logits and their gradient, in plain PyTorch, a few rows at a time.

With :math:`z = c \tanh(a x / c)` for logits :math:`x`, scale :math:`a` and softcap :math:`c` (:math:`z = a x` without
one), :math:`s` the inverse temperature, :math:`p = \mathrm{softmax}(s z)`, and :math:`g, h, l` the derivatives of a
loss by log-prob, entropy and logsumexp of a row:

.. math:: \frac{\partial L}{\partial z_v} = s\,\bigl(g\,1[v = y] + p_v (b + c \ln p_v)\bigr),
    \qquad b = l - g - h H,\quad c = -h.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpoforge_kernels.rows import UNDERFLOW, RowStats, finish, statistics_dtype

__all__ = ["finish", "row_gradient", "row_stats"]

CHUNK_ELEMENTS = 2**21
"""Elements of ``[n, V]`` that are widened at a time: 8 MiB in float32."""


def row_stats(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    *,
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
    first_id: int = 0,
    entropy: bool = True,
) -> RowStats:
    """The statistics of each row (see `grpoforge_kernels.rows`), ``[N]``, float32 (float64 for float64 logits).

    Args:
        logits: ``[N, V]`` float, the slice ``[first_id, first_id + V)`` of a vocabulary.
        ids: ``[N]`` int64; a row whose id is outside the slice has ``chosen = -inf``.
        inv_temperature: ``[N]``, positive, in the dtype of the statistics.
        mask: ``[N]`` bool; rows where it is False are not read.
        softcap: ``z = softcap * tanh(scale * x / softcap)`` when given.
        scale: factor on the logits.
        entropy: False leaves ``weighted`` 0.
    """
    dtype = statistics_dtype(logits.dtype)
    stats = RowStats(*(torch.zeros(len(logits), dtype=dtype, device=logits.device) for _ in range(4)))
    for rows in _chunks(logits):
        scores = _scores(logits[rows].to(dtype), softcap, scale)
        maximum = scores.amax(dim=1).clamp(min=torch.finfo(dtype).min)
        exponents = inv_temperature[rows, None] * (scores - maximum[:, None])
        weights = exponents.exp()
        stats.maximum[rows] = maximum
        stats.total[rows] = weights.sum(dim=1)
        if entropy:
            # A banned token has weight 0 and contributes 0, not 0 * -inf.
            stats.weighted[rows] = (weights * exponents.clamp(min=UNDERFLOW)).sum(dim=1)
        stats.chosen[rows] = _chosen(scores, ids[rows] - first_id)
    if mask is None:
        return stats
    masked = (torch.finfo(dtype).min, 0.0, 0.0, -torch.inf) if first_id else (0.0, 1.0, 0.0, 0.0)
    return RowStats(*(values.masked_fill_(~mask, value) for values, value in zip(stats, masked, strict=True)))


def row_gradient(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    stats: RowStats,
    g: Tensor,
    h: Tensor,
    l: Tensor,  # noqa: E741  (the letters of the equation)
    *,
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
    first_id: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient by the logits, ``[N, V]`` in their dtype, by the equation above.

    ``stats`` are those of the whole vocabulary, ``logits`` the slice ``[first_id, first_id + V)`` of it. Rows that are
    masked or have ``g = h = l = 0`` get exactly 0 and are not read. ``out`` may be ``logits``.
    """
    out = torch.empty_like(logits) if out is None else out
    used = (g != 0) | (h != 0) | (l != 0)
    used = used if mask is None else used & mask
    for rows in _chunks(logits):
        out[rows] = _gradient(
            _scores(logits[rows].to(stats.total.dtype), softcap, scale),
            ids[rows] - first_id,
            inv_temperature[rows, None],
            RowStats(*(values[rows, None] for values in stats)),
            (g[rows, None], h[rows, None], l[rows, None]),
            softcap,
            scale,
        ).masked_fill_(~used[rows, None], 0)
    return out


def _gradient(
    scores: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    stats: RowStats,
    upstream: tuple[Tensor, Tensor, Tensor],
    softcap: float | None,
    scale: float,
) -> Tensor:
    g, h, l = upstream  # noqa: E741
    log_total = stats.total.log()
    entropy = log_total - stats.weighted / stats.total
    log_p = (inv_temperature * (scores - stats.maximum)).clamp_(min=UNDERFLOW) - log_total
    gradient = log_p.exp().mul_(torch.where(h == 0, l - g, l - g - h * (entropy + log_p)))
    inside = (ids >= 0) & (ids < scores.shape[1])
    at = ids.where(inside, 0)[:, None]
    gradient.scatter_add_(1, at, g.where(inside[:, None], 0).to(gradient.dtype))
    gradient.mul_(inv_temperature)
    return gradient.mul_(scale if softcap is None else scale * (1 - (scores / softcap) ** 2))


def _scores(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    if softcap is None:
        return logits if scale == 1 else logits * scale
    return softcap * (logits * (scale / softcap)).tanh()


def _chosen(scores: Tensor, ids: Tensor) -> Tensor:
    inside = (ids >= 0) & (ids < scores.shape[1])
    return scores.gather(1, ids.where(inside, 0)[:, None]).squeeze(1).where(inside, -torch.inf)


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
