r"""Sweeps over the vocabulary of an output layer, a panel of it at a time: nothing of size ``[N, V]`` is ever needed.

A panel is a slice ``[start, stop)`` of the vocabulary. The products are torch's (`torch.mm` into reused buffers); the
row kernels of `grpoforge_kernels.dispatch` run on each panel of logits while it is in cache. The same sweep serves

- recomputation: logits of a panel live in one buffer, and the backward makes them again;
- row chunks: the logits of a chunk are kept, one contiguous tile per panel, and the gradient is written over them;
- the frozen head: the forward also carries the expectation of `Expectation`.

Gradients are accumulated in float32 (float64 for float64), rows of a panel in full, so that each panel of the weight's
gradient is written once. Softmax minus one-hot is formed in float32 and rounded at most once, for the tensor cores.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from grpoforge_kernels import dispatch
from grpoforge_kernels.rows import UNDERFLOW, RowStats, merge, statistics_dtype

CPU_CHUNK_BYTES = 3 * 2**23
"""What a sweep touches per panel on a CPU: it has to stay in the shared cache while three products pass over it."""
ACCELERATOR_CHUNK_BYTES = 2**29
CPU_BLOCK_ROWS = 2048
ACCELERATOR_BLOCK_ROWS = 8192
WIDTH_MULTIPLE = 64


@dataclass(frozen=True)
class Head:
    """An output layer ``weight [V, H]``, ``bias [V]`` and what turns its logits into scores."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits, statistics and accumulators."""
        return statistics_dtype(self.weight.dtype)

    @property
    def operand(self) -> torch.dtype:
        """The dtype in which matrices are multiplied.

        Accelerators multiply bfloat16 with float32 sums, and so do CPUs with AMX or AVX512_BF16, at more than twice the
        rate of float32. Other CPUs emulate it (1 to 10 GFLOP/s where float32 has 60 and more) and widen panels instead.
        float16 is widened everywhere: it has no room for the small probabilities in softmax minus one-hot.
        """
        if self.weight.dtype != torch.bfloat16:
            return self.wide
        on_cpu = self.weight.device.type == "cpu"
        return self.wide if on_cpu and dispatch.bfloat16_products() is None else self.weight.dtype

    @property
    def kernels(self) -> ModuleType:
        """The row kernels for this head's logits."""
        return dispatch.backend("selective_log_softmax", self.weight.device, self.wide)


class Rows(NamedTuple):
    """Rows that share a sweep: ``hidden [N, H]`` in the head's operand dtype, ``ids`` and ``inv_temperature [N]``."""

    hidden: Tensor
    ids: Tensor
    inv_temperature: Tensor

    def take(self, which: slice | Tensor) -> Rows:
        """The rows of a slice (a view) or of an index (a copy)."""
        return Rows(*(values[which] for values in self))


