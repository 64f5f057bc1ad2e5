"""Rollouts to rectangles: the only place that pads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from grpoforge.types import Batch, Rollouts

PaddingSide = Literal["left", "right"]


def collate(
    rollouts: Rollouts,
    *,
    pad_token_id: int,
    padding_side: PaddingSide = "left",
    extra: int = 0,
    mask_truncated: bool = False,
) -> Batch:
    """One row per completion, prompt-major, on the CPU.

    Args:
        rollouts: ``P`` groups of ``G`` completions.
        pad_token_id: filler; its value never matters because masks come from lengths.
        padding_side: side on which short prompts are padded. Completions are padded on the right.
        extra: columns of padding to add to prompts and completions beyond what is needed.
        mask_truncated: leave completions that were cut at the length limit out of the loss and of every denominator
            (overlong filtering, 2503.14476).

    Returns:
        A `Batch` with ``B = P * G`` rows.
    """
    completions = rollouts.flat()
    prompts = [prompt.token_ids for prompt in rollouts.flat_prompts()]
    prompt_ids, prompt_mask = _pad(prompts, pad_token_id, padding_side, extra)
    completion_ids, completion_mask = _pad([c.token_ids for c in completions], pad_token_id, "right", extra)
    if mask_truncated:
        completion_mask &= torch.tensor([c.finish_reason != "length" for c in completions])[:, None]
    sampling_logprobs = torch.zeros(completion_ids.shape, dtype=torch.float32)
    for row, completion in enumerate(completions):
        sampling_logprobs[row, : len(completion.logprobs)] = torch.tensor(completion.logprobs, dtype=torch.float32)
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        sampling_logprobs=sampling_logprobs,
        temperatures=torch.tensor([c.temperature for c in completions], dtype=torch.float64),
    )


def _pad(rows: Sequence[Sequence[int]], pad: int, side: PaddingSide, extra: int) -> tuple[Tensor, Tensor]:
    """Ragged ids to ``[B, width]`` ids and bool mask, ``width`` = longest row (at least 1) + ``extra``."""
    width = max(1, *(len(row) for row in rows)) + extra
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = True
    return ids, mask


def split(num_rows: int, size: int) -> list[slice]:
    """Consecutive slices of at most ``size`` rows that cover ``num_rows``."""
    assert size > 0
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
