"""Attention over packed rows: a prompt sees itself, a completion sees its prompt and itself, and nothing is repeated.

A completion's query ``q`` attends to the keys of its prompt and to those of its own row up to itself. Softmax over both
is made of the two parts, each with its own normalizer ``l = logsumexp(scores)``:

    out = exp(l_p - l) out_p + exp(l_o - l) out_o,      l = log(exp(l_p) + exp(l_o))

In the backward pass each part needs only ``out`` and ``l`` of the whole (FlashAttention, 2205.14135; the parts are
those of ring attention, 2310.01889): ``P = exp(scores - l)``, ``dS = P * (dO V' - rowsum(dO * out))``. No score matrix
is kept, and no mask is larger than one flag per prompt token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Keys = tuple[Tensor, Tensor]
"""Keys and values, ``[b, h, s, d]`` each."""
Result = tuple[Tensor, Tensor]
"""Output ``[b, h, t, d]`` and logsumexp of the scores ``[b, h, t]``."""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Some tokens of a packed sequence as rows of one width."""

    cells: Tensor
    """``[n]``: the cell of each token, counted row by row."""
    rows: int
    width: int

    @property
    def is_full(self) -> bool:
        """True when no cell is without a token: then the tokens are the cells."""
        return len(self.cells) == self.rows * self.width

    def spread(self, tokens: Tensor) -> Tensor:
        """``tokens [n, h, ...]`` to ``[rows, h, width, ...]``, 0 in cells without a token."""
        if not self.is_full:
            cells = tokens.new_zeros((self.rows * self.width, *tokens.shape[1:]))
            tokens = cells.index_copy_(0, self.cells, tokens)
        return tokens.reshape(self.rows, self.width, *tokens.shape[1:]).transpose(1, 2)

    def collect(self, cells: Tensor) -> Tensor:
        """``cells [rows, h, width, ...]`` back to ``[n, h, ...]``."""
        tokens = cells.transpose(1, 2).flatten(0, 1)
        return tokens if self.is_full else tokens.index_select(0, self.cells)

    def is_padding(self) -> Tensor:
        """``[rows, width]`` bool: cells without a token."""
        empty = torch.ones(self.rows * self.width, dtype=torch.bool, device=self.cells.device)
        empty[self.cells] = False
        return empty.view(self.rows, self.width)


@dataclass(frozen=True, slots=True)
class Levels:
    """How attention sees a packed sequence: distinct prompts first, then the completions that look at them."""

    prompts: Rectangle
    """The first tokens, a row for each distinct prompt."""
    asking: Rectangle
    """The other tokens, a row for each prompt: the completions that look at it, one behind the other."""
    completions: Rectangle
    """The other tokens again, a row for each completion."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompts.cells)


class Part(Protocol):
    """Attention of queries ``[b, h, t, d]`` to keys of one kind, and its gradient.

    ``bias`` is ``[b, 1, 1, s]``, added to the scores; ``causal``: query ``i`` sees the keys up to ``i``.
    """

    def forward(self, query: Tensor, keys: Keys, bias: Tensor | None, causal: bool) -> Result: ...

    def backward(
        self, grad: Tensor, query: Tensor, keys: Keys, whole: Result, bias: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, keys and values, given output and logsumexp of all the keys that the queries see."""
        ...


