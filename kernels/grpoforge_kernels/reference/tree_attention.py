r"""Exact attention of each token of a forest to itself and its ancestors, in plain torch: the definition.

With the ancestors :math:`A(i)` of token :math:`i`, itself among them, each head has

.. math::

    s_{ij} = \text{scale}\, q_i \cdot k_j, \quad l_i = \ln \sum_{j \in A(i)} e^{s_{ij}}, \quad
    o_i = \sum_{j \in A(i)} P_{ij} v_j, \quad P_{ij} = e^{s_{ij} - l_i}

and, for a gradient :math:`g` of the output (FlashAttention, 2205.14135),

.. math::

    dV_j = \sum_i P_{ij} g_i, \quad S_{ij} = \text{scale}\, P_{ij} (g_i \cdot v_j - g_i \cdot o_i), \quad
    dQ_i = \sum_j S_{ij} k_j, \quad dK_j = \sum_i S_{ij} q_i

where keys and values are summed over the query heads that share them. A tree is a dense block of scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpoforge_kernels.forest import Forest
from grpoforge_kernels.rows import statistics_dtype

__all__ = ["backward", "forward"]


def forward(query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[N, h, d]`` in the dtype of the query, and logsumexp ``[N, h]`` in float32 (float64 for float64).

    Args:
        query: ``[N, h, d]``.
        key: ``[N, k, d]``; every ``h / k`` heads of the queries share one.
        value: ``[N, k, d]``.
        forest: the ``N`` tokens.
        scale: factor on the scores.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    logsumexp = query.new_empty(query.shape[:2], dtype=statistics_dtype(query.dtype))
    for tree, hidden in _trees(forest):
        q, k, v = _wide(query[tree], key[tree], value[tree])
        scores = _scores(q, k, hidden, scale)
        total = scores.logsumexp(dim=2)
        out[tree] = _by_token((scores - total[..., None]).exp() @ v).to(out.dtype)
        logsumexp[tree] = total.t()
    return out, logsumexp


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    forest: Forest,
    scale: float,
    d_query: Tensor | None = None,
    d_key: Tensor | None = None,
    d_value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given that of the output, into the last three where they are given."""
    d_query, d_key, d_value = (
        torch.empty_like(one, memory_format=torch.contiguous_format) if into is None else into
        for one, into in ((query, d_query), (key, d_key), (value, d_value))
    )
    for tree, hidden in _trees(forest):
        q, k, v = _wide(query[tree], key[tree], value[tree])
        g, o = (one[tree].to(q.dtype).transpose(0, 1) for one in (grad, out))
        weights = (_scores(q, k, hidden, scale) - logsumexp[tree].t()[..., None]).exp()
        slopes = scale * weights * (g @ v.transpose(1, 2) - (g * o).sum(dim=2, keepdim=True))
        kv_heads = key.shape[1]
        d_query[tree] = _by_token(slopes @ k).to(d_query.dtype)
        d_key[tree] = _by_token(_summed(slopes.transpose(1, 2) @ q, kv_heads)).to(d_key.dtype)
        d_value[tree] = _by_token(_summed(weights.transpose(1, 2) @ g, kv_heads)).to(d_value.dtype)
    return d_query, d_key, d_value


def _trees(forest: Forest) -> Iterator[tuple[slice, Tensor]]:
    """Each tree's tokens, and ``[n, n]`` bool: what token ``i`` does not see of ``j``."""
    positions = forest.positions.tolist()
    ends = forest.derived("ends", _ends)
    start = 0
    while start < len(positions):
        tree = slice(start, int(ends[start]))
        index = torch.arange(tree.start, tree.stop, device=ends.device)
        yield tree, (index[None, :] > index[:, None]) | (ends[tree][None, :] <= index[:, None])
        start = tree.stop


def _ends(forest: Forest) -> Tensor:
    """``[N]``: where the subtree of each token ends."""
    ends = [len(forest)] * len(forest)
    path: list[int] = []
    for token, position in enumerate(forest.positions.tolist()):
        for left in path[position:]:
            ends[left] = token
        path[position:] = [token]
    return torch.tensor(ends, dtype=torch.int64, device=forest.positions.device)


def _wide(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[h, n, d]`` each, in the dtype of the statistics; heads that are shared are repeated."""
    times, dtype = query.shape[1] // key.shape[1], statistics_dtype(query.dtype)
    q, k, v = (one.to(dtype).transpose(0, 1) for one in (query, key, value))
    return q, k.repeat_interleave(times, dim=0), v.repeat_interleave(times, dim=0)


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return (scale * (q @ k.transpose(1, 2))).masked_fill(hidden, -torch.inf)


def _summed(grad: Tensor, kv_heads: int) -> Tensor:
    """``[h, n, d]`` to ``[k, n, d]``."""
    return grad.view(kv_heads, -1, *grad.shape[1:]).sum(dim=1)


def _by_token(heads: Tensor) -> Tensor:
    return heads.transpose(0, 1)
