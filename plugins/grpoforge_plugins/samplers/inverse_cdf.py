"""One token from each row of logits, by inversion of the cumulative distribution: exact, and one uniform per token.

``torch.multinomial`` draws an exponential for every token of the vocabulary instead, ten times the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """What is left out of a distribution before a token is drawn; the default leaves out nothing.

    In this order: all but the ``top_k`` most probable tokens; of the rest, all but the smallest set that has ``top_p``
    of its probability; tokens below ``min_p`` of the most probable one. Ties with the last token that is kept stay.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def any(self) -> bool:
        """Whether anything is left out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def draw(logits: Tensor, temperatures: Tensor, uniforms: Tensor, cuts: Cuts) -> Tensor:
    """The first token whose cumulative probability exceeds the row's uniform number, ``[n]`` int64.

    Args:
        logits: ``[n, V]``.
        temperatures: ``[n]``, positive.
        uniforms: ``[n]`` float64 in ``[0, 1)``.
        cuts: what is left out first.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.to(wide) / temperatures.to(wide)[:, None]
    weights = (scaled - scaled.amax(dim=1, keepdim=True)).exp()
    if cuts.any:
        weights = weights * _kept(weights, cuts)
    cumulative = weights.double().cumsum(dim=1)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _kept(weights: Tensor, cuts: Cuts) -> Tensor:
    """Which of ``weights [n, V]``, 1 for the most probable token, may be drawn: ``[n, V]`` bool."""
    least = torch.full_like(weights[:, :1], cuts.min_p)
    if cuts.top_k or cuts.top_p < 1.0:
        count = min(cuts.top_k or weights.shape[1], weights.shape[1])
        ordered = weights.topk(count, dim=1).values.double()
        before = ordered.cumsum(dim=1) - ordered
        # A token stays when those before it do not have `top_p` of what is left by themselves; so does the first.
        inside = before < cuts.top_p * ordered.sum(dim=1, keepdim=True)
        last = inside.sum(dim=1, keepdim=True).clamp(min=1) - 1
        least = least.maximum(ordered.gather(1, last).to(least.dtype))
    return weights >= least
