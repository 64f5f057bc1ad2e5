"""The row algebra: merging slices of a vocabulary, masked rows, and what is refused."""

from __future__ import annotations

import importlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpoforge_kernels.errors import KernelError
from grpoforge_kernels.rows import (
    RowStats,
    can_overwrite,
    check_ids,
    check_rows,
    finish,
    inverse_temperature,
    merge,
    unit_columns,
)

OPTIONS = {"softcap": None, "scale": 1.0}
BACKENDS = ["reference", pytest.param("cpp", marks=pytest.mark.needs_compiler)]


def stats_of(name: str, logits: Tensor, ids: Tensor, s: Tensor, first_id: int, mask: Tensor | None) -> RowStats:
    module = importlib.import_module(f"grpoforge_kernels.{name}.selective_log_softmax")
    stats: RowStats = module.row_stats(logits, ids, s, mask=mask, first_id=first_id, entropy=True, **OPTIONS)
    return stats


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    cuts=st.lists(st.integers(1, 299), max_size=4, unique=True), seed=st.integers(0, 99), size=st.sampled_from([1, 40])
)
@settings(max_examples=25, deadline=None)
def test_slices_merge_to_the_whole_in_any_order(backend: str, cuts: list[int], seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(7, 300, generator=generator)
    logits[1, :200] = -math.inf
    ids = torch.randint(0, 300, (7,), generator=generator)
    ids[1] = 250
    s = torch.tensor([1.0, 20.0, 0.05, 1.5, 1.0, 1.0, 0.7])
    mask = torch.tensor([True] * 6 + [False])
    edges = [0, *sorted(cuts), 300]
    parts = [stats_of(backend, logits[:, low:high], ids, s, low, mask) for low, high in pairwise(edges)]
    whole = finish(stats_of(backend, logits, ids, s, 0, mask), s)
    for order in (parts, parts[::-1], parts[1:] + parts[:1]):
        merged = order[0]
        for part in order[1:]:
            merged = merge(merged, part, s)
        for ours, expected in zip(finish(merged, s), whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)
    assert [float(values[6]) for values in finish(parts[0], s)] == [0.0, 0.0, 0.0]


def test_the_empty_slice_changes_nothing() -> None:
    logits, ids, s = torch.randn(4, 9), torch.tensor([0, 3, 5, 8]), torch.full((4,), 20.0)
    stats = stats_of("reference", logits, ids, s, 0, None)
    lowest = torch.finfo(torch.float32).min
    empty = RowStats(*(torch.full((4,), value) for value in (lowest, 0.0, 0.0, -math.inf)))
    for merged in (merge(stats, empty, s), merge(empty, stats, s)):
        assert all(torch.equal(ours, expected) for ours, expected in zip(merged, stats, strict=True))


def test_one_row_by_hand() -> None:
    # e^0 + e^ln3 = 4 of which 3 are chosen; relative to the maximum: S = 4/3, U = -ln 3 / 3.
    stats = stats_of("reference", torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]), torch.ones(1), 0, None)
    assert [float(value) for value in stats] == pytest.approx([math.log(3), 4 / 3, -math.log(3) / 3, math.log(3)])
    logprobs, entropy, logsumexp = finish(stats, torch.ones(1))
    assert logprobs.tolist() == pytest.approx([math.log(0.75)])
    assert entropy.tolist() == pytest.approx([-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))])
    assert logsumexp.tolist() == pytest.approx([math.log(4)])


def test_temperatures() -> None:
    logits = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert inverse_temperature(0.5, logits).tolist() == [2.0, 2.0]
    assert inverse_temperature(torch.tensor([0.5, 4.0], dtype=torch.float64), logits).tolist() == [2.0, 0.25]
    assert inverse_temperature(torch.tensor(4.0), logits).tolist() == [0.25, 0.25]
    assert inverse_temperature(1.0, logits.double()).dtype == torch.float64
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(KernelError, match=f"temperature = {wrong} is not a positive number"):
            inverse_temperature(wrong, logits)
        with pytest.raises(KernelError, match=f"temperature = {wrong:g} of row 1 is not a positive number"):
            inverse_temperature(torch.tensor([1.0, wrong]), logits)
    with pytest.raises(KernelError, match=r"temperature has shape \[3\], but there are 2 rows"):
        inverse_temperature(torch.ones(3), logits)


