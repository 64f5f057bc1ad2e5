r"""Log-prob, entropy and logsumexp straight from hidden states: the ``[N, V]`` logits never exist.

It serves any loss. The vocabulary is swept in panels, and the backward makes the logits again: :math:`8NHV`
floating-point operations, peak extra memory of one panel. When the weight takes no gradient (LoRA), the forward carries
an expectation instead, and the backward is a row scaling: :math:`4NHV`. For losses that are sums over chunks of rows,
`grpoforge_kernels.linear_loss` needs :math:`6NHV`.

With :math:`g, h, l` the derivatives of the loss by log-prob, entropy and logsumexp, the gradient of the scores is that
of `grpoforge_kernels.reference.selective_log_softmax`; rows where all three are 0, and masked rows, are left out of
every product. The products are torch's and the row kernels are those of ``selective_log_softmax``. For bfloat16 on CPUs
that multiply it, `grpoforge_kernels.cpp.linear` does the same in one pass, within the same memory: without a softcap,
for at most 2048 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpoforge_kernels import dispatch
from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.linear_panels import (
    ACCELERATOR_CHUNK_BYTES,
    CPU_CHUNK_BYTES,
    WIDTH_MULTIPLE,
    Expectation,
    Gradients,
    Head,
    Rows,
    Sweep,
    Upstream,
    backward,
    block_size,
    column_bytes,
    forward,
    take_stats,
)
from grpoforge_kernels.rows import (
    RowStats,
    TokenStats,
    check_ids,
    check_rows,
    finish,
    inverse_temperature,
    statistics_dtype,
)

__all__ = ["TokenStats", "linear_logprobs", "peak_extra_bytes"]

OP = "linear_logprobs"


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
    chunk_bytes: int | None = None,
    skip_zero_rows: bool = True,
) -> TokenStats:
    r"""`selective_log_softmax` of ``hidden @ weight.T + bias``, with exact gradients for all three.

    Logits are float32 also for bfloat16 inputs, whose products are then bfloat16 with float32 sums where the processor
    has them. Gradients are summed in float32 and rounded once. Peak extra memory, beside results and gradients, is
    `peak_extra_bytes`. With a ``weight`` (and ``bias``) that requires no gradient, the backward costs no product
    unless the loss uses the entropy.

    Args:
        hidden: ``[N, H]``, float32, bfloat16, float16 or float64.
        weight: ``[V, H]`` in the dtype of ``hidden``; may be tied to the embeddings.
        ids: ``[N]`` int64, each in ``[0, V)`` where the mask is True.
        temperature: ``[N]`` or one number, positive; without gradient.
        bias: ``[V]``.
        mask: ``[N]`` bool; rows where it is False are not read, and give 0 and gradient 0.
        softcap: logits ``x = scale * (...)`` become ``softcap * tanh(x / softcap)``.
        scale: factor on the logits.
        chunk_bytes: what a panel of the vocabulary may take; by default 24 MiB for 8 threads of a CPU
            (their cache), else 512 MiB.
        skip_zero_rows: False computes also what is multiplied by 0, to measure what skipping saves. What is skipped are
            exact zeros, so gradients differ by no more than the order in which products of other sizes are summed,
            which is within their bounds, and those of hidden states and bias in one pass of C++ by no bit.

    Returns:
        `TokenStats`, ``[N]`` each, float32 (float64 for float64 inputs).

    Raises:
        KernelError: shapes, dtypes or devices that do not fit, an id outside the vocabulary, a temperature, softcap
            or scale that is not positive.
    """
    check_inputs(hidden, weight, bias, ids, mask, softcap, scale)
    inv_temperature = inverse_temperature(temperature, hidden)
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(hidden.device)
    needs = [one is not None and one.requires_grad and torch.is_grad_enabled() for one in (hidden, weight, bias)]
    results = torch.ops.grpoforge.linear_logprobs(
        hidden, weight, bias, ids, inv_temperature, mask, softcap, scale,
        chunk_bytes, skip_zero_rows, needs == [True, False, False],
    )  # fmt: skip
    return TokenStats(*results[:3])


def default_chunk_bytes(device: torch.device) -> int:
    """What a panel may take when the caller does not say; more than 8 threads of a CPU have more cache."""
    if device.type != "cpu":
        return ACCELERATOR_CHUNK_BYTES
    return CPU_CHUNK_BYTES * max(1, torch.get_num_threads() // 8)


def peak_extra_bytes(hidden: Tensor, weight: Tensor, *, chunk_bytes: int | None = None, chunk_rows: int = 0) -> int:
    """The most that the operations of this module hold beside inputs, results and gradients, from shapes and dtypes.

    With ``w`` bytes in the statistics' dtype (4; 8 for float64) and ``h`` in that of the weight:

    - `linear_logprobs`: ``chunk_bytes + 3 N H w + 32 N w``: a panel, then the rows that take part in the dtype of the
      products, their gradient, and the expectation that a frozen head keeps for the backward;
    - ``linear_loss`` (``chunk_rows`` > 0): that, with the logits of a chunk, ``chunk_rows V w``, and, for a weight in
      half precision and more than one chunk, its gradient in float32, ``V H w``.

    A panel is at least 64 tokens wide; ``chunk_bytes`` below that count as that.
    """
    num_rows, (vocab_size, hidden_size) = len(hidden), weight.shape
    head = Head(weight, None, None, 1.0)
    wide = head.wide.itemsize
    chunk_bytes = default_chunk_bytes(hidden.device) if chunk_bytes is None else chunk_bytes
    block = block_size(chunk_rows or num_rows, head)
    panel = max(chunk_bytes, WIDTH_MULTIPLE * column_bytes(block, hidden_size, head))
    rows = 3 * num_rows * hidden_size * wide + 32 * num_rows * wide
    is_summed = 0 < chunk_rows < num_rows and weight.dtype != head.wide
    summed = vocab_size * hidden_size * wide if is_summed else 0
    return panel + rows + chunk_rows * vocab_size * wide + summed


def check_inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
) -> None:
    """Stop unless these fit together, on one device, and softcap and scale are usable.

    ``hidden [N, H]`` and ``weight [V, H]`` are floats of one dtype, ``bias [V]``, ``ids [N]`` int64, ``mask [N]`` bool.

    Raises:
        KernelError: they do not.
    """
    if hidden.ndim != 2 or not hidden.is_floating_point() or hidden.shape[1] == 0:
        raise KernelError(f"hidden is {hidden.dtype} {list(hidden.shape)}, not floats [N, H]")
    hidden_size = hidden.shape[1]
    if weight.ndim != 2 or weight.shape[1] != hidden_size or weight.shape[0] == 0 or weight.dtype != hidden.dtype:
        raise KernelError(
            f"weight is {weight.dtype} {list(weight.shape)}, not {hidden.dtype} [V, {hidden_size}]",
            "hidden states and output layer must share one dtype and hidden size",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelError(f"bias has shape {list(bias.shape)}, not [{weight.shape[0]}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise KernelError(f"{name} is on {tensor.device}, not on {hidden.device}")
    check_rows(hidden, ids, mask, softcap, scale)


def index_of(wanted: Tensor | None) -> Tensor | None:
    """Where ``wanted [N]`` bool is True; None when that is everywhere, so that nothing is copied."""
    return None if wanted is None or bool(wanted.all()) else wanted.nonzero().squeeze(1)


def spread(values: Tensor, index: Tensor | None, num_rows: int) -> Tensor:
    """``values`` of the rows of an index in all rows, 0 elsewhere."""
    return values if index is None else values.new_zeros((num_rows, *values.shape[1:])).index_copy_(0, index, values)


def _spread_stats(stats: RowStats, index: Tensor | None, num_rows: int) -> RowStats:
    if index is None:
        return stats
    # A row left out is a distribution over one token, of which `finish` makes 0, 0, 0.
    maximum, total, weighted, chosen = stats
    whole = total.new_ones(num_rows).index_copy_(0, index, total)
    others = (spread(values, index, num_rows) for values in (maximum, weighted, chosen))
    return RowStats(next(others), whole, *others)


_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor inv_temperature, Tensor? mask, float? softcap, "
    "float scale, int chunk_bytes, bool skip_zero_rows"
)


@torch.library.custom_op(
    f"grpoforge::{OP}",
    mutates_args=(),
    schema=f"{_SCHEMA}, bool frozen) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    inv_temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
    chunk_bytes: int,
    skip_zero_rows: bool,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, logsumexp, the row statistics ``[4, N]`` and, for a frozen head, its expectation."""
    check_ids(ids, len(weight), mask)
    head, num_rows = Head(weight, bias, softcap, scale), len(ids)
    rows = Rows(hidden, ids, inv_temperature)
    index = index_of(mask)
    if index is not None:
        rows = rows.take(index)
    rows = rows._replace(hidden=rows.hidden.to(head.operand))
    stats, expectation = _forward(head, rows, chunk_bytes, frozen)
    kept = hidden.new_empty((0, hidden.shape[1]), dtype=head.wide)
    if expectation is not None:
        kept = spread(expectation, index, num_rows)
    stats = _spread_stats(stats, index, num_rows)
    tokens = finish(stats, inv_temperature)
    return (*tokens, torch.stack(stats), kept)


