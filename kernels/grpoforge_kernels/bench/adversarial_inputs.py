"""Inputs chosen to break kernels: banned tokens, logits of 1e4, sizes around blocks, masks over NaN, strides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARIES = (1, 2, 7, 1023, 1024, 1025, 5003)
ROWS = 6

LOSSES: Mapping[str, Mapping[str, Any]] = {
    "clip": {"epsilon_low": 0.2, "epsilon_high": 0.2, "kl": None, "beta": 0.0},
    "clip-higher with k3": {"epsilon_low": 0.2, "epsilon_high": 0.28, "kl": "k3", "beta": 0.04},
    "two-sided clip with k1": {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": 1.5, "kl": "k1", "beta": 0.1},
    "dual clip with k2": {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": 3.0, "kl": "k2", "beta": 0.1},
}


@dataclass(frozen=True)
class Rows:
    """Arguments of `ops.selective_log_softmax`."""

    logits: Tensor
    ids: Tensor
    temperature: Tensor | float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, device: str, dtype: torch.dtype | None = None) -> Rows:
        """These arguments elsewhere, the strides of the logits kept unless their format changes."""
        logits = self.logits.to(device) if dtype is None else self.logits.to(device, dtype)
        if dtype is None and logits.stride() != self.logits.stride():
            logits = torch.empty_strided(
                self.logits.shape, self.logits.stride(), dtype=self.logits.dtype, device=device
            ).copy_(self.logits)
        temperature = self.temperature.to(device) if isinstance(self.temperature, Tensor) else self.temperature
        options = {name: _moved(value, device) for name, value in self.options.items()}
        return Rows(logits, self.ids.to(device), temperature, options)


def _moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def row_inputs(dtype: torch.dtype) -> Iterator[tuple[str, Rows]]:
    """Logits by name."""
    generator = torch.Generator().manual_seed(0)

    def drawn(vocabulary: int = 1500, rows: int = ROWS) -> tuple[Tensor, Tensor]:
        logits = 3 * torch.randn(rows, vocabulary, generator=generator)
        return logits.to(dtype), torch.randint(0, vocabulary, (rows,), generator=generator)

    for vocabulary in VOCABULARIES:
        yield f"a vocabulary of {vocabulary}", Rows(*drawn(vocabulary))
    yield from _extremes(*drawn())
    logits, ids = drawn()
    for temperature in (0.05, 0.7, 20.0):
        yield f"temperature {temperature}", Rows(logits, ids, temperature)
    per_row = torch.logspace(-1.3, 1.3, ROWS)
    yield "a temperature for each row", Rows(logits, ids, per_row)
    yield "softcap and scale", Rows(logits, ids, per_row, {"softcap": 5.0, "scale": 0.7})
    wide = torch.zeros(ROWS, 1601, dtype=dtype)
    wide[:, 3:1503] = logits
    yield "rows apart and unaligned", Rows(wide[:, 3:1503], ids)
    yield "columns apart", Rows(logits.T.contiguous().T, ids)
    yield "one row", Rows(*drawn(rows=1))
    yield "no rows", Rows(logits[:0], ids[:0])


def _extremes(logits: Tensor, ids: Tensor) -> Iterator[tuple[str, Rows]]:
    vocabulary = logits.shape[1]
    half, block, single = logits.clone(), logits.clone(), torch.full_like(logits, -math.inf)
    half[:, torch.arange(vocabulary) % 2 == 1] = -math.inf
    yield "every other token banned", Rows(half, ids // 2 * 2)
    block[:, :1100] = -math.inf
    yield "the first 1100 tokens banned", Rows(block, 1100 + ids % 400)
    single[torch.arange(len(ids)), ids] = 2.0
    yield "all tokens but one banned", Rows(single, ids)
    yield "logits around +1e4", Rows(logits + 1e4, ids)
    yield "logits around -1e4", Rows(logits - 1e4, ids)
    yield "logits times 3000", Rows(logits * 3000, ids)
    yield "all logits equal", Rows(torch.full_like(logits, -7.25), ids)
    sure = torch.zeros_like(logits)
    sure[torch.arange(len(ids)), ids] = 30.0
    yield "one sure token", Rows(sure, ids)
    unlikely = torch.zeros_like(logits)
    unlikely[:, 0] = 60.0
    yield "an all but impossible token", Rows(unlikely, ids.clamp(min=1))


def rows_of_losses(dtype: torch.dtype) -> Iterator[tuple[str, Rows]]:
    """Logits for the fused loss: those whose log-probs a ratio can be taken of."""
    kept = ("every other token banned", "logits around +1e4", "logits around -1e4", "all logits equal")
    for name, rows in row_inputs(dtype):
        if name in (*kept, "a vocabulary of 1025", "softcap and scale", "no rows"):
            yield name, rows
        if name == "a vocabulary of 1024":
            mask = torch.arange(ROWS) % 2 == 0
            torn = rows.logits.masked_fill(~mask[:, None], math.nan)
            yield "masked rows that hold NaN", Rows(torn, rows.ids, options={"mask": mask})


@dataclass(frozen=True)
class HeadRows:
    """Arguments of `ops.linear_logprobs`; ``exact`` when the products of hidden states and weight round nothing."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    bias: Tensor | None = None
    exact: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, device: str, dtype: torch.dtype) -> HeadRows:
        """These arguments elsewhere, in another format."""
        hidden, weight = (one.to(device, dtype) for one in (self.hidden, self.weight))
        bias = None if self.bias is None else self.bias.to(device, dtype)
        options = {name: _moved(value, device) for name, value in self.options.items()}
        return HeadRows(hidden, weight, self.ids.to(device), bias, self.exact, options)

    @property
    def leaves(self) -> list[Tensor]:
        """What a gradient is taken by: not hidden states that meet weights of 1e4, whose sum of products cancels."""
        return [self.weight] if self.exact else [self.hidden, self.weight]


def head_inputs(dtype: torch.dtype) -> Iterator[tuple[str, HeadRows]]:
    """Hidden states and output layers by name."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(24, 48, generator=generator).to(dtype)
    weight = (torch.randn(1025, 48, generator=generator) * 0.4).to(dtype)
    ids = torch.randint(0, 1025, (24,), generator=generator)
    bias = torch.randn(1025, generator=generator).to(dtype)
    yield "head", HeadRows(hidden, weight, ids, bias)
    yield "softcap and scale", HeadRows(hidden, weight, ids, options={"softcap": 5.0, "scale": 0.7})
    mask, torn = torch.arange(24) % 3 > 0, hidden.clone()
    torn[~mask] = math.nan
    yield "masked rows that hold NaN", HeadRows(torn, weight, ids, bias, options={"mask": mask})
    banned = bias.masked_fill(torch.arange(1025) % 2 == 1, -math.inf)
    yield "every other token banned", HeadRows(hidden, weight, ids // 2 * 2, banned)
    for name, rows in _extremes(3 * torch.randn(ROWS, 1500, generator=generator).to(dtype), ids[:ROWS]):
        if name in ("logits around +1e4", "logits around -1e4", "all logits equal"):
            # One hidden state for each unit of width: the logits are columns of the weight.
            yield name, HeadRows(torch.eye(ROWS, dtype=dtype), rows.logits.T.contiguous(), rows.ids, exact=True)
    yield "no rows", HeadRows(hidden[:0], weight, ids[:0], bias)
