r"""Statistics of rows of logits and their gradient as Triton kernels: see `grpoforge_kernels.rows` for the algebra.

Both kernels move the fewest bytes that the task allows. With :math:`b` bytes per logit they move, for each row,

.. math:: \text{row\_stats: } (V + 1)\,b + 8 + 4 + 16 \;[+1], \qquad
    \text{row\_gradient: } V b + V b_{out} + \text{a few scalars per block}:

the logits once (and the chosen one again, from cache), id, inverse temperature, four statistics, and the mask if there
is one; then the logits once more and the gradient once. Split over ``P`` programs a row costs ``44 P - 8`` bytes more:
each reads id and inverse temperature and stores its four statistics, which a last one reads again.

No index is narrower than 64 bits where a tensor may have 2^31 elements. Numbers that change with the batch are not
compiled in, so no length of a batch compiles anything; scale and softcap are, since they belong to the model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpoforge_kernels.rows import RowStats, finish
from grpoforge_kernels.triton import configs

__all__ = ["finish", "row_gradient", "row_stats"]

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Where a running maximum starts: finite, so that no difference of two of them is ``inf - inf``."""
UNDERFLOW = tl.constexpr(-1e4)
"""An exponent at which ``exp2`` is 0; finite, since ``0 * -inf`` is no number."""
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOWHERE = tl.constexpr(-(2**31))
"""A column that no row has."""


