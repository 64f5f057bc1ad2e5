r"""A loss on the tokens of an output layer that is a sum over chunks of rows (tokens, sequences, groups).

The gradient of a chunk is taken while its logits are there, so nothing is computed twice: :math:`6NHV` floating-point
operations against :math:`8NHV` of `grpoforge_kernels.linear_logprobs`, for the memory of the logits of one chunk.
Within a chunk the vocabulary is swept in panels that stay in cache, which is also faster than whole products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.linear_logprobs import check_inputs, default_chunk_bytes, index_of, spread
from grpoforge_kernels.linear_panels import Gradients, Head, Rows, Sweep, Upstream, backward, forward, take_stats
from grpoforge_kernels.rows import TokenStats, check_ids, finish, inverse_temperature

__all__ = ["linear_loss"]

RowLoss = Callable[[slice, TokenStats], Tensor]
"""The loss of the rows of a slice, a scalar, from their `TokenStats`."""


# Dynamo would trace into the panels and hand addresses of its own tensors to C++: gradients of 1e30, without a word.
# The public `torch.compiler.disable` loads Dynamo as soon as it is called, 1.5 s for everybody who imports this.
@_disable_dynamo
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: Tensor | float,
    loss: RowLoss,
    *,
    chunks: Sequence[slice],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int | None = None,
    skip_zero_rows: bool = True,
) -> Tensor:
    """The sum over ``chunks`` of ``loss(rows, stats)``, with gradients for ``hidden``, ``weight`` and ``bias``.

    The gradient is taken in the forward, chunk by chunk, and only scaled in the backward, which runs once. Chunks of
    256 rows and more keep the products efficient. ``loss`` gets a slice of rows and their `TokenStats` (zero where the
    mask is False) and returns a scalar; what else it wants to keep (metrics), it keeps by itself. A gradient for
    anything that it closes over would be lost, so that is an error. Under ``torch.compile`` the graph breaks here,
    since ``loss`` is Python; compiling ``loss`` itself is fine.

    Args: those of `linear_logprobs`, and
        loss: called once for each chunk, in order.
        chunks: slices of the rows, ascending and disjoint; rows in none of them contribute nothing.

    Returns:
        A scalar in the dtype that ``loss`` returns.

    Raises:
        KernelError: as `linear_logprobs`; chunks that overlap or leave the rows; a loss that is no scalar or needs the
            gradient of another tensor; a second backward.
    """
    check_inputs(hidden, weight, bias, ids, mask, softcap, scale)
    rows_of_chunks = _checked_chunks(chunks, len(ids))
    inv_temperature = inverse_temperature(temperature, hidden)
    check_ids(ids, len(weight), mask)
    needs = [one is not None and one.requires_grad and torch.is_grad_enabled() for one in (hidden, weight, bias)]
    head = Head(weight.detach(), None if bias is None else bias.detach(), softcap, scale)
    rows = Rows(hidden.detach(), ids, inv_temperature)
    chunk_bytes = default_chunk_bytes(hidden.device) if chunk_bytes is None else chunk_bytes
    task = _RowChunks(head, rows, mask, loss, rows_of_chunks, chunk_bytes, skip_zero_rows, tuple(needs))
    return _LinearLoss.apply(hidden, weight, bias, task)  # type: ignore[no-untyped-call,no-any-return]


def _checked_chunks(chunks: Sequence[slice], num_rows: int) -> tuple[slice, ...]:
    end, checked = 0, []
    for chunk in chunks:
        start, stop = chunk.start or 0, chunk.stop
        if chunk.step not in (None, 1) or stop is None or not end <= start <= stop <= num_rows:
            raise KernelError(
                f"chunks have {chunk} after row {end}, with {num_rows} rows",
                "chunks are slices of the rows with start and stop, ascending and disjoint",
            )
        checked.append(slice(start, stop))
        end = stop
    return tuple(checked)


@dataclass(frozen=True)
class _RowChunks:
    """What `linear_loss` computes, with tensors that carry no gradient."""

    head: Head
    rows: Rows
    mask: Tensor | None
    loss: RowLoss
    chunks: tuple[slice, ...]
    chunk_bytes: int
    skip_zero_rows: bool
    needs: tuple[bool, ...]

    def run(self) -> tuple[Tensor, Gradients]:
        """The sum of the losses and the gradients of it, wide."""
        # The sum of one chunk may be rounded at once.
        summed = self.head.wide if len(self.chunks) > 1 else self.head.weight.dtype
        into = Gradients(self.head, self.needs, len(self.rows.ids), summed)
        most = max((chunk.stop - chunk.start for chunk in self.chunks), default=0)
        sweep = Sweep(self.head, most, self.chunk_bytes)
        kept = self.head.weight.new_empty(most * len(self.head.weight), dtype=self.head.wide)
        values = [self._chunk(chunk, sweep, kept, into) for chunk in self.chunks]
        into.finish()
        zero = self.head.weight.new_zeros((), dtype=self.head.wide)
        return torch.stack(values).sum() if values else zero, into

    def _chunk(self, chunk: slice, sweep: Sweep, kept: Tensor, into: Gradients) -> Tensor:
        num_rows = chunk.stop - chunk.start
        index = None if self.mask is None else index_of(self.mask[chunk])
        rows = self.rows.take(chunk) if index is None else self.rows.take(chunk).take(index)
        rows = rows._replace(hidden=rows.hidden.to(self.head.operand))
        logits = kept[: len(rows.ids) * len(self.head.weight)]
        stats = forward(self.head, rows, sweep.of(len(rows.ids)), kept=logits)
        tokens = finish(stats, rows.inv_temperature)
        value, upstream = _loss_and_upstream(
            self.loss, chunk, TokenStats(*(spread(one, index, num_rows) for one in tokens)), any(self.needs)
        )
        if upstream is None:
            return value
        if index is not None:
            upstream = upstream.take(index)
        live = index_of(upstream.live()) if self.skip_zero_rows else None
        at = chunk if index is None else index + chunk.start
        if live is not None:
            rows, stats, upstream = rows.take(live), take_stats(stats, live), upstream.take(live)
            at = chunk.start + (live if index is None else index[live])
        backward(self.head, rows, stats, upstream, into, sweep.of(len(rows.ids)), at=at, kept=logits, kept_rows=live)
        return value


def _loss_and_upstream(
    loss: RowLoss, chunk: slice, tokens: TokenStats, differentiate: bool
) -> tuple[Tensor, Upstream | None]:
    if not differentiate:
        return _scalar(loss(chunk, tokens)), None
    with torch.enable_grad():
        leaves = TokenStats(*(one.requires_grad_() for one in tokens))
        value = _scalar(loss(chunk, leaves))
        if not value.requires_grad:
            return value, None
        _refuse_other_leaves(value, leaves)
        found = torch.autograd.grad(value, leaves, allow_unused=True)
    with_zeros = (torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True))
    return value.detach(), Upstream(*with_zeros)


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise KernelError(f"the loss of a chunk has shape {list(value.shape)}", "it must return a scalar, as .sum()")
    return value.reshape(())


def _refuse_other_leaves(value: Tensor, leaves: TokenStats) -> None:
    known, seen, waiting = {id(leaf) for leaf in leaves}, set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise KernelError(
                f"the loss depends on another tensor that requires a gradient, of shape {list(leaf.shape)}",
                "detach it, or use linear_logprobs, which lets autograd reach everything",
            )
        waiting.extend(following for following, _ in node.next_functions)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _RowChunks) -> Tensor:
        value, into = task.run()
        ctx.gradients = (into.hidden, into.weight, into.bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise KernelError(
                "a second backward pass reached a linear_loss, whose gradients the first one took",
                "call linear_logprobs to go back through it twice",
            )
        whole = upstream.device.type == "cpu" and float(upstream) == 1
        found: list[Tensor | None] = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            scaled = gradient if gradient is None or whole else gradient.mul_(upstream)
            found.append(None if scaled is None else scaled.to(dtype))
        return (*found, None)