def test_ids_are_checked_where_the_mask_is_true() -> None:
    mask = torch.tensor([True, False])
    check_ids(torch.tensor([4, 99]), 5, mask)
    check_ids(torch.tensor([0, 4]), 5, None)
    check_ids(torch.zeros(0, dtype=torch.int64), 5, None)
    for bad in (5, -1, 2**40):
        with pytest.raises(KernelError, match=f"token id {bad} is outside the vocabulary of 5 tokens"):
            check_ids(torch.tensor([bad, 0]), 5, None)


def test_columns_are_copied_only_when_they_must_be() -> None:
    wide = torch.randn(4, 8)
    assert unit_columns(wide[:, :5]).data_ptr() == wide.data_ptr()
    assert unit_columns(wide[:, 2:3]).data_ptr() == wide[:, 2:3].data_ptr()
    assert unit_columns(wide.t()).stride(1) == 1 and torch.equal(unit_columns(wide.t()), wide.t())
    assert unit_columns(wide[:0, ::2]).stride(1) == 1


def test_all_must_lie_on_one_device() -> None:
    logits, ids, mask = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    check_rows(logits, ids, mask, 30.0, 0.5)
    with pytest.raises(KernelError, match="ids are on meta, not on cpu"):
        check_rows(logits, ids.to("meta"), mask, None, 1.0)
    with pytest.raises(KernelError, match="mask is on meta, not on cpu"):
        check_rows(logits, ids, mask.to("meta"), None, 1.0)


@pytest.mark.parametrize("softcap", [0.0, -5.0, math.nan, math.inf])
def test_a_softcap_is_positive(softcap: float) -> None:
    with pytest.raises(KernelError, match=f"softcap = {softcap} is not a positive number") as caught:
        check_rows(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), None, softcap, 1.0)
    assert caught.value.hint == "None is for logits without softcap"


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_is_positive(scale: float) -> None:
    with pytest.raises(KernelError, match=f"scale = {scale} is not a positive number") as caught:
        check_rows(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), None, None, scale)
    assert caught.value.hint == "1.0 is for logits as they are"


def test_what_wraps_others_has_nothing_to_read() -> None:
    class Wrapper(Tensor):
        __torch_dispatch__ = None  # type: ignore[assignment]

    wrapper = Tensor._make_wrapper_subclass(Wrapper, (2, 3))  # type: ignore[attr-defined]
    with pytest.raises(KernelError, match="logits are a Wrapper without memory of its own") as caught:
        unit_columns(wrapper)
    assert caught.value.hint == "pass plain tensors, such as its local part"
    assert unit_columns(torch.zeros(0, 3)).shape == (0, 3)


def test_what_may_be_overwritten() -> None:
    leaf = torch.randn(6, 4, requires_grad=True)
    made = leaf * 1
    assert can_overwrite(made) and can_overwrite(made[1:]) and can_overwrite(made[:1].expand(1, 4))
    for kept in (leaf, made.t(), made[:1].expand(6, 4), made.as_strided((3, 4), (2, 1))):
        assert not can_overwrite(kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inverse_temperatures_may_lie_apart(backend: str) -> None:
    module = importlib.import_module(f"grpoforge_kernels.{backend}.selective_log_softmax")
    logits, ids, s = torch.randn(4096, 5), torch.zeros(4096, dtype=torch.int64), torch.full((8192,), 0.5)[::2]
    stats = stats_of(backend, logits, ids, s, 0, None)
    for ours, expected in zip(module.finish(stats, s), module.finish(stats, s.contiguous()), strict=True):
        assert torch.equal(ours, expected)