class Upstream(NamedTuple):
    """Derivatives of a loss by log-prob, entropy and logsumexp of each row, ``[N]`` each."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor

    def take(self, which: slice | Tensor) -> Upstream:
        """Those of a slice or an index of rows."""
        return Upstream(*(values[which] for values in self))

    def live(self) -> Tensor:
        """``[N]`` bool: whether the row contributes to any gradient. Not a number contributes, so that it is seen."""
        return (self.logprobs != 0) | (self.entropy != 0) | (self.logsumexp != 0)


class Panel(NamedTuple):
    """A slice of the vocabulary with its weight ``[width, H]`` in the operand dtype and its bias in the wide one."""

    start: int
    stop: int
    weight: Tensor
    bias: Tensor | None


def take_stats(stats: RowStats, which: slice | Tensor) -> RowStats:
    """The statistics of a slice or an index of rows."""
    return RowStats(*(values[which] for values in stats))


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """``out = a @ b``, or ``out += a @ b``, summed in float32 or wider; `a` is rounded where `b` is narrower."""
    if b.dtype == torch.bfloat16 and a.device.type == "cpu":
        products = dispatch.bfloat16_products()
        assert products is not None
        products.multiply(a, b, out, add=add)
    elif a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a.to(b.dtype), b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a.to(b.dtype), b, out.dtype, out=out)


class Sweep:
    """The panels of a head for a number of rows, with the buffers they share.

    A panel is as wide as ``chunk_bytes`` allows for everything that a product touches: the logits of a block of rows
    (and their copy in the operand dtype), the weight and its gradient. All rows meet a panel before the next panel
    comes, in blocks, so memory does not grow with the number of rows either.
    """

    def __init__(self, head: Head, num_rows: int, chunk_bytes: int) -> None:
        self.head = head
        vocab_size, hidden_size = head.weight.shape
        block_rows = block_size(num_rows, head)
        self.blocks = _blocks(num_rows, block_rows)
        fitting = chunk_bytes // column_bytes(block_rows, hidden_size, head)
        self.width = min(vocab_size, max(WIDTH_MULTIPLE, fitting // WIDTH_MULTIPLE * WIDTH_MULTIPLE))
        self._block_rows = block_rows
        self._logits: list[Tensor] = []
        self._factor: list[Tensor] = []
        converts = head.weight.dtype != head.operand
        self._weight = head.weight.new_empty((self.width, hidden_size), dtype=head.operand) if converts else None

    def of(self, num_rows: int) -> Sweep:
        """The sweep of no more rows than this one's, with the same panels and the same buffers."""
        other = copy.copy(self)
        other.blocks = _blocks(num_rows, self._block_rows)
        return other

    def __iter__(self) -> Iterator[Panel]:
        weight, bias = self.head.weight, self.head.bias
        for start in range(0, len(weight), self.width):
            stop = min(start + self.width, len(weight))
            rows = weight[start:stop]
            if self._weight is not None:
                rows = self._weight[: stop - start].copy_(rows)
            yield Panel(start, stop, rows, None if bias is None else bias[start:stop].to(self.head.wide))

    def logits(self, hidden: Tensor, panel: Panel, out: Tensor | None = None) -> Tensor:
        """``hidden @ weight.T + bias`` of a panel, ``[n, width]``, in ``out`` or in the buffer of the sweep."""
        if out is None:
            out = self.scratch(len(hidden), panel)
        if panel.bias is not None and hidden.dtype == out.dtype:
            return torch.addmm(panel.bias, hidden, panel.weight.t(), out=out)
        multiply(hidden, panel.weight.t(), out, add=False)
        return out if panel.bias is None else out.add_(panel.bias)

    def factor(self, gradient: Tensor) -> Tensor:
        """``gradient [n, width]`` by the logits, rounded for the products unless they round it themselves."""
        if gradient.dtype == self.head.operand or gradient.device.type == "cpu":
            return gradient
        return self._shared(self._factor, gradient.shape, self.head.operand).copy_(gradient)

    def scratch(self, num_rows: int, panel: Panel) -> Tensor:
        """``[num_rows, width]`` of the buffer for logits, made on first use."""
        return self._shared(self._logits, (num_rows, panel.stop - panel.start), self.head.wide)

    def _shared(self, buffers: list[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if not buffers:
            buffers.append(self.head.weight.new_empty(self._block_rows * self.width, dtype=dtype))
        return buffers[0][: math.prod(shape)].view(*shape)


def _blocks(num_rows: int, block_rows: int) -> list[slice]:
    return [slice(at, min(at + block_rows, num_rows)) for at in range(0, num_rows, block_rows)]


def block_size(num_rows: int, head: Head) -> int:
    """How many rows meet a panel at a time."""
    most = CPU_BLOCK_ROWS if head.weight.device.type == "cpu" else ACCELERATOR_BLOCK_ROWS
    return max(1, min(num_rows, most))


def column_bytes(num_rows: int, hidden_size: int, head: Head) -> int:
    """Bytes that one token of the vocabulary adds to what a panel touches."""
    # Rounded for the products, and transposed when the weight's gradient has more than one part.
    copies = 0 if head.operand == head.wide else 2 * head.operand.itemsize
    return num_rows * (head.wide.itemsize + copies) + 2 * hidden_size * head.wide.itemsize


class Expectation:
    r"""What makes the backward of a frozen head a row scaling, carried through the forward with rescaling.

    .. math:: E = \sum_{v \ne y} s\, p_v \frac{\partial z_v}{\partial x_v} W_v \quad [N, H].

    The chosen token is left out, so nothing cancels when its probability is close to 1.
    """

    def __init__(self, head: Head, num_rows: int) -> None:
        self.head = head
        self.values = head.weight.new_zeros((num_rows, head.weight.shape[1]), dtype=head.wide)

    def add(self, block: slice, rows: Rows, panel: Panel, logits: Tensor, old: RowStats | None, new: RowStats) -> None:
        """Add a panel, whose logits are overwritten; ``old`` and ``new`` are the statistics before and after it."""
        values = self.values[block]
        if old is not None:
            shift = (rows.inv_temperature * (old.maximum - new.maximum)).clamp(min=UNDERFLOW)
            values.mul_(shift.exp()[:, None])
        # With total 1 and derivative 1 by the logsumexp, the gradient is the unnormalized term of the sum.
        zero, one = torch.zeros_like(new.total), torch.ones_like(new.total)
        weights: Tensor = self.head.kernels.row_gradient(
            logits,
            rows.ids,
            rows.inv_temperature,
            RowStats(new.maximum, one, zero, new.chosen),
            zero,
            zero,
            one,
            mask=None,
            softcap=self.head.softcap,
            scale=self.head.scale,
            first_id=panel.start,
            out=logits,
        )
        at = (rows.ids - panel.start)[:, None]
        inside = (at >= 0) & (at < panel.stop - panel.start)
        at = at.where(inside, 0)
        weights.scatter_(1, at, weights.gather(1, at).masked_fill_(inside, 0))
        multiply(weights, panel.weight, values, add=True)


def tile(kept: Tensor, num_rows: int, panel: Panel) -> Tensor:
    """The logits of a panel within ``kept [num_rows * V]``, which holds one contiguous ``[num_rows, width]`` each."""
    return kept[num_rows * panel.start : num_rows * panel.stop].view(num_rows, panel.stop - panel.start)


def forward(
    head: Head, rows: Rows, sweep: Sweep, *, kept: Tensor | None = None, expectation: Expectation | None = None
) -> RowStats:
    """The statistics of each row, ``[N]``.

    Args:
        kept: ``[N * V]`` in which the logits stay for a `backward` with panels of the same width, see `tile`.
        expectation: Accumulates `Expectation`, still to be divided by ``total``.
    """
    if not sweep.blocks:
        return RowStats(*(rows.inv_temperature.new_empty(0) for _ in range(4)))
    stats: list[RowStats | None] = [None] * len(sweep.blocks)
    for panel in sweep:
        for number, block in enumerate(sweep.blocks):
            some, old = rows.take(block), stats[number]
            logits = sweep.logits(some.hidden, panel, None if kept is None else tile(kept, len(rows.ids), panel)[block])
            new: RowStats = head.kernels.row_stats(
                logits,
                some.ids,
                some.inv_temperature,
                mask=None,
                softcap=head.softcap,
                scale=head.scale,
                first_id=panel.start,
                entropy=True,
            )
            stats[number] = new = new if old is None else merge(old, new, some.inv_temperature)
            if expectation is not None:
                expectation.add(block, some, panel, logits, old, new)
    done = [part for part in stats if part is not None]
    return done[0] if len(done) == 1 else RowStats(*(torch.cat(parts) for parts in zip(*done, strict=True)))


class Gradients:
    """Where `backward` adds up, each None when nobody asks for it.

    ``hidden [N, H]`` and ``bias [V]`` are wide. ``weight [V, H]`` is wide, or in the dtype of the weight when a single
    `backward` fills it: a panel of it is then one product, rounded, or summed in a wide buffer first.
    """

    def __init__(self, head: Head, needs: Sequence[bool], num_rows: int, weight_dtype: torch.dtype) -> None:
        empty, (vocab_size, hidden_size) = head.weight.new_empty, head.weight.shape
        self.hidden = head.weight.new_zeros((num_rows, hidden_size), dtype=head.wide) if needs[0] else None
        self.weight = empty((vocab_size, hidden_size), dtype=weight_dtype) if needs[1] else None
        self.bias = head.weight.new_zeros(vocab_size, dtype=head.wide) if needs[2] else None
        self._panel: Tensor | None = None
        self._wide = head.wide
        self.untouched = True

    def add_weight(self, panel: Panel, factor: Tensor, hidden: Tensor, *, first: bool, last: bool) -> None:
        """Add ``factor.T @ hidden`` of a block of rows to a panel; the sum of more than one is rounded at the last."""
        if self.weight is None:
            return
        first = first and self.untouched
        target = self.weight[panel.start : panel.stop]
        # A block of rows is a depth that a product can sum before it rounds.
        if target.dtype == self._wide or (first and last and hidden.dtype == target.dtype):
            return multiply(factor.t(), hidden, target, add=not first)
        if self._panel is None:
            self._panel = torch.empty_like(target, dtype=self._wide)
        summed = self._panel[: len(target)]
        multiply(factor.t(), hidden, summed, add=not first)
        if last:
            target.copy_(summed)

    def finish(self) -> None:
        """Make the gradient of a weight that no row reached 0."""
        if self.untouched and self.weight is not None:
            self.weight.zero_()


def backward(
    head: Head,
    rows: Rows,
    stats: RowStats,
    upstream: Upstream,
    into: Gradients,
    sweep: Sweep,
    *,
    at: slice | Tensor = slice(None),
    kept: Tensor | None = None,
    kept_rows: Tensor | None = None,
) -> None:
    """Add the gradients of ``sum_n g logprobs + h entropy + l logsumexp`` over ``rows``.

    Args:
        rows: The rows that contribute, with their ``stats`` and ``upstream``.
        at: Where the rows stand in ``into.hidden``, which holds 0 there.
        kept: Logits from `forward`, overwritten; None makes them again.
        kept_rows: Which rows of ``kept`` these are; None when all.
    """
    if not sweep.blocks:
        return
    hidden = None if into.hidden is None else into.hidden[at]
    for panel in sweep:
        for number, block in enumerate(sweep.blocks):
            some = rows.take(block)
            logits = _logits(sweep, some.hidden, panel, block, kept, kept_rows)
            gradient = _row_gradient(head, some, panel, take_stats(stats, block), upstream.take(block), logits)
            factor = sweep.factor(gradient)
            if hidden is not None:
                multiply(factor, panel.weight, hidden[block], add=True)
            last = number == len(sweep.blocks) - 1
            into.add_weight(panel, factor, some.hidden, first=number == 0, last=last)
            if into.bias is not None:
                into.bias[panel.start : panel.stop] += gradient.sum(dim=0)
    if into.hidden is not None and hidden is not None and isinstance(at, Tensor):
        into.hidden.index_copy_(0, at, hidden)
    into.untouched = False


def _logits(
    sweep: Sweep, hidden: Tensor, panel: Panel, block: slice, kept: Tensor | None, kept_rows: Tensor | None
) -> Tensor:
    if kept is None:
        return sweep.logits(hidden, panel)
    logits = tile(kept, len(kept) // len(sweep.head.weight), panel)
    if kept_rows is None:
        return logits[block]
    return torch.index_select(logits, 0, kept_rows[block], out=sweep.scratch(len(hidden), panel))


def _row_gradient(head: Head, rows: Rows, panel: Panel, stats: RowStats, upstream: Upstream, logits: Tensor) -> Tensor:
    gradient: Tensor = head.kernels.row_gradient(
        logits,
        rows.ids,
        rows.inv_temperature,
        stats,
        *upstream,
        mask=None,
        softcap=head.softcap,
        scale=head.scale,
        first_id=panel.start,
        out=logits,
    )
    return gradient
