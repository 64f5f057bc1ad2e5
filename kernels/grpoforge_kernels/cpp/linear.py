"""Sweeps of `linear_logprobs` over the vocabulary in C++, for bfloat16 on CPUs that multiply it (AMX, AVX512_BF16).

What `grpoforge_kernels.linear_panels` computes by one product and one row kernel after the other, panel by panel, is
one pass here: logits of up to 256 tokens by all rows are made, read and forgotten in a core's cache; those of 512 in
the caches of all cores where the head is frozen and its expectation is carried along. Results do not depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from grpoforge_kernels.cpp import loader, products
from grpoforge_kernels.rows import RowStats

__all__ = ["MOST_ROWS", "Sweeps"]

MOST_ROWS = 2048
"""Rows whose packed hidden states stay in a cache from one strip of tokens to the next."""


class _Linear(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("hidden", "weight", "bias", "ids", "inv_temperature")),
        *(
            (name, c_int64)
            for name in ("hidden_row", "weight_row", "num_rows", "hidden_size", "vocab_size", "chunk_bytes")
        ),
        *(("scale", c_float), ("kind", c_int32), ("num_threads", c_int32)),
    )


_library = loader.library("losses")
_room = _library.grpoforge_linear_room
_room.argtypes, _room.restype = (c_void_p, c_int32), c_int64
_forward = _library.grpoforge_linear_forward
_forward.argtypes, _forward.restype = (c_void_p,) * 6, None
_backward = _library.grpoforge_linear_backward
_backward.argtypes, _backward.restype = (c_void_p,) * 10, None


class Sweeps:
    """The head ``weight [V, H]`` bfloat16, ``bias [V]`` or None and ``scale`` over rows that share a sweep.

    ``rows`` are ``hidden [N, H]`` bfloat16, ``ids [N]`` int64 and ``inv_temperature [N]`` float32. Logits are float32.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, scale: float, rows: Sequence[Tensor], chunk_bytes: int
    ) -> None:
        hidden, ids, inv_temperature = rows
        (num_rows, hidden_size), vocab_size = hidden.shape, len(weight)
        assert hidden.dtype == weight.dtype == torch.bfloat16 and weight.shape == (vocab_size, hidden_size)
        assert ids.shape == inv_temperature.shape == (num_rows,)
        assert ids.dtype == torch.int64 and inv_temperature.dtype == torch.float32
        assert weight.stride(1) == 1 and (bias is None or bias.shape == (vocab_size,))
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        # What C++ reads by address lives as long as this.
        self._read = hidden, weight, bias, ids.contiguous(), inv_temperature.contiguous()
        self._linear = _Linear(
            *map(_address, self._read), hidden.stride(0), weight.stride(0), num_rows, hidden_size, vocab_size,
            chunk_bytes, scale, products.kind(), products.num_threads(num_rows * hidden_size * vocab_size),
        )  # fmt: skip

    def room_bytes(self, *, frozen: bool = False) -> int:
        """What a sweep holds beside rows and results; no more than ``chunk_bytes`` unless it needs that.

        The forward of a frozen head holds the logits of 512 tokens.
        """
        wide_bias = 0 if self._read[2] is None else 4 * len(self._read[2])
        return int(_room(byref(self._linear), frozen)) + wide_bias

    def forward(self, *, frozen: bool) -> tuple[RowStats, Tensor | None]:
        """The statistics ``[N]`` of each row of logits; for a frozen head also `linear_panels.Expectation`, ``[N, H]``.

        The weights of that are rounded to bfloat16 before they meet the rows of the head's weight, as slopes are.
        """
        shape = self._read[0].shape
        stats = RowStats(*(torch.empty(shape[0], dtype=torch.float32, device="cpu") for _ in range(4)))
        expectation = torch.empty(shape, dtype=torch.float32, device="cpu") if frozen else None
        _forward(byref(self._linear), *map(_address, (*stats, expectation)))
        if expectation is not None:
            expectation.mul_((self._read[4] * self._linear.scale / stats.total)[:, None])
        return stats, expectation

    def backward(
        self, stats: RowStats, upstream: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients for hidden (float32), weight (bfloat16) and bias (float32); None where not needed.

        ``upstream`` are the derivatives by log-prob, entropy and logsumexp, ``[N]`` float32 each.
        """
        hidden, weight, *_ = self._read
        into = (
            torch.empty(hidden.shape, dtype=torch.float32, device="cpu") if needs[0] else None,
            torch.empty(weight.shape, dtype=weight.dtype, device="cpu") if needs[1] else None,
            torch.empty(len(weight), dtype=torch.float32, device="cpu") if needs[2] else None,
        )
        read = [values.contiguous() for values in (*stats[:3], *upstream)]
        assert all(values.dtype == torch.float32 and values.shape == (len(hidden),) for values in read)
        _backward(byref(self._linear), *map(_address, (*read, *into)))
        return into


def _address(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()
