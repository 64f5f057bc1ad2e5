"""What a decoder is asked for and what it answers: the same for every decoder of this folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grpoforge.types import PolicyView, Prompt
from grpoforge_plugins.samplers.inverse_cdf import Cuts

Ended = Callable[[Sequence[int]], bool]
"""Whether a completion of these tokens has reached a stop string."""

PATIENCE = 8
"""Tokens drawn between two looks for stop strings; what was drawn behind one is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """``B`` completions of ``P`` different prompts. Rows of one prompt are neighbors."""

    prompts: tuple[tuple[int, ...], ...]
    """The tokens of each prompt, no two of them equal."""
    prompt_of: Tensor
    """``[B]`` int64: the prompt of each row, ascending."""
    temperatures: Tensor
    """``[B]`` float64."""
    streams: Tensor
    """``[B]`` int64: where each row's random numbers come from (`streams`)."""
    max_tokens: int
    """Tokens per completion at most, ``T``."""
    do_sample: bool
    """False takes the most probable token."""
    cuts: Cuts
    eos: tuple[int, ...]
    """Tokens that end a completion."""
    slots: int
    """Completions decoded at a time at most."""
    ended: Ended | None = None
    """Stop strings, if there are any."""

    @property
    def num_rows(self) -> int:
        return len(self.prompt_of)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a decoder returns, on the CPU; meaningless behind each row's length."""

    tokens: Tensor
    """``[B, T]`` int64"""
    logprobs: Tensor
    """``[B, T]`` float32: log-softmax of logits / temperature at the token, before any cut."""
    lengths: Tensor
    """``[B]`` int64, at least 1: the EOS counts."""

    def put_back(self, order: Tensor) -> Drawn:
        """Row ``i`` of this becomes row ``order[i]``."""
        back = order.argsort()
        return Drawn(self.tokens[back], self.logprobs[back], self.lengths[back])


class Decoder(Protocol):
    """Turns requests into completions."""

    name: str

    def decode(self, policy: PolicyView, requests: Requests) -> Drawn:
        """All rows of ``requests``, decoded by the policy's present weights."""
        ...


def arrange(prompts: Sequence[Prompt]) -> tuple[tuple[tuple[int, ...], ...], Tensor, Tensor]:
    """The different prompts in order of appearance, the prompt of each row, and the order that groups the rows.

    ``order [B]`` lists the rows so that equal prompts are neighbors; the second result belongs to rows in that order.
    """
    numbers: dict[tuple[int, ...], int] = {}
    of_row = torch.tensor([numbers.setdefault(prompt.token_ids, len(numbers)) for prompt in prompts])
    order = of_row.argsort(stable=True)
    return tuple(numbers), of_row[order], order