@dataclass(frozen=True, slots=True)
class FlashOnCPU:
    """Torch's flash attention for CPUs, tile by tile."""

    scale: float

    def forward(self, query: Tensor, keys: Keys, bias: Tensor | None, causal: bool) -> Result:
        """See `Part`."""
        output, logsumexp = _flash(query, *keys, 0.0, causal, attn_mask=bias, scale=self.scale)
        return output, logsumexp

    def backward(
        self, grad: Tensor, query: Tensor, keys: Keys, whole: Result, bias: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Part`."""
        given = (grad, query, *keys, *whole, 0.0, causal)
        d_query, d_key, d_value = _flash_backward(*given, attn_mask=bias, scale=self.scale)
        return d_query, d_key, d_value


@dataclass(frozen=True, slots=True)
class Written:
    """The formulas in plain torch, for every device, with a soft cap on the scores (``cap * tanh(s / cap)``).

    Holds the scores of one part at a time, ``[b, h, t, s]``.
    """

    scale: float
    softcap: float | None = None

    def _scores(self, query: Tensor, key: Tensor, bias: Tensor | None, causal: bool) -> tuple[Tensor, Tensor | float]:
        """Scores, and their derivative with respect to what the cap is put on."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query @ key.transpose(2, 3)).to(wide) * self.scale
        slope: Tensor | float = 1.0
        if self.softcap is not None:
            bent = torch.tanh(scores / self.softcap)
            scores, slope = self.softcap * bent, 1 - bent.square()
        if bias is not None:
            scores = scores + bias
        if causal:
            hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores, slope

    def forward(self, query: Tensor, keys: Keys, bias: Tensor | None, causal: bool) -> Result:
        """See `Part`."""
        scores, _ = self._scores(query, keys[0], bias, causal)
        logsumexp = scores.logsumexp(dim=3)
        return (scores - logsumexp[..., None]).exp().to(query.dtype) @ keys[1], logsumexp

    def backward(
        self, grad: Tensor, query: Tensor, keys: Keys, whole: Result, bias: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Part`."""
        key, value = keys
        output, logsumexp = whole
        scores, slope = self._scores(query, key, bias, causal)
        weights = (scores - logsumexp[..., None]).exp()
        inner = (grad @ value.transpose(2, 3)).to(scores.dtype)
        total = (grad.to(scores.dtype) * output.to(scores.dtype)).sum(dim=3, keepdim=True)
        d_scores = (weights * (inner - total) * slope * self.scale).to(query.dtype)
        d_value = weights.to(query.dtype).transpose(2, 3) @ grad
        return d_scores @ key, d_scores.transpose(2, 3) @ query, d_value


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, levels: Levels, *, scale: float, softcap: float | None
) -> Tensor:
    """Attention of a packed sequence, with gradient.

    Args:
        query: ``[N, h, d]``.
        key: ``[N, k, d]``; every ``h / k`` heads of the queries share one.
        value: ``[N, k, d]``.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``.

    Returns:
        ``[N, h, d]``.
    """
    is_plain = query.device.type == "cpu" and softcap is None
    part: Part = FlashOnCPU(scale) if is_plain else Written(scale, softcap)
    output: Tensor = _PrefixAttention.apply(query, key, value, levels, part)  # type: ignore[no-untyped-call]
    return output


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, levels: Levels, part: Part) -> Tensor:
        split = levels.num_prompt_tokens
        prompts, asking, completions = levels.prompts, levels.asking, levels.completions
        shared, own = _keys(key, value, levels, query.shape[1])
        bias = _bias(levels, query)

        output, logsumexp = part.forward(prompts.spread(query[:split]), shared, None, True)
        of_prompts = prompts.collect(output), prompts.collect(logsumexp)
        output, logsumexp = part.forward(asking.spread(query[split:]), shared, bias, False)
        to_prompt = asking.collect(output), asking.collect(logsumexp)
        output, logsumexp = part.forward(completions.spread(query[split:]), own, None, True)
        of_completions = _merge(to_prompt, (completions.collect(output), completions.collect(logsumexp)))

        whole = [torch.cat(both) for both in zip(of_prompts, of_completions, strict=True)]
        ctx.save_for_backward(query, key, value, *whole)
        ctx.levels, ctx.part = levels, part
        return whole[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        levels: Levels = ctx.levels
        split = levels.num_prompt_tokens
        shared, own = _keys(key, value, levels, query.shape[1])
        tokens = (grad, query, output, logsumexp)

        def drive(
            spread: Callable[[Tensor], Tensor], part: slice, keys: Keys, bias: Tensor | None, causal: bool
        ) -> Any:
            above, asked, *whole = (spread(one[part]) for one in tokens)
            return ctx.part.backward(above, asked, keys, tuple(whole), bias, causal)

        first, rest = slice(0, split), slice(split, None)
        prompts, asking, completions = levels.prompts, levels.asking, levels.completions
        q_prompts, *k_prompts = drive(prompts.spread, first, shared, None, True)
        q_asking, *k_asking = drive(asking.spread, rest, shared, _bias(levels, query), False)
        q_own, *k_own = drive(completions.spread, rest, own, None, True)
        d_query = torch.cat([prompts.collect(q_prompts), asking.collect(q_asking) + completions.collect(q_own)])
        d_keys = [
            torch.cat([prompts.collect(_summed(by_prompt + by_asking, key)), completions.collect(_summed(by_own, key))])
            for by_prompt, by_asking, by_own in zip(k_prompts, k_asking, k_own, strict=True)
        ]
        return d_query, d_keys[0], d_keys[1], None, None


def _keys(key: Tensor, value: Tensor, levels: Levels, heads: int) -> tuple[Keys, Keys]:
    """Keys and values of the prompts ``[P, h, L, d]`` and of the completions ``[b, h, T, d]``."""
    split, times = levels.num_prompt_tokens, heads // key.shape[1]
    shared = [levels.prompts.spread(one[:split]).repeat_interleave(times, dim=1) for one in (key, value)]
    own = [levels.completions.spread(one[split:]).repeat_interleave(times, dim=1) for one in (key, value)]
    return (shared[0], shared[1]), (own[0], own[1])


def _summed(grad: Tensor, key: Tensor) -> Tensor:
    """``[b, h, s, d]`` to ``[b, k, s, d]``: the gradient of heads that were repeated."""
    rows, heads, *rest = grad.shape
    return grad.reshape(rows, key.shape[1], heads // key.shape[1], *rest).sum(dim=2)


def _bias(levels: Levels, like: Tensor) -> Tensor | None:
    """``[P, 1, 1, L]``: 0 on prompt tokens, minus infinity on padding; None where there is none."""
    prompts = levels.prompts
    if prompts.is_full:
        return None
    bias = torch.zeros(prompts.rows, prompts.width, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(prompts.is_padding(), -torch.inf)[:, None, None, :]


def _merge(one: Result, other: Result) -> Result:
    """Attention to both sets of keys, of tokens ``[n, h, d]`` with logsumexp ``[n, h]``."""
    logsumexp = torch.logaddexp(one[1], other[1])
    first, second = (output * (part - logsumexp).exp()[..., None].to(output.dtype) for output, part in (one, other))
    return first + second, logsumexp
