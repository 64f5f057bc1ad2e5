r"""Statistics of rows of ``hidden @ weight.T``, which is never stored: a Triton kernel, for log-probs without gradient.

The logits of a tile live in registers between the product and the statistics. **Nothing chooses `linear_stats`**: it is
tested in the interpreter, compiled for every target by ``grpoforge bench --ptx``, and has run on no GPU. Training keeps
products with the vendor's library, and `row_stats` and `row_gradient` on panels of them: see
`grpoforge_kernels.linear_logprobs`. What the kernel would save is writing and reading a panel of logits; what it costs
is a product that may be slower than the vendor's. ``grpoforge bench linear_logprobs --device cuda`` compares the two,
as ``triton, vocabulary chunks`` and ``triton, one kernel forward``; when the second wins, it belongs into the forward.

`row_gradient` is the epilogue of the backward: it takes float32 logits to a gradient in the format of the tensor cores.

Bytes, with tiles of :math:`B_n` rows and :math:`B_v` tokens and the operands of a group of tiles in L2: at least
:math:`(N + V) H b + 20 N P` with ``P`` slices of the vocabulary, at most :math:`N V H b (1/B_n + 1/B_v)`; the
materialized logits would be :math:`8 N V` more in float32. :math:`2 N V H` operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpoforge_kernels.rows import RowStats, finish
from grpoforge_kernels.triton import configs
from grpoforge_kernels.triton.selective_log_softmax import (
    LN2,
    LOG2E,
    LOWEST,
    NOWHERE,
    UNDERFLOW,
    launch_merge,
    row_gradient,
    row_stats,
    scores,
)

__all__ = ["finish", "linear_stats", "row_gradient", "row_stats"]

TILES_PER_PROCESSOR = 4


@triton.jit(
    do_not_specialize=[
        "num_rows", "vocab_size", "hidden_row", "weight_row", "inv_stride", "slice_size", "first_id"
    ]
)  # fmt: skip
def linear_stats_kernel(
    hidden,
    weight,
    bias,
    ids,
    inv_temperature,
    mask,
    stats,
    num_rows,
    vocab_size,
    hidden_row,
    weight_row,
    inv_stride,
    slice_size,
    first_id,
    HIDDEN_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``stats [4, P, N]`` of one block of rows over one slice of the vocabulary, tile after tile."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)
    real = rows < num_rows
    live = real
    if HAS_MASK:
        live = live & (tl.load(mask + rows, mask=real, other=0) != 0)
    plane = tl.num_programs(1).to(tl.int64) * num_rows
    to = stats + part * num_rows + rows
    m = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    u = tl.zeros((ROWS,), tl.float32)
    chosen = tl.full((ROWS,), float("-inf"), tl.float32)
    start = tl.program_id(1) * slice_size
    stop = tl.minimum(start + slice_size, vocab_size)
    if HAS_MASK and tl.max(live.to(tl.int32), 0) == 0:
        # Nobody looks at this block: its statistics are those of masked rows.
        stop = start

    k = tl.load(inv_temperature + rows * inv_stride, mask=real, other=1.0).to(tl.float32) * LOG2E
    wanted = tl.load(ids + rows, mask=live, other=-1) - first_id
    wanted = tl.where((wanted >= 0) & (wanted < vocab_size), wanted, NOWHERE).to(tl.int32)
    depth = tl.arange(0, DEPTH)
    row_starts = rows * hidden_row
    if ALIGNED:
        row_starts = tl.multiple_of(row_starts, 16)
    hidden_at = hidden + row_starts[:, None] + depth[None, :]
    for column in range(start, stop, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        inside = columns < stop
        starts = columns.to(tl.int64) * weight_row
        if ALIGNED:
            starts = tl.multiple_of(starts, 16)
        weight_at = weight + starts[None, :] + depth[:, None]
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        for at in range(0, HIDDEN_SIZE, DEPTH):
            if HIDDEN_SIZE % DEPTH == 0:
                a = tl.load(hidden_at + at, mask=live[:, None], other=0.0)
                b = tl.load(weight_at + at, mask=inside[None, :], other=0.0)
            else:
                left = depth < HIDDEN_SIZE - at
                a = tl.load(hidden_at + at, mask=live[:, None] & left[None, :], other=0.0)
                b = tl.load(weight_at + at, mask=left[:, None] & inside[None, :], other=0.0)
            z = tl.dot(a, b, z, input_precision="ieee")
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        z = scores(z, SCALE, SOFTCAP)
        here = columns[None, :] == wanted[:, None]
        chosen = tl.maximum(chosen, tl.max(tl.where(here, z, float("-inf")), 1))
        z = tl.where(inside[None, :], z, float("-inf"))
        n = tl.maximum(m, tl.max(z, 1))
        step = (m - n) * k
        factor = tl.exp2(step)
        exponent = tl.maximum((z - n[:, None]) * k[:, None], UNDERFLOW)
        e = tl.exp2(exponent)
        u = factor * (u + total * tl.maximum(step, UNDERFLOW)) + tl.sum(e * exponent, 1)
        total = factor * total + tl.sum(e, 1)
        m = n

    owns = (part == 0) & (first_id == 0)
    tl.store(to, tl.where(live, m, tl.where(owns, 0.0, LOWEST)), mask=real)
    tl.store(to + plane, tl.where(live, total, tl.where(owns, 1.0, 0.0)), mask=real)
    tl.store(to + 2 * plane, tl.where(live, u * LN2, 0.0), mask=real)
    tl.store(to + 3 * plane, tl.where(live, chosen, tl.where(owns, 0.0, float("-inf"))), mask=real)


def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    first_id: int = 0,
) -> RowStats:
    """`row_stats` of ``hidden [N, H] @ weight[V, H].T + bias [V]``, of which only tiles ever exist.

    Extra memory: ``16 N P`` bytes with ``P <= 64``. Products of half-precision operands are summed in float32, and
    float32 operands are multiplied in full (no TF32). For comparisons: training does not call this, see above.
    """
    num_rows, vocab_size = len(hidden), len(weight)
    stats = torch.empty((4, num_rows), dtype=torch.float32, device=hidden.device)
    if num_rows == 0:
        return RowStats(*stats)
    dtype = hidden.dtype
    if hidden.device.type == "cpu":
        # The interpreter's products do not know bfloat16. In float32 they are the same: each product is exact there.
        hidden, weight = hidden.float(), weight.float()
    operands = (_rows(hidden), _rows(weight), bias, ids, inv_temperature, mask)
    config = _config(dtype, operands, softcap, scale)
    num_parts, slice_size = _split(num_rows, vocab_size, config, hidden.device)
    partial = stats if num_parts == 1 else stats.new_empty((4, num_parts, num_rows))
    launch_linear_stats(config, operands, partial, num_parts, slice_size, first_id, softcap, scale)
    if num_parts > 1:
        launch_merge(partial, inv_temperature, stats)
    return RowStats(*stats)


Operands = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]
"""Hidden states, weight, bias, ids, inverse temperatures and mask."""


def launch_linear_stats(
    config: configs.Linear,
    operands: Operands,
    partial: Tensor,
    num_parts: int,
    slice_size: int,
    first_id: int,
    softcap: float | None,
    scale: float,
) -> None:
    """Fill ``partial [4, P, N]``."""
    hidden, weight, bias, ids, inv_temperature, mask = operands
    num_rows, hidden_size = hidden.shape
    linear_stats_kernel[(triton.cdiv(num_rows, config.rows), num_parts)](
        hidden,
        weight,
        bias if bias is None else bias.contiguous(),
        ids.contiguous(),
        inv_temperature,
        mask if mask is None else mask.contiguous(),
        partial,
        num_rows,
        len(weight),
        hidden.stride(0),
        weight.stride(0),
        inv_temperature.stride(0),
        slice_size,
        first_id,
        HIDDEN_SIZE=hidden_size,
        HAS_BIAS=bias is not None,
        HAS_MASK=mask is not None,
        SCALE=float(scale),
        SOFTCAP=float(softcap or 0),
        ALIGNED=_is_aligned(hidden, weight),
        ROWS=config.rows,
        COLUMNS=config.columns,
        DEPTH=config.depth,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _config(dtype: torch.dtype, operands: Operands, softcap: float | None, scale: float) -> configs.Linear:
    """The tile that is meant for plain products, where this is one."""
    hidden, weight, bias, _, _, mask = operands
    arch = configs.architecture(hidden.device)
    config = configs.linear_config(dtype, arch, plain=True)
    is_plain = bias is None and mask is None and not softcap and scale == 1
    if is_plain and _is_aligned(hidden, weight) and hidden.shape[1] % config.depth == 0:
        return config
    return configs.linear_config(dtype, arch, plain=False)


def _is_aligned(hidden: Tensor, weight: Tensor) -> bool:
    return hidden.stride(0) % 16 == 0 and weight.stride(0) % 16 == 0


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _split(num_rows: int, vocab_size: int, config: configs.Linear, device: torch.device) -> tuple[int, int]:
    """Slices of the vocabulary, so that there are enough programs; in deterministic mode a fixed number of them."""
    blocks, num_tiles = triton.cdiv(num_rows, config.rows), triton.cdiv(vocab_size, config.columns)
    if configs.is_deterministic():
        wanted = configs.DETERMINISTIC_PARTS
    else:
        wanted = triton.cdiv(TILES_PER_PROCESSOR * configs.multiprocessors(device), blocks)
    wanted = max(1, min(wanted, num_tiles, configs.MAX_PARTS))
    slice_size = triton.cdiv(num_tiles, wanted) * config.columns
    return triton.cdiv(vocab_size, slice_size), slice_size
