r"""The KL-penalized clipped loss of GRPO with everything that is counted about it, in one pass over the tokens.

With :math:`r = e^{\log\pi - \log\pi_{old}}` and :math:`x = \log\pi - \log\pi_{ref}` at each token,

.. math::
    L = \sum w\,(c + \beta k),\qquad
    c = -\min\bigl(r A,\ \mathrm{clip}(r, 1 - \epsilon_{low}, 1 + \epsilon_{high}) A\bigr),\qquad
    k \in \{x,\ x^2/2,\ e^{-x} + x - 1\}

(PPO 1707.06347, GRPO 2402.03300, asymmetric epsilons DAPO 2503.14476). Where :math:`A < 0` and the ratio is above a
bound :math:`d`, :math:`c = -d A`: two-sided clipping calls it ``delta`` (2505.07291), the dual clip ``dual_clip``
(1912.09729). The gradient by the log-probs is made in the same pass and only scaled in the backward. Ties split it as
``torch.minimum`` and ``torch.clamp`` do. Where a clip binds it is 0, even at a ratio of inf, where autograd of the
formula would make ``0 * inf``.

This is a specialization, not a place for algorithms: it is used when a run's parts are exactly these.

Each backend offers, in its module ``grpo_loss``, with ``sums [7]`` float64 in the order of `GrpoLoss`:

``forward_backward(logprobs [b, T], old_logprobs, ref_logprobs | None, advantages, mask, weights, *, clip, kl, beta,
gradient) -> (sums, dlogprobs [b, T] | None)``
    ``advantages`` may have stride 0; the gradient is contiguous, and None when ``gradient`` is False.
``from_logits(logits [N, V], ids, inv_temperature, old_logprobs [N], ref_logprobs | None, advantages, mask, weights, *,
clip, kl, beta, softcap, scale, gradient, out) -> (sums, RowStats, dlogits [N, V] | None)``
    Rows that are masked are not read, and their gradient is exactly 0; ``out`` may be ``logits``.
``scale_(gradient, factor) -> gradient``
    Times a scalar tensor, in place; a factor of 1 must not cost a pass over the gradient.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpoforge_kernels import dispatch
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.loss_options import ClipOptions, GrpoLoss, KLForm, reference_for
from grpoforge_kernels.rows import (
    TokenStats,
    can_overwrite,
    check_ids,
    check_rows,
    inverse_temperature,
    statistics_dtype,
    unit_columns,
)

__all__ = ["ClipOptions", "GrpoLoss", "KLForm", "grpo_loss", "grpo_loss_from_logits"]

OP = "grpo_loss"


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
    dual_clip: float | None = None,
    kl: KLForm | None,
    beta: float,
) -> GrpoLoss:
    """The loss and its counts from log-probs. A masked token counts for nothing, whatever stands there.

    Args:
        logprobs: ``[b, T]`` float32 or float64; the only argument with a gradient.
        old_logprobs, ref_logprobs, advantages: ``[b, T]`` in the same dtype; expanded advantages are not copied.
        completion_mask: ``[b, T]`` bool.
        weights: ``[b, T]`` float64; a token of weight 0 adds nothing to the loss but is counted.
        kl: ``k1``, ``k2`` or ``k3``; None for no KL term. ``ref_logprobs`` is not read then.
        beta: coefficient of the KL term.

    Returns:
        `GrpoLoss`; the C++ sums are bitwise the same for any number of threads.

    Raises:
        KernelError: a shape, a dtype, an option or a KL that does not fit.
    """
    clip = ClipOptions(epsilon_low, epsilon_high, delta, dual_clip)
    ref_logprobs = reference_for(kl, ref_logprobs)
    _check_tokens(logprobs, logprobs.dtype, 2, old_logprobs, ref_logprobs, advantages, completion_mask, weights)
    tensors = (logprobs, old_logprobs, ref_logprobs, advantages, completion_mask, weights)
    if torch.compiler.is_compiling():
        loss, sums, _ = torch.ops.grpoforge.grpo_loss(*tensors, *_flat(clip), kl, beta)
    elif torch.is_grad_enabled() and logprobs.requires_grad:
        loss, sums = _GrpoLoss.apply(*tensors, clip, kl, beta)  # type: ignore[no-untyped-call]
    else:
        sums, _ = _forward(tensors, clip, kl, beta, gradient=False)
        loss = sums[0]
    return GrpoLoss(loss, *sums.unbind()[1:])


def grpo_loss_from_logits(
    logits: Tensor,
    ids: Tensor,
    temperature: Tensor | float,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
    dual_clip: float | None = None,
    kl: KLForm | None,
    beta: float,
    softcap: float | None = None,
    scale: float = 1.0,
    overwrite_logits: bool = False,
) -> tuple[GrpoLoss, TokenStats]:
    """`grpo_loss` of the log-probs that `selective_log_softmax` would give: each row of logits is read once.

    The gradient of a row is made while the row is still in a cache, so it exists when the forward returns, and the
    backward only scales it. The graph can be gone through once.

    Args:
        logits: ``[N, V]``, float32, bfloat16, float16 or float64; the only argument with a gradient.
        ids: ``[N]`` int64, each in ``[0, V)`` where the mask is True.
        temperature: ``[N]`` or one number, positive.
        old_logprobs, ref_logprobs, advantages: ``[N]`` float32 (float64 for float64 logits).
        weights: ``[N]`` float64.
        mask: ``[N]`` bool; rows where it is False are not read, and their gradient is 0.
        overwrite_logits: the *forward* may write the gradient over the logits, under the conditions of
            `selective_log_softmax`. Only for logits that nothing else reads.

    Other options as in `grpo_loss` and `selective_log_softmax`.

    Returns:
        `GrpoLoss`, and `TokenStats` without gradient.

    Raises KernelError as they do, and at a second backward.
    """
    clip = ClipOptions(epsilon_low, epsilon_high, delta, dual_clip)
    ref_logprobs = reference_for(kl, ref_logprobs)
    check_rows(logits, ids, mask, softcap, scale)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    dtype = statistics_dtype(logits.dtype)
    _check_tokens(ids, dtype, 1, old_logprobs, ref_logprobs, advantages, mask, weights)
    inv_temperature = inverse_temperature(temperature, logits)
    tensors = (logits, ids, inv_temperature, old_logprobs, ref_logprobs, advantages, mask, weights)
    if torch.compiler.is_compiling():
        operands = (*tensors, *_flat(clip), kl, beta, softcap, scale)
        loss, sums, *stats, _ = torch.ops.grpoforge.grpo_loss_from_logits(*operands)
    elif torch.is_grad_enabled() and logits.requires_grad:
        overwrite = overwrite_logits and can_overwrite(logits)
        loss, sums, *stats = _FromLogits.apply(*tensors, clip, kl, beta, softcap, scale, overwrite)  # type: ignore[no-untyped-call]
    else:
        sums, stats, _ = _forward_logits(tensors, clip, kl, beta, softcap, scale, gradient=False, out=None)
        loss = sums[0]
    return GrpoLoss(loss, *sums.unbind()[1:]), TokenStats(*stats)


def _flat(clip: ClipOptions) -> tuple[float, float, float | None, float | None]:
    return clip.epsilon_low, clip.epsilon_high, clip.delta, clip.dual_clip


def _check_tokens(
    like: Tensor,
    dtype: torch.dtype,
    num_axes: int,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
) -> None:
    shape = like.shape
    if dtype not in (torch.float32, torch.float64) or len(shape) != num_axes:
        raise KernelError(f"log-probs are {dtype} {list(shape)}, not float32 or float64 [b, T]")
    for name, tensor, wanted in (
        ("old_logprobs", old_logprobs, dtype),
        ("ref_logprobs", ref_logprobs, dtype),
        ("advantages", advantages, dtype),
        ("mask", mask, torch.bool),
        ("weights", weights, torch.float64),
    ):
        if tensor is None:
            continue
        if tensor.dtype != wanted or tensor.shape != shape:
            raise KernelError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {wanted} {list(shape)}")
        if tensor.device != like.device:
            raise KernelError(f"{name} is on {tensor.device}, not on {like.device}")


Tokens = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]
"""Log-probs, those of the old and of the reference policy, advantages, mask and weights."""
Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]
"""Logits, ids and inverse temperatures; then as in `Tokens` from the old log-probs on."""


def _module(values: Tensor) -> ModuleType:
    return dispatch.backend(OP, values.device, values.dtype)


def _forward(
    tensors: Tokens, clip: ClipOptions, kl: KLForm | None, beta: float, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    results: tuple[Tensor, Tensor | None] = _module(tensors[0]).forward_backward(
        *tensors, clip=clip, kl=kl, beta=beta, gradient=gradient
    )
    return results


def _forward_logits(
    tensors: Rows,
    clip: ClipOptions,
    kl: KLForm | None,
    beta: float,
    softcap: float | None,
    scale: float,
    *,
    gradient: bool,
    out: Tensor | None,
) -> tuple[Tensor, TokenStats, Tensor | None]:
    logits, ids, inv_temperature, *_, mask, _ = tensors
    check_ids(ids, logits.shape[1], mask)
    module = _module(logits)
    options = {"clip": clip, "kl": kl, "beta": beta, "softcap": softcap, "scale": scale}
    sums, stats, dlogits = module.from_logits(unit_columns(logits), *tensors[1:], **options, gradient=gradient, out=out)
    rows = dispatch.backend("selective_log_softmax", logits.device, logits.dtype)
    return sums, rows.finish(stats, inv_temperature), dlogits


class _GrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, clip, kl, beta = args
        ctx.module, ctx.options = _module(tensors[0]), {"clip": clip, "kl": kl, "beta": beta, "gradient": True}
        sums, ctx.gradient = ctx.module.forward_backward(*tensors, **ctx.options)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(sums)
        return torch.select_copy(sums, 0, 0), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # The first backward gives the gradient away, which saves its memory; another one makes it anew.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            _, gradient = ctx.module.forward_backward(*ctx.saved_tensors, **ctx.options)
        return (ctx.module.scale_(gradient, upstream), *(None,) * 8)


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, clip, kl, beta, softcap, scale, overwrite = args
        logits = tensors[0]
        out = logits.detach() if overwrite else None
        sums, stats, ctx.gradient = _forward_logits(
            tuple(tensors), clip, kl, beta, softcap, scale, gradient=True, out=out
        )
        if overwrite:
            # The version tells autograd, should anything else have saved these logits, that they are gone.
            torch.autograd.graph.increment_version(logits)
        ctx.mark_non_differentiable(sums, *stats)
        return sums[0].clone(), sums, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient is None:
            raise KernelError(
                "a second backward pass reached a fused loss whose gradient the first one gave away",
                "use selective_log_softmax and grpo_loss to go back through the logits twice",
            )
        gradient, ctx.gradient = ctx.gradient, None
        return (_module(gradient).scale_(gradient, upstream), *(None,) * 13)


_OPTIONS = "float epsilon_low, float epsilon_high, float? delta, float? dual_clip, str? kl, float beta"
_TOKENS = "Tensor old_logprobs, Tensor? ref_logprobs, Tensor advantages, Tensor mask, Tensor weights"


@torch.library.custom_op(
    f"grpoforge::{OP}",
    mutates_args=(),
    schema=f"(Tensor logprobs, {_TOKENS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _op(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, old, ref, advantages, mask, weights, *options = args
    _check_tokens(logprobs, logprobs.dtype, 2, old, ref, advantages, mask, weights)
    sums, gradient = _forward(args[:6], ClipOptions(*options[:4]), *options[4:], gradient=True)
    assert gradient is not None
    return sums[0].clone(), sums, gradient


@torch.library.custom_op(
    f"grpoforge::{OP}_from_logits",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor ids, Tensor inv_temperature, {_TOKENS}, {_OPTIONS}, float? softcap, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op_from_logits(*args: Any) -> tuple[Tensor, ...]:
    logits, ids, _, old, ref, advantages, mask, weights = args[:8]
    _check_tokens(ids, statistics_dtype(logits.dtype), 1, old, ref, advantages, mask, weights)
    clip = ClipOptions(*args[8:12])
    sums, stats, gradient = _forward_logits(args[:8], clip, *args[12:], gradient=True, out=None)
    assert gradient is not None
    return sums[0].clone(), sums, *stats, gradient


@_op.register_fake
def _op_fake(logprobs: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    sums = logprobs.new_empty(len(GrpoLoss._fields), dtype=torch.float64)
    return sums.new_empty(()), sums, logprobs.new_empty(logprobs.shape)


@_op_from_logits.register_fake
def _op_from_logits_fake(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    sums = logits.new_empty(len(GrpoLoss._fields), dtype=torch.float64)
    stats = [logits.new_empty(logits.shape[0], dtype=statistics_dtype(logits.dtype)) for _ in TokenStats._fields]
    return sums.new_empty(()), sums, *stats, logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * upstream, *(None,) * (ctx.num_inputs - 1))


_op.register_autograd(_differentiate, setup_context=_save)
_op_from_logits.register_autograd(_differentiate, setup_context=_save)
