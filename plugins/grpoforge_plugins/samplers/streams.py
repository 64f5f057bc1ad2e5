"""Random numbers by address: a completion's token has one uniform number, whoever draws it, when and beside what.

The address is ``(seed, prompt number, sample number, token number)``. A row's first three make its *stream*, 64 bits;
the uniform of token ``t`` is the ``t``-th output of splitmix64 (Steele, Lea, Flood 2014) started at the stream. The C++
decoder holds the same three lines, so results do not depend on batch size, slots, threads or decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = 2**64 - 1


def stream(seed: int, prompt: int, sample: int) -> int:
    """The stream of one completion as a signed 64-bit integer."""
    state = 0
    for number in (seed, prompt, sample):
        state = (state + number + GOLDEN) & MASK
        state = ((state ^ (state >> 30)) * FIRST) & MASK
        state = ((state ^ (state >> 27)) * SECOND) & MASK
        state ^= state >> 31
    return _signed(state)


def streams(seed: int, numbers: Sequence[int]) -> Tensor:
    """The stream of each row, ``[B]`` int64: row ``i`` is the next sample of prompt ``numbers[i]``.

    A prompt that occurs twice in a batch so goes on with other samples, and gives no completion twice.
    """
    seen: dict[int, int] = {}
    rows = []
    for number in numbers:
        sample = seen[number] = seen.get(number, -1) + 1
        rows.append(stream(seed, number, sample))
    return torch.tensor(rows, dtype=torch.int64)


def uniforms(rows: Tensor, tokens: Tensor) -> Tensor:
    """Uniform numbers in ``[0, 1)``, multiples of 2^-52, float64 ``[n]``, for streams ``rows [n]``, ``tokens [n]``."""
    state = rows + (tokens + 1) * _signed(GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(SECOND)
    state = state ^ _shifted(state, 31)
    return _shifted(state, 12).double() * 2.0**-52


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _shifted(state: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left: torch's shift copies the sign."""
    shifted: Tensor = (state >> by) & (2 ** (64 - by) - 1)
    return shifted
