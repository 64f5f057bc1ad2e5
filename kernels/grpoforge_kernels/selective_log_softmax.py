r"""Log-prob, entropy and logsumexp of the chosen tokens, one read of the logits, with an exact gradient.

The gradient of *any* scalar loss of the three is one more pass, driven by three numbers for each row: their derivatives
(`grpoforge_kernels.reference.selective_log_softmax` has the equation). That pass reads the logits once and writes
their gradient once, over the logits themselves when the caller allows it.

In eager mode an ``autograd.Function`` calls the backend; under ``torch.compile`` the same code is reached through the
operators ``grpoforge::selective_log_softmax`` and ``grpoforge::selective_log_softmax_backward``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpoforge_kernels import dispatch
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.rows import (
    RowStats,
    TokenStats,
    can_overwrite,
    check_ids,
    check_rows,
    inverse_temperature,
    statistics_dtype,
    unit_columns,
)

__all__ = ["TokenStats", "selective_log_softmax"]

OP = "selective_log_softmax"

Numbers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Log-prob, entropy, logsumexp; then maximum, total and weighted sum, which the backward needs."""


def selective_log_softmax(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | float,
    *,
    mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    overwrite_logits: bool = False,
) -> TokenStats:
    r"""Log-prob of the chosen tokens, entropy and logsumexp of the distributions they came from.

    With ``x = scale * logits`` (``softcap * tanh(x / softcap)`` when there is a softcap) and ``z = x / temperature``
    for each row: ``logprobs[n] = z[n, ids[n]] - logsumexp(z[n])``, ``entropy[n] = -sum_v p_v ln p_v`` in nats with
    ``p = softmax(z[n])``, and ``logsumexp[n]``. All three have exact gradients by the logits; none by the temperature.

    Args:
        logits: ``[N, V]``, float32, bfloat16, float16 or float64, any stride. ``-inf`` bans a token,
            unless there is a softcap, which bounds it as any other: to ``-softcap``.
        ids: ``[N]`` int64, each in ``[0, V)`` where the mask is True.
        temperature: ``[N]`` or one number, positive.
        mask: ``[N]`` bool; rows where it is False are not read, and give 0 and gradient 0.
        softcap: logits are bounded by it, as in Gemma.
        scale: factor on the logits, as in Cohere's models, positive.
        overwrite_logits: the backward may write the gradient over the logits, which saves the memory of a second
            ``[N, V]``. Only for logits that nothing else reads. Leaves, logits whose rows overlap or had to be copied,
            and code under ``torch.compile`` keep their logits; a view of a leaf does not, and takes the leaf with it.

    Returns:
        `TokenStats`, ``[N]`` each, float32 (float64 for float64 logits).

    Raises:
        KernelError: shapes that do not fit, an id outside the vocabulary, a temperature, softcap or scale that is not
            positive, or a second backward over logits that the first one overwrote.
    """
    check_rows(logits, ids, mask, softcap, scale)
    inv_temperature = inverse_temperature(temperature, logits)
    if torch.compiler.is_compiling():
        numbers = torch.ops.grpoforge.selective_log_softmax(logits, ids, inv_temperature, mask, softcap, scale)
        return TokenStats(*numbers[:3])
    overwrite = overwrite_logits and can_overwrite(logits)
    apply: Any = _SelectiveLogSoftmax.apply
    return TokenStats(*apply(logits, ids, inv_temperature, mask, softcap, scale, overwrite))


def _forward(
    logits: Tensor, ids: Tensor, inv_temperature: Tensor, mask: Tensor | None, softcap: float | None, scale: float
) -> tuple[TokenStats, RowStats]:
    check_ids(ids, logits.shape[1], mask)
    module = dispatch.backend(OP, logits.device, logits.dtype)
    rows = unit_columns(logits)
    stats = module.row_stats(rows, ids, inv_temperature, mask=mask, softcap=softcap, scale=scale, entropy=True)
    return module.finish(stats, inv_temperature), stats