@torch.library.custom_op(
    f"grpoforge::{OP}_backward",
    mutates_args=(),
    schema=f"{_SCHEMA}, Tensor logprobs, Tensor stats, Tensor expectation, Tensor? g, Tensor? h, Tensor? l, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor)",
)
def _op_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    inv_temperature: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
    chunk_bytes: int,
    skip_zero_rows: bool,
    logprobs: Tensor,
    stats: Tensor,
    expectation: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    l: Tensor | None,  # noqa: E741
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for hidden, weight and bias; empty where not needed."""
    head = Head(weight, bias, softcap, scale)
    upstream = Upstream(*(torch.zeros_like(logprobs) if one is None else one.to(logprobs.dtype) for one in (g, h, l)))
    live = upstream.live() if skip_zero_rows else None
    index = index_of(live if mask is None else mask if live is None else live & mask)
    rows, row_stats = Rows(hidden, ids, inv_temperature), RowStats(*stats)
    if index is not None:
        rows, row_stats, upstream = rows.take(index), take_stats(row_stats, index), upstream.take(index)
        logprobs = logprobs[index]
        expectation = expectation[index] if len(expectation) else expectation
    if len(expectation) and not bool(upstream.entropy.any()):
        gradient = _scaled_expectation(head, rows, row_stats, upstream, logprobs, expectation)
        return spread(gradient.to(hidden.dtype), index, len(ids)), weight.new_empty(0), weight.new_empty(0)
    rows = rows._replace(hidden=rows.hidden.to(head.operand))
    by_hidden, by_weight, by_bias = _backward(head, rows, row_stats, upstream, needs, chunk_bytes)
    nothing = weight.new_empty(0)
    return (
        nothing if by_hidden is None else spread(by_hidden.to(hidden.dtype), index, len(ids)),
        nothing.clone() if by_weight is None else by_weight,
        nothing.clone() if by_bias is None or bias is None else by_bias.to(bias.dtype),
    )


def _sweeps(head: Head, rows: Rows, chunk_bytes: int, *, frozen: bool = False) -> Any:
    """The same in one pass of C++, where it is there for these; None where panels are multiplied one by one."""
    module = dispatch.bfloat16_sweeps() if head.operand == torch.bfloat16 and head.weight.device.type == "cpu" else None
    is_plain = head.softcap is None and head.weight.stride(1) == 1
    if module is None or not is_plain or not 0 < len(rows.ids) <= module.MOST_ROWS:
        return None
    sweeps = module.Sweeps(head.weight, head.bias, head.scale, rows, chunk_bytes)
    return sweeps if sweeps.room_bytes(frozen=frozen) <= chunk_bytes else None


def _forward(head: Head, rows: Rows, chunk_bytes: int, frozen: bool) -> tuple[RowStats, Tensor | None]:
    """The statistics ``[N]`` and, for a frozen head, what makes its backward a row scaling, ``[N, H]``."""
    sweeps = _sweeps(head, rows, chunk_bytes, frozen=frozen)
    if sweeps is None:
        expectation = Expectation(head, len(rows.ids)) if frozen else None
        stats = forward(head, rows, Sweep(head, len(rows.ids), chunk_bytes), expectation=expectation)
        return stats, None if expectation is None else expectation.values.div_(stats.total[:, None])
    found: tuple[RowStats, Tensor | None] = sweeps.forward(frozen=frozen)
    return found


def _backward(
    head: Head, rows: Rows, stats: RowStats, upstream: Upstream, needs: Sequence[bool], chunk_bytes: int
) -> Sequence[Tensor | None]:
    """Gradients for hidden and bias, wide, and for the weight in its dtype; None where not needed."""
    sweeps = _sweeps(head, rows, chunk_bytes)
    if sweeps is not None:
        found: Sequence[Tensor | None] = sweeps.backward(stats, upstream, needs)
        return found
    into = Gradients(head, needs, len(rows.ids), head.weight.dtype)
    backward(head, rows, stats, upstream, into, Sweep(head, len(rows.ids), chunk_bytes))
    into.finish()
    return into.hidden, into.weight, into.bias


def _scaled_expectation(
    head: Head, rows: Rows, stats: RowStats, upstream: Upstream, logprobs: Tensor, expectation: Tensor
) -> Tensor:
    r"""``[N, H]``: :math:`(g (1 - p_y) + l p_y)\, s \frac{\partial z_y}{\partial x_y} W_y + (l - g) E`."""
    slope: float | Tensor = head.scale
    if head.softcap is not None:
        slope = head.scale * (1 - (stats.chosen / head.softcap) ** 2)
    chosen = upstream.logsumexp * logprobs.exp() - upstream.logprobs * torch.expm1(logprobs)
    gradient = expectation * (upstream.logsumexp - upstream.logprobs)[:, None]
    weight = head.weight[rows.ids].to(head.wide)
    return gradient.addcmul_((chosen * rows.inv_temperature * slope)[:, None], weight)


@_op.register_fake
def _op_fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, hidden_size = hidden.shape
    dtype, frozen = statistics_dtype(hidden.dtype), rest[-1]
    logprobs, entropy, logsumexp = (hidden.new_empty(num_rows, dtype=dtype) for _ in range(3))
    expectation = hidden.new_empty((num_rows if frozen else 0, hidden_size), dtype=dtype)
    return logprobs, entropy, logsumexp, hidden.new_empty((4, num_rows), dtype=dtype), expectation


@_op_backward.register_fake
def _op_backward_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = rest[-1]
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(0) if bias is None or not needs[2] else bias.new_empty(bias.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, inv_temperature, mask, *options = inputs
    logprobs, _, _, stats, expectation = output
    ctx.options = options[:-1]
    ctx.save_for_backward(hidden, weight, bias, ids, inv_temperature, mask, logprobs, stats, expectation)
    ctx.mark_non_differentiable(stats, expectation)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, logprobs, stats, expectation = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    if all(one is None for one in upstream[:3]):
        return (None,) * len(ctx.needs_input_grad)
    gradients = torch.ops.grpoforge.linear_logprobs_backward(
        *inputs, *ctx.options, logprobs, stats, expectation, *upstream[:3], needs
    )
    asked = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return (*asked, *(None,) * (len(ctx.needs_input_grad) - 3))


_op.register_autograd(_differentiate, setup_context=_save)
