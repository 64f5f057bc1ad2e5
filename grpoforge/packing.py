"""Rows of a batch without padding, each prompt once: what the trunk of a model has to see, and nothing else.

The sequence is ``[prompt 1, ..., prompt P, completions of prompt 1, ..., completions of prompt P]`` with positions that
begin anew in every prompt and go on from it in each of its completions. A completion's last token predicts nothing and
is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpoforge.types import Batch


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Some tokens of a packed sequence as rows of one width."""

    cells: Tensor
    """``[n]``: the cell of each token, counted row by row."""
    rows: int
    width: int

    @property
    def is_full(self) -> bool:
        """True when no cell is without a token: then the tokens are the cells."""
        return len(self.cells) == self.rows * self.width

    def spread(self, tokens: Tensor) -> Tensor:
        """``tokens [n, h, ...]`` to ``[rows, h, width, ...]``, 0 in cells without a token."""
        if not self.is_full:
            cells = tokens.new_zeros((self.rows * self.width, *tokens.shape[1:]))
            tokens = cells.index_copy_(0, self.cells, tokens)
        return tokens.reshape(self.rows, self.width, *tokens.shape[1:]).transpose(1, 2)

    def collect(self, cells: Tensor) -> Tensor:
        """``cells [rows, h, width, ...]`` back to ``[n, h, ...]``."""
        tokens = cells.transpose(1, 2).flatten(0, 1)
        return tokens if self.is_full else tokens.index_select(0, self.cells)

    def is_padding(self) -> Tensor:
        """``[rows, width]`` bool: cells without a token."""
        empty = torch.ones(self.rows * self.width, dtype=torch.bool, device=self.cells.device)
        empty[self.cells] = False
        return empty.view(self.rows, self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """The rows of a batch as one sequence of ``N`` tokens, and how attention sees it."""

    input_ids: Tensor
    """``[1, N]``"""
    position_ids: Tensor
    """``[1, N]``"""
    predicted_at: Tensor
    """``[n]``: for each real completion token, row-major, the place in the sequence that predicts it."""
    prompts: Rectangle
    """The first ``sum(L)`` tokens, a row for each distinct prompt."""
    asking: Rectangle
    """The other tokens, a row for each prompt: the completions that look at it, one behind the other."""
    completions: Rectangle
    """The other tokens again, a row for each completion."""
    longest: int
    """Tokens of the longest prompt with its completion."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompts.cells)


def num_plain_tokens(batch: Batch) -> int:
    """Tokens that the rectangle of ``batch`` has, padding included, columns that no row uses left out."""
    widths = (mask.any(dim=0).sum().clamp(min=1) for mask in (batch.prompt_mask, batch.completion_mask))
    return batch.num_rows * int(sum(widths))


def num_packed_tokens(batch: Batch) -> int:
    """Tokens that ``pack(batch)`` has."""
    prompts = batch.prompt_mask[first_rows(batch)].sum()
    return int(prompts + (batch.completion_mask.sum(dim=1) - 1).clamp(min=0).sum())


def first_rows(batch: Batch) -> Tensor:
    """``[B]`` bool: rows whose prompt is another than that of the row before. Rows of a group stand together."""
    same = (batch.prompt_ids[1:] == batch.prompt_ids[:-1]) | ~batch.prompt_mask[1:]
    same &= batch.prompt_mask[1:] == batch.prompt_mask[:-1]
    return torch.cat([same.new_ones(1), ~same.all(dim=1)])


def pack(batch: Batch) -> Packed:
    """``batch`` without padding and with each prompt once."""
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
    return Packed(
        input_ids=torch.cat([prompt_ids[prompt_row, prompt_column], batch.completion_ids[row, token]])[None],
        position_ids=torch.cat([prompt_position, prompt_lengths[group[row]] + token])[None],
        predicted_at=torch.where(real_token == 0, last_of_prompt[group[real_row]], left_neighbor),
        prompts=Rectangle(prompt_row * prompt_width + prompt_position, num_prompts, prompt_width),
        asking=Rectangle(group[row] * asking_width + in_group, num_prompts, asking_width),
        completions=Rectangle(row * width + token, batch.num_rows, width),
        longest=int((prompt_lengths[group] + lengths).max()),
    )