def _backward(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
    stats: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor | None, ...],
    out: Tensor | None,
) -> Tensor:
    module = dispatch.backend(OP, logits.device, logits.dtype)
    zero = torch.zeros_like(stats[0])
    g, h, l = (zero if one is None else one.contiguous() for one in upstream)  # noqa: E741
    gradient: Tensor = module.row_gradient(
        unit_columns(logits), ids, inv_temperature, RowStats(*stats, chosen=zero), g, h, l,
        mask=mask, softcap=softcap, scale=scale, out=out,
    )  # fmt: skip
    return gradient


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        inv_temperature: Tensor,
        mask: Tensor | None,
        softcap: float | None,
        scale: float,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        results, stats = _forward(logits, ids, inv_temperature, mask, softcap, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, ids, inv_temperature, mask, *stats[:3])
        ctx.options, ctx.overwrite, ctx.is_spent = (softcap, scale), overwrite, False
        return results.logprobs, results.entropy, results.logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.is_spent:
            raise KernelError(
                "a second backward pass reached logits that the first one overwrote with their gradient",
                "call selective_log_softmax with overwrite_logits=False to go back through it twice",
            )
        if all(one is None for one in upstream):
            return (None,) * 7
        logits, ids, inv_temperature, mask, maximum, total, weighted = ctx.saved_tensors
        softcap, scale = ctx.options
        out = None
        if ctx.overwrite:
            # The version tells autograd, should anything else have saved these logits, that they are gone.
            out, ctx.is_spent = logits.detach(), True
            torch.autograd.graph.increment_version(logits)
        stats = (maximum, total, weighted)
        gradient = _backward(logits.detach(), ids, inv_temperature, mask, softcap, scale, stats, upstream, out)
        return gradient, None, None, None, None, None, None


_SCHEMA = "(Tensor logits, Tensor ids, Tensor inv_temperature, Tensor? mask, float? softcap, float scale"


@torch.library.custom_op(
    f"grpoforge::{OP}",
    mutates_args=(),
    schema=f"{_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(
    logits: Tensor, ids: Tensor, inv_temperature: Tensor, mask: Tensor | None, softcap: float | None, scale: float
) -> Numbers:
    results, stats = _forward(logits, ids, inv_temperature, mask, softcap, scale)
    return (*results, stats.maximum, stats.total, stats.weighted)


@torch.library.custom_op(
    f"grpoforge::{OP}_backward",
    mutates_args=(),
    schema=f"{_SCHEMA}, Tensor maximum, Tensor total, Tensor weighted, Tensor g, Tensor h, Tensor l) -> Tensor",
)
def _op_backward(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
    maximum: Tensor,
    total: Tensor,
    weighted: Tensor,
    g: Tensor,
    h: Tensor,
    l: Tensor,  # noqa: E741
) -> Tensor:
    stats = (maximum, total, weighted)
    return _backward(logits, ids, inv_temperature, mask, softcap, scale, stats, (g, h, l), None)


@_op.register_fake
def _op_fake(logits: Tensor, *_: Any) -> Numbers:
    dtype = statistics_dtype(logits.dtype)
    one, two, three, four, five, six = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(6))
    return one, two, three, four, five, six


@_op_backward.register_fake
def _op_backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Numbers) -> None:
    logits, ids, inv_temperature, mask, *ctx.options = inputs
    ctx.save_for_backward(logits, ids, inv_temperature, mask, *output[3:])
    ctx.mark_non_differentiable(*output[3:])


def _differentiate(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    logits, ids, inv_temperature, mask, *stats = ctx.saved_tensors
    gradient = torch.ops.grpoforge.selective_log_softmax_backward(
        logits, ids, inv_temperature, mask, *ctx.options, *stats, *upstream[:3]
    )
    return gradient, None, None, None, None, None


_op.register_autograd(_differentiate, setup_context=_save)