@triton.jit
def tanh(x):
    """``tanh``, exact to a few units in the last place at both ends: a series near 0, where the quotient cancels."""
    size = tl.abs(x)
    square = x * x
    series = 1.0 + square * (
        -0.3333333333
        + square * (0.1333333333 + square * (-0.0539682540 + square * (0.0218694885 - square * 0.0088632355)))
    )
    quotient = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.35, x * series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def scores(x, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits of any format as float32 scores."""
    x = x.to(tl.float32)
    if SOFTCAP > 0:
        x = tanh(x * (SCALE / SOFTCAP)) * SOFTCAP
    elif SCALE != 1:
        x = x * SCALE
    return x


@triton.jit
def absorb(m, s, u, x, k, ENTROPY: tl.constexpr):
    """Each lane takes its part of the tile ``x [UNROLL, LANES, VECTOR]`` into its statistics ``[LANES]``.

    ``u`` is in units of ``log2``. One exponential per logit, and one per lane for the step of its maximum.
    """
    n = tl.maximum(m, tl.max(tl.max(x, 2), 0))
    difference = x - n[None, :, None]
    step = (m - n) * k
    factor = tl.exp2(step)
    if ENTROPY:
        exponent = tl.maximum(difference * k, UNDERFLOW)
        e = tl.exp2(exponent)
        u = factor * (u + s * tl.maximum(step, UNDERFLOW)) + tl.sum(tl.sum(e * exponent, 2), 0)
    else:
        e = tl.exp2(difference * k)
    return n, factor * s + tl.sum(tl.sum(e, 2), 0), u


@triton.jit(do_not_specialize=["num_rows", "vocab_size", "row_stride", "inv_stride", "slice_size", "first_id"])
def row_stats_kernel(
    logits,
    ids,
    inv_temperature,
    mask,
    stats,
    num_rows,
    vocab_size,
    row_stride,
    inv_stride,
    slice_size,
    first_id,
    ENTROPY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One slice of one row: ``stats [4, P, N]``, program ``(row, slice)``.

    Bytes: ``(V + 1) * itemsize + 28``, and 1 for a mask. A lane keeps maximum and sums of its own logits in registers;
    lanes meet once, at the end, so the loop has neither shuffles nor barriers. A lane's logits are neighbors in memory,
    ``VECTOR`` of them: as many as rows of this length and stride can always be loaded at once, so that which logits a
    lane has, and with it every bit of the sums, does not depend on where the row is.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    plane = tl.num_programs(1).to(tl.int64) * num_rows
    to = stats + part * num_rows + row
    is_first = (part == 0) & (first_id == 0)
    if HAS_MASK and tl.load(mask + row) == 0:
        tl.store(to, tl.where(is_first, 0.0, LOWEST))
        tl.store(to + plane, tl.where(is_first, 1.0, 0.0))
        tl.store(to + 2 * plane, 0.0)
        tl.store(to + 3 * plane, tl.where(is_first, 0.0, float("-inf")))
        return

    k = tl.load(inv_temperature + row * inv_stride).to(tl.float32) * LOG2E
    lanes = tl.arange(0, LANES)
    m = tl.full((LANES,), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    u = tl.zeros((LANES,), tl.float32)

    base = row * row_stride
    start = part * slice_size
    size = tl.maximum(tl.minimum(start + slice_size, vocab_size) - start, 0)
    size = tl.multiple_of(size.to(tl.int32), VECTOR)
    origin = tl.multiple_of(base + start, VECTOR)
    at = logits + origin
    step: tl.constexpr = LANES * VECTOR
    tile = (
        tl.arange(0, UNROLL)[:, None, None] * step + lanes[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    )
    whole = size // (step * UNROLL) * (step * UNROLL)
    for column in range(0, whole, step * UNROLL):
        x = scores(tl.load(at + (column + tile)), SCALE, SOFTCAP)
        m, s, u = absorb(m, s, u, x, k, ENTROPY)
    short = tl.arange(0, 1)[:, None, None] + lanes[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    for column in range(whole, size, step):
        inside = column + short < size
        rest = scores(tl.load(at + (column + short), mask=inside, other=float("-inf")), SCALE, SOFTCAP)
        m, s, u = absorb(m, s, u, tl.where(inside, rest, float("-inf")), k, ENTROPY)

    maximum = tl.max(m, 0)
    shift = (m - maximum) * k
    factor = tl.exp2(shift)
    tl.store(to, maximum)
    tl.store(to + plane, tl.sum(factor * s, 0))
    if ENTROPY:
        tl.store(to + 2 * plane, tl.sum(factor * (u + s * tl.maximum(shift, UNDERFLOW)), 0) * LN2)
    else:
        tl.store(to + 2 * plane, 0.0)
    chosen = tl.load(ids + row) - first_id
    owned = (chosen >= start) & (chosen < start + size)
    score = scores(tl.load(logits + base + chosen, mask=owned, other=0.0), SCALE, SOFTCAP)
    tl.store(to + 3 * plane, tl.where(owned, score, float("-inf")))


@triton.jit
def merge_parts(at, plane, num_rows, inside, s):
    """Statistics of ``R`` rows from those of their slices; ``at [P, R]`` points to the maxima of the slices."""
    m = tl.load(at, mask=inside, other=LOWEST)
    total = tl.load(at + plane, mask=inside, other=0.0)
    weighted = tl.load(at + 2 * plane, mask=inside, other=0.0)
    chosen = tl.load(at + 3 * plane, mask=inside, other=float("-inf"))
    maximum = tl.max(m, 0)
    shift = tl.maximum((m - maximum[None, :]) * s[None, :], UNDERFLOW)
    factor = tl.exp2(shift * LOG2E)
    return (
        maximum,
        tl.sum(factor * total, 0),
        tl.sum(factor * (weighted + total * shift), 0),
        tl.max(chosen, 0),
    )


@triton.jit(do_not_specialize=["num_rows", "num_parts", "inv_stride"])
def merge_kernel(
    partial, inv_temperature, stats, num_rows, num_parts, inv_stride, PARTS: tl.constexpr, ROWS: tl.constexpr
):
    """``partial [4, P, N]`` to ``stats [4, N]``. Bytes: ``16 P + 16 + 4`` for each row."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    parts = tl.arange(0, PARTS).to(tl.int64)[:, None]
    real = rows < num_rows
    inside = (parts < num_parts) & real[None, :]
    s = tl.load(inv_temperature + rows * inv_stride, mask=real, other=1.0).to(tl.float32)
    plane = num_rows.to(tl.int64) * num_parts
    maximum, total, weighted, chosen = merge_parts(
        partial + parts * num_rows + rows[None, :], plane, num_rows, inside, s
    )
    tl.store(stats + rows, maximum, mask=real)
    tl.store(stats + num_rows + rows, total, mask=real)
    tl.store(stats + 2 * num_rows.to(tl.int64) + rows, weighted, mask=real)
    tl.store(stats + 3 * num_rows.to(tl.int64) + rows, chosen, mask=real)


@triton.jit
def gradient_tile(
    at,
    to,
    offsets,
    lead,
    vocab_size,
    chosen,
    m,
    k,
    peak,
    flat,
    slope,
    has_slope,
    has_peak,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GUARD: tl.constexpr,
):
    """Store ``exp2(d) (flat + slope d) + peak [offset = chosen]`` with ``d = (z - m) k``; column 0 is at ``lead``."""
    inside = (offsets >= lead) & (offsets < vocab_size + lead)
    x = tl.load(at + offsets, mask=inside, other=0.0) if GUARD else tl.load(at + offsets)
    x = x.to(tl.float32)
    slant = SCALE
    if SOFTCAP > 0:
        bent = tanh(x * (SCALE / SOFTCAP))
        slant = (1.0 - bent * bent) * SCALE
        x = bent * SOFTCAP
    elif SCALE != 1:
        x = x * SCALE
    d = (x - m) * k
    if has_slope:
        d = tl.maximum(d, UNDERFLOW)
        gradient = tl.exp2(d) * (flat + slope * d)
    else:
        gradient = tl.exp2(d) * flat
    if has_peak:
        gradient = tl.where(offsets == chosen, gradient + peak, gradient)
    if SOFTCAP > 0 or SCALE != 1:
        gradient = gradient * slant
    gradient = gradient.to(to.dtype.element_ty)
    if GUARD:
        tl.store(to + offsets, gradient, mask=inside)
    else:
        tl.store(to + offsets, gradient)


@triton.jit(do_not_specialize=["vocab_size", "row_stride", "out_stride", "inv_stride", "num_blocks", "first_id"])
def row_gradient_kernel(
    logits,
    out,
    ids,
    inv_temperature,
    mask,
    maximum,
    total,
    weighted,
    g,
    h,
    l,  # noqa: E741
    vocab_size,
    row_stride,
    out_stride,
    inv_stride,
    num_blocks,
    first_id,
    HAS_MASK: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One block of one row, ``BLOCK * PIECES`` logits. ``out`` may be ``logits``: no program reads what another writes.

    Bytes: ``V * (itemsize + itemsize_out)`` for a row, and at most 49 of scalars for each block; a row without
    gradient is written, not read. Blocks are cut where memory is aligned: the first of an uneven row starts before it.
    """
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    block = program % num_blocks
    from_logp = tl.load(g + row)
    from_entropy = tl.load(h + row)
    from_lse = tl.load(l + row)
    used = (from_logp != 0) | (from_entropy != 0) | (from_lse != 0)
    if HAS_MASK:
        used = used & (tl.load(mask + row) != 0)

    first = block * (BLOCK * PIECES)
    base = row * row_stride
    if EVEN:
        lead = 0
        at = logits + tl.multiple_of(base, 16)
        to = out + tl.multiple_of(row * out_stride, 16)
        limit = vocab_size // 16 * 16
    else:
        lead = (base % VECTOR).to(tl.int32)
        at = logits + tl.multiple_of(base - lead, VECTOR)
        to = out + tl.multiple_of(row * out_stride - lead, VECTOR)
        limit = vocab_size
    tile = tl.arange(0, BLOCK)
    if not used:
        for start in range(first, tl.minimum(first + BLOCK * PIECES, limit + lead), BLOCK):
            offsets = start + tile
            zeros = tl.zeros((BLOCK,), to.dtype.element_ty)
            tl.store(to + offsets, zeros, mask=(offsets >= lead) & (offsets < limit + lead))
        return

    s = tl.load(inv_temperature + row * inv_stride).to(tl.float32)
    sum_of_row = tl.load(total + row)
    log_total = tl.log2(sum_of_row) * LN2
    has_slope = from_entropy != 0
    flat = from_lse - from_logp
    if has_slope:
        entropy = log_total - tl.load(weighted + row) / sum_of_row
        flat += from_entropy * (log_total - entropy)
    share = s / sum_of_row
    slope = -from_entropy * LN2 * share
    flat = flat * share
    peak = from_logp * s
    chosen = tl.load(ids + row) - first_id
    chosen = tl.where((chosen >= 0) & (chosen < vocab_size), chosen + lead, NOWHERE).to(tl.int32)
    m = tl.load(maximum + row)
    k = s * LOG2E
    for start in range(first, tl.minimum(first + BLOCK * PIECES, limit + lead), BLOCK):
        offsets = start + tile
        has_peak = (chosen >= start) & (chosen < start + BLOCK)
        if (start >= lead) & (start + BLOCK <= limit + lead):
            gradient_tile(
                at, to, offsets, lead, limit, chosen, m, k, peak, flat, slope, has_slope, has_peak, SCALE, SOFTCAP,
                False,
            )  # fmt: skip
        elif EVEN:
            gradient_tile(
                at, to, offsets, lead, limit, chosen, m, k, peak, flat, slope, has_slope, has_peak, SCALE, SOFTCAP,
                True,
            )  # fmt: skip
        else:
            # Unaligned rows guard each logit: in short tiles, or the guards would fill the registers of all tiles.
            for short in range(start, start + BLOCK, BLOCK // 8):
                few = short + tl.arange(0, BLOCK // 8)
                gradient_tile(
                    at, to, few, lead, limit, chosen, m, k, peak, flat, slope, has_slope, has_peak, SCALE, SOFTCAP,
                    True,
                )  # fmt: skip


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
    """The statistics of each row, ``[N]`` float32: see `grpoforge_kernels.reference.selective_log_softmax.row_stats`.

    With few rows a row is split over several programs, whose statistics are merged; in deterministic mode never, so
    that a row gives the same bits alone and in any batch.
    """
    num_rows, vocab_size = logits.shape
    stats = torch.empty((4, num_rows), dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return RowStats(*stats)
    config = configs.row_stats_config(logits.dtype, vocab_size, logits.device)
    num_parts, slice_size = configs.split(num_rows, vocab_size, config.block, logits.device)
    partial = stats if num_parts == 1 else stats.new_empty((4, num_parts, num_rows))
    launch_row_stats(
        config, logits, ids, inv_temperature, mask, partial, num_parts, slice_size, first_id, entropy, softcap, scale
    )
    if num_parts > 1:
        launch_merge(partial, inv_temperature, stats)
    return RowStats(*stats)


def launch_row_stats(
    config: configs.RowStats,
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    mask: Tensor | None,
    partial: Tensor,
    num_parts: int,
    slice_size: int,
    first_id: int,
    entropy: bool,
    softcap: float | None,
    scale: float,
) -> object:
    """Fill ``partial [4, P, N]``. Returns the compiled kernel."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 or vocab_size == 1, "neighbors in a row are neighbors in memory"
    vector = configs.row_vector(logits.dtype, vocab_size, logits.stride(0))
    return row_stats_kernel[(num_rows, num_parts)](
        logits,
        ids.contiguous(),
        inv_temperature,
        mask if mask is None else mask.contiguous(),
        partial,
        num_rows,
        vocab_size,
        logits.stride(0),
        inv_temperature.stride(0),
        slice_size,
        first_id,
        ENTROPY=entropy,
        HAS_MASK=mask is not None,
        SCALE=float(scale),
        SOFTCAP=float(softcap or 0),
        LANES=config.lanes,
        UNROLL=config.unroll * config.vector // vector,
        VECTOR=vector,
        num_warps=config.num_warps,
    )


def launch_merge(partial: Tensor, inv_temperature: Tensor, stats: Tensor) -> None:
    """``partial [4, P, N]`` to ``stats [4, N]``."""
    _, num_parts, num_rows = partial.shape
    merge_kernel[(triton.cdiv(num_rows, configs.MERGE_ROWS),)](
        partial,
        inv_temperature,
        stats,
        num_rows,
        num_parts,
        inv_temperature.stride(0),
        PARTS=triton.next_power_of_2(num_parts),
        ROWS=configs.MERGE_ROWS,
        num_warps=configs.MERGE_WARPS,
    )


def row_gradient(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    stats: RowStats,
    g: Tensor,
    h: Tensor,
    l: Tensor,  # noqa: E741
    *,
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
    first_id: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient by the logits: see `grpoforge_kernels.reference.selective_log_softmax.row_gradient`.

    ``out`` may be ``logits``, and may have another format than they have: it is rounded once, from float32.
    """
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return out
    config = configs.row_gradient_config(logits.dtype, vocab_size, logits.device)
    launch_row_gradient(config, logits, ids, inv_temperature, stats, (g, h, l), mask, softcap, scale, first_id, out)
    return out


def launch_row_gradient(
    config: configs.RowGradient,
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    stats: RowStats,
    upstream: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    softcap: float | None,
    scale: float,
    first_id: int,
    out: Tensor,
) -> object:
    """Fill ``out [N, V]``. Returns the compiled kernel."""
    num_rows, vocab_size = logits.shape
    assert vocab_size == 1 or logits.stride(1) == out.stride(1) == 1, "neighbors in a row are neighbors in memory"
    vector = max(configs.vector(logits.dtype), configs.vector(out.dtype))
    # Loads and stores are cut at the same columns, so both rows have to be equally far from an aligned address.
    vector = vector if (logits.stride(0) - out.stride(0)) % vector == 0 else 1
    num_blocks = triton.cdiv(vocab_size + vector - 1, config.block * config.pieces)
    return row_gradient_kernel[(num_rows * num_blocks,)](
        logits,
        out,
        ids.contiguous(),
        inv_temperature,
        mask if mask is None else mask.contiguous(),
        *(values.contiguous() for values in (stats.maximum, stats.total, stats.weighted, *upstream)),
        vocab_size,
        logits.stride(0),
        out.stride(0),
        inv_temperature.stride(0),
        num_blocks,
        first_id,
        HAS_MASK=mask is not None,
        SCALE=float(scale),
        SOFTCAP=float(softcap or 0),
        EVEN=is_even(vocab_size, logits.stride(0), out.stride(0)),
        BLOCK=config.block,
        PIECES=config.pieces,
        VECTOR=vector,
        num_warps=config.num_warps,
    )


def is_even(*sizes: int) -> bool:
    """Whether every row starts, and ends, on an address that whole vectors reach."""
    return all(size % 16 == 0 for size in sizes)
