"""Rollouts become rectangles: values, masks and the sides on which they are padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch

from grpoforge.collate import collate, split
from grpoforge.types import Batch, Rollouts

T, F = True, False


@pytest.fixture
def rollouts(make_rollouts: Callable[..., Rollouts]) -> Rollouts:
    return make_rollouts([[5, 6, 7], [9]], [[[2, 1], [3]], [[4, 4, 8], [1]]], [[0.7, 1.3], [1.3, 0.7]])


def test_prompts_are_padded_on_the_left_and_completions_on_the_right(rollouts: Rollouts) -> None:
    batch = collate(rollouts, pad_token_id=0)
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [5, 6, 7], [0, 0, 9], [0, 0, 9]]
    assert batch.prompt_mask.tolist() == [[T, T, T], [T, T, T], [F, F, T], [F, F, T]]
    assert batch.completion_ids.tolist() == [[2, 1, 0], [3, 0, 0], [4, 4, 8], [1, 0, 0]]
    assert batch.completion_mask.tolist() == [[T, T, F], [T, F, F], [T, T, T], [T, F, F]]
    assert batch.sampling_logprobs.tolist() == [[-1, -1, 0], [-1, 0, 0], [-1, -1, -1], [-1, 0, 0]]
    assert batch.temperatures.tolist() == [0.7, 1.3, 1.3, 0.7]
    assert batch.temperatures.dtype == torch.float64


@pytest.mark.parametrize(
    ("side", "expected"),
    [("left", [[0, 0, 5, 6, 7], [0, 0, 0, 0, 9]]), ("right", [[5, 6, 7, 0, 0], [9, 0, 0, 0, 0]])],
)
def test_extra_columns(rollouts: Rollouts, side: Literal["left", "right"], expected: list[list[int]]) -> None:
    batch = collate(rollouts, pad_token_id=0, padding_side=side, extra=2)
    assert batch.prompt_ids[::2].tolist() == expected
    assert batch.prompt_mask.sum(dim=1).tolist() == [3, 3, 1, 1]
    assert batch.completion_ids.shape == (4, 5) and batch.completion_mask.sum(dim=1).tolist() == [2, 1, 3, 1]


def test_masks_come_from_lengths_when_pad_is_eos(rollouts: Rollouts) -> None:
    batch = collate(rollouts, pad_token_id=1)
    assert batch.completion_ids.tolist() == [[2, 1, 1], [3, 1, 1], [4, 4, 8], [1, 1, 1]]
    assert batch.completion_mask.sum(dim=1).tolist() == [2, 1, 3, 1]


def test_rows_keep_their_order(rollouts: Rollouts) -> None:
    batch = collate(rollouts, pad_token_id=0)
    chosen = batch.rows(torch.tensor([2, 0]))
    assert chosen.num_rows == 2
    assert chosen.completion_ids.tolist() == [[4, 4, 8], [2, 1, 0]]
    assert chosen.temperatures.tolist() == [1.3, 0.7]
    assert batch.rows(slice(1, 2)).prompt_ids.tolist() == [[5, 6, 7]]
    assert batch.to(torch.device("cpu")).completion_ids.equal(batch.completion_ids)


def test_a_batch_of_unequal_sizes_cannot_be_built(rollouts: Rollouts) -> None:
    batch: Batch = collate(rollouts, pad_token_id=0)
    with pytest.raises(AssertionError):
        replace(batch, temperatures=torch.zeros(3))
    with pytest.raises(AssertionError):
        replace(batch, completion_mask=batch.completion_mask.long())


def test_truncated_completions_may_be_left_out(rollouts: Rollouts) -> None:
    batch = collate(rollouts, pad_token_id=0, mask_truncated=True)
    assert batch.completion_mask.tolist() == [[T, T, F], [F, F, F], [F, F, F], [T, F, F]]
    assert batch.completion_ids.tolist() == [[2, 1, 0], [3, 0, 0], [4, 4, 8], [1, 0, 0]]


def test_split_covers_every_row_once() -> None:
    assert split(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert split(4, 4) == split(4, 9) == [slice(0, 4)]
    assert split(0, 3) == []
