"""Rows of a batch without padding and with what they share once: what the trunk of a model has to see, nothing else.

Two packings of it: `PromptsOnce` here, and `grpoforge.trie.Trie`. A completion's last token predicts nothing and is
left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from grpoforge.prefix_attention import Levels, Rectangle, prefix_attention
from grpoforge.types import Batch


class CannotShare(Exception):
    """Why a model, or one batch, has to take another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed(ABC):
    """The rows of a batch as one sequence of ``N`` tokens, and how they attend to each other."""

    input_ids: Tensor
    """``[1, N]``"""
    position_ids: Tensor
    """``[1, N]``"""
    predicted_at: Tensor
    """``[n]``: for each real completion token, row-major, the place in the sequence that predicts it."""
    longest: int
    """Tokens of the longest prompt with its completion."""

    @classmethod
    @abstractmethod
    def of(cls, batch: Batch) -> Self:
        """``batch``, packed."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """Attention of the tokens to what stands before them in their rows, with gradient.

        Args:
            query: ``[N, h, d]``.
            key: ``[N, k, d]``; every ``h / k`` heads of the queries share one.
            value: ``[N, k, d]``.
            scale: factor on the scores.
            softcap: scores become ``softcap * tanh(score / softcap)``.

        Returns:
            ``[N, h, d]``.

        Raises:
            CannotShare: this packing has no such attention.
        """

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]


def num_plain_tokens(batch: Batch) -> int:
    """Tokens that the rectangle of ``batch`` has, padding included, columns that no row uses left out."""
    widths = (mask.any(dim=0).sum().clamp(min=1) for mask in (batch.prompt_mask, batch.completion_mask))
    return batch.num_rows * int(sum(widths))


def first_rows(batch: Batch) -> Tensor:
    """``[B]`` bool: rows whose prompt is another than that of the row before. Rows of a group stand together."""
    same = (batch.prompt_ids[1:] == batch.prompt_ids[:-1]) | ~batch.prompt_mask[1:]
    same &= batch.prompt_mask[1:] == batch.prompt_mask[:-1]
    return torch.cat([same.new_ones(1), ~same.all(dim=1)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsOnce(Packed):
    """Each prompt once per group, on every device.

    The sequence is ``[prompt 1, ..., prompt P, completions of prompt 1, ..., completions of prompt P]`` with positions
    that begin anew in every prompt and go on from it in each of its completions.
    """

    levels: Levels

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """See `Packed.of`."""
        first = first_rows(batch)
        group = first.long().cumsum(dim=0) - 1
        prompt_ids, prompt_mask = batch.prompt_ids[first], batch.prompt_mask[first]
        prompt_lengths = prompt_mask.sum(dim=1)
        prompt_row, prompt_column = prompt_mask.nonzero(as_tuple=True)
        prompt_position = (prompt_mask.long().cumsum(dim=1) - 1)[prompt_row, prompt_column]

        lengths = (batch.completion_mask.sum(dim=1) - 1).clamp(min=0)
        row, token = (torch.arange(batch.completion_mask.shape[1], device=group.device) < lengths[:, None]).nonzero(
            as_tuple=True
        )
        start = lengths.cumsum(dim=0) - lengths
        asking_lengths = torch.zeros_like(prompt_lengths).index_add_(0, group, lengths)
        asking_start = asking_lengths.cumsum(dim=0) - asking_lengths
        in_group = torch.arange(len(row), device=group.device) - asking_start[group[row]]

        real_row, real_token = batch.completion_mask.nonzero(as_tuple=True)
        num_prompts, num_prompt_tokens = len(prompt_lengths), len(prompt_row)
        last_of_prompt = prompt_lengths.cumsum(dim=0) - 1
        left_neighbor = num_prompt_tokens + start[real_row] + real_token - 1
        widest = (max(1, int(lengths.max())) for lengths in (prompt_lengths, asking_lengths, lengths))
        prompt_width, asking_width, width = widest
        return cls(
            input_ids=torch.cat([prompt_ids[prompt_row, prompt_column], batch.completion_ids[row, token]])[None],
            position_ids=torch.cat([prompt_position, prompt_lengths[group[row]] + token])[None],
            predicted_at=torch.where(real_token == 0, last_of_prompt[group[real_row]], left_neighbor),
            longest=int((prompt_lengths[group] + lengths).max()),
            levels=Levels(
                Rectangle(prompt_row * prompt_width + prompt_position, num_prompts, prompt_width),
                Rectangle(group[row] * asking_width + in_group, num_prompts, asking_width),
                Rectangle(row * width + token, batch.num_rows, width),
            ),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """See `Packed.attend`."""
        return prefix_attention(query, key, value, self.levels, scale=scale, softcap=softcap)
