r"""The algebra of one row of logits, which every backend shares.

A row of scores :math:`z` at inverse temperature :math:`s` is held as four numbers,

.. math:: m = \max_v z_v,\quad S = \sum_v e^{s(z_v - m)},\quad U = \sum_v e^{s(z_v - m)}\,s(z_v - m),\quad z_y,

from which `finish` makes log-prob, entropy and logsumexp. ``m`` and ``S`` are kept apart because every exponent is
then ``s`` times an exact difference: logits of 1e4 cost no digit, which one stored logsumexp would. Two slices of a
vocabulary are joined by `merge`, so chunks, split launches and tensor-parallel ranks use one formula.

The empty slice is ``(lowest finite number, 0, 0, -inf)``: `merge` with it changes nothing. A masked row is read as a
distribution over one token: ``(0, 1, 0, 0)`` in the slice that starts the vocabulary and the empty slice in the
others, so that `finish` gives it 0, 0, 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpoforge_kernels.errors import KernelError

UNDERFLOW = -1e4
"""An exponent at which ``exp`` is 0 in float64 too; a finite bound, since ``0 * -inf`` is no number."""


class RowStats(NamedTuple):
    """What one read of the logits leaves of each row, ``[N]`` each, float32 (float64 for float64 logits)."""

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    chosen: Tensor


class TokenStats(NamedTuple):
    """Log-prob of the chosen token, entropy (nats) and logsumexp of each row, ``[N]``."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics of logits of ``dtype``: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def finish(stats: RowStats, inv_temperature: Tensor) -> TokenStats:
    """``logp = s (z_y - m) - ln S``, ``H = ln S - U / S`` and ``lse = s m + ln S``, each ``[N]``."""
    log_total = stats.total.log()
    return TokenStats(
        logprobs=inv_temperature * (stats.chosen - stats.maximum) - log_total,
        entropy=log_total - stats.weighted / stats.total,
        logsumexp=inv_temperature * stats.maximum + log_total,
    )


def merge(a: RowStats, b: RowStats, inv_temperature: Tensor) -> RowStats:
    """Statistics of two slices of a vocabulary as one: associative, commutative, with the empty slice as identity."""
    maximum = torch.maximum(a.maximum, b.maximum)
    totals, weights = [], []
    for part in (a, b):
        shift = (inv_temperature * (part.maximum - maximum)).clamp(min=UNDERFLOW)
        factor = shift.exp()
        totals.append(factor * part.total)
        weights.append(factor * (part.weighted + part.total * shift))
    return RowStats(maximum, totals[0] + totals[1], weights[0] + weights[1], torch.maximum(a.chosen, b.chosen))


def inverse_temperature(temperature: Tensor | float, logits: Tensor) -> Tensor:
    """``1 / temperature [N]`` in the dtype of the statistics of ``logits [N, V]``.

    The values of a tensor are not looked at under ``torch.compile``; on an accelerator the check does not wait, as in
    `check_ids`.

    Raises:
        KernelError: a temperature that is not a positive number, or a tensor of another shape.
    """
    dtype, num_rows = statistics_dtype(logits.dtype), logits.shape[0]
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise KernelError(f"temperature = {temperature} is not a positive number")
        return torch.full((num_rows,), 1 / temperature, dtype=dtype, device=logits.device)
    if temperature.ndim == 0:
        temperature = temperature.expand(num_rows)
    if temperature.shape != (num_rows,):
        raise KernelError(f"temperature has shape {list(temperature.shape)}, but there are {num_rows} rows")
    inverse = temperature.detach().to(device=logits.device, dtype=dtype).reciprocal()
    if not torch.compiler.is_compiling():
        _check_positive(temperature, inverse)
    return inverse


def _check_positive(temperature: Tensor, inverse: Tensor) -> None:
    is_usable = (inverse > 0) & inverse.isfinite()
    if inverse.device.type != "cpu":
        torch._assert_async(is_usable.all())
    elif not is_usable.all():
        row = int(is_usable.logical_not().nonzero()[0])
        raise KernelError(f"temperature = {float(temperature[row]):g} of row {row} is not a positive number")


def check_rows(logits: Tensor, ids: Tensor, mask: Tensor | None, softcap: float | None, scale: float) -> None:
    """Stop unless these are ``[N, V]`` floats, ``[N]`` int64 and ``[N]`` bool on one device, with usable numbers.

    Raises:
        KernelError: they are not.
    """
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise KernelError(f"logits are {logits.dtype} {list(logits.shape)}, not floats [N, V]")
    if ids.dtype != torch.int64 or ids.shape != logits.shape[:1]:
        raise KernelError(f"ids are {ids.dtype} {list(ids.shape)}, not int64 [{logits.shape[0]}]")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != ids.shape):
        raise KernelError(f"mask is {mask.dtype} {list(mask.shape)}, not bool [{logits.shape[0]}]")
    for name, tensor in (("ids are", ids), ("mask is", mask)):
        if tensor is not None and tensor.device != logits.device:
            raise KernelError(f"{name} on {tensor.device}, not on {logits.device}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise KernelError(f"softcap = {softcap} is not a positive number", "None is for logits without softcap")
    if not 0 < scale < math.inf:
        raise KernelError(f"scale = {scale} is not a positive number", "1.0 is for logits as they are")


def check_ids(ids: Tensor, num_tokens: int, mask: Tensor | None) -> None:
    """Stop unless the id of every row that is not masked is in ``[0, num_tokens)``.

    On an accelerator the check does not wait: a bad id stops the stream (``torch._assert_async``).

    Raises:
        KernelError: an id is outside.
    """
    if not len(ids):
        return
    if mask is not None:
        ids = ids.masked_fill(~mask, 0)
    lowest, highest = torch.aminmax(ids)
    if ids.device.type != "cpu":
        torch._assert_async((lowest >= 0) & (highest < num_tokens))
    elif int(lowest) < 0 or int(highest) >= num_tokens:
        bad = int(lowest) if int(lowest) < 0 else int(highest)
        raise KernelError(f"token id {bad} is outside the vocabulary of {num_tokens} tokens")


def can_overwrite(logits: Tensor) -> bool:
    """Whether a gradient may be written over ``logits``, as far as they themselves tell.

    Not over leaves, whose ``grad`` would be the leaf itself, nor over rows that overlap, nor over logits that are
    copied first.
    """
    num_rows, num_tokens = logits.shape
    apart = num_rows <= 1 or logits.stride(0) >= num_tokens
    return not logits.is_leaf and apart and (logits.stride(1) == 1 or num_tokens == 1)


def unit_columns(logits: Tensor) -> Tensor:
    """``logits [N, V]`` itself when neighbors in a row are neighbors in memory, else a copy of which that holds.

    Raises:
        KernelError: a tensor that wraps others (a ``DTensor``) and has no memory that a kernel could read.
    """
    if logits.numel() and logits.device.type != "meta" and not logits.data_ptr():
        kind = type(logits).__name__
        raise KernelError(
            f"logits are a {kind} without memory of its own", "pass plain tensors, such as its local part"
        )
    if logits.stride(1) == 1 or logits.shape[1] == 1:
        return logits
    # No rows are contiguous to torch whatever their strides, which `contiguous` would leave.
    return logits.clone(memory_format=torch.contiguous_format)
