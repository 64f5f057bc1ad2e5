"""Bounds, masks, rows without tokens, and 1 where sampler and trainer agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpoforge.binding import bind
from grpoforge.declarations import declared
from grpoforge.errors import ConfigError
from grpoforge_plugins.corrections.mask import GeometricMask, IcePop, SequenceMask, opsm
from grpoforge_plugins.corrections.target import TargetSequenceMask, TargetTIS
from grpoforge_plugins.corrections.truncate import TwoSidedTIS, tis, tis_sequence

CORRECTIONS: dict[str, Callable[..., Tensor]] = {
    "tis": tis,
    "tis_sequence": tis_sequence,
    "tis_two_sided": TwoSidedTIS(),
    "icepop": IcePop(),
    "icepop one": IcePop(kept="one"),
    "sequence_mask": SequenceMask(),
    "sequence_mask one": SequenceMask(kept="one"),
    "geometric_mask": GeometricMask(),
    "geometric_mask one": GeometricMask(kept="one"),
    "opsm": opsm,
    "target_tis": TargetTIS(),
    "target_sequence_mask": TargetSequenceMask(),
    "target_sequence_mask one": TargetSequenceMask(kept="one"),
}
TO_TARGET = [name for name in CORRECTIONS if name.startswith("target")]
"""They compare the old policy with itself at another temperature: what others call sampling is their old."""
BOUNDS = {
    "tis": (0.0, 2.0),
    "tis_sequence": (0.0, 3.0),
    "tis_two_sided": (0.5, 5.0),
    "icepop": (0.5, 5.0),
    "sequence_mask": (0.0, 3.0),
    "target_tis": (0.0, 2.0),
    "target_sequence_mask": (0.0, 3.0),
}
"""Of weights that are not 0."""
everything = pytest.mark.parametrize("name", CORRECTIONS)
ROWS, TOKENS = 3, 4

logprobs = st.lists(st.floats(-30, 0, width=32), min_size=ROWS * TOKENS, max_size=ROWS * TOKENS).map(
    lambda values: torch.tensor(values).reshape(ROWS, TOKENS)
)
masks = st.lists(st.integers(0, TOKENS), min_size=ROWS, max_size=ROWS).map(
    lambda lengths: torch.arange(TOKENS)[None, :] < torch.tensor(lengths)[:, None]
)


def weigh(name: str, mask: Tensor, old: Tensor, sampling: Tensor, current: Tensor | None = None) -> Tensor:
    advantages = torch.tensor([[-1.0], [1.0], [-0.5]])[: len(old)].expand_as(old)
    target = old
    if name in TO_TARGET:
        old = sampling
    data = {
        "logprobs": old if current is None else current,
        "old_logprobs": old,
        "sampling_logprobs": sampling,
        "target_logprobs": target,
        "advantages": advantages,
        "completion_mask": mask,
    }
    found: Tensor = bind("correction", CORRECTIONS[name])(data)
    return found


@everything
@given(old=logprobs, sampling=logprobs, mask=masks)
def test_weights_are_finite_and_not_negative(name: str, old: Tensor, sampling: Tensor, mask: Tensor) -> None:
    weights = weigh(name, mask, old, sampling)
    assert weights.shape == old.shape and weights.dtype == old.dtype
    if not name.startswith("geometric"):  # its token ratio is not cut
        assert bool(weights.isfinite().all())
    assert bool((weights >= 0).all())
    if name in BOUNDS:
        low, high = BOUNDS[name]
        assert bool(((weights == 0) | ((weights >= low) & (weights <= high))).all())
    if name.endswith("one") or name == "opsm":
        assert bool(((weights == 0) | (weights == 1)).all())


@everything
@given(old=logprobs, mask=masks)
def test_exactly_1_where_sampler_and_trainer_agree(name: str, old: Tensor, mask: Tensor) -> None:
    assert weigh(name, mask, old, old.clone()).equal(torch.ones_like(old))


@everything
@given(old=logprobs, sampling=logprobs, mask=masks)
def test_what_stands_at_masked_positions_does_not_matter(
    name: str, old: Tensor, sampling: Tensor, mask: Tensor
) -> None:
    wild = torch.where(mask, old, torch.full_like(old, 1e4))
    assert weigh(name, mask, wild, sampling, old).equal(weigh(name, mask, old, sampling, old))
    wild = torch.where(mask, sampling, torch.full_like(old, -1e4))
    assert weigh(name, mask, old, wild).equal(weigh(name, mask, old, sampling))


@everything
def test_a_row_without_tokens_has_ratio_1(name: str) -> None:
    empty = torch.zeros(1, TOKENS, dtype=torch.bool)
    weights = weigh(name, empty, torch.full((1, TOKENS), 9.0), torch.full((1, TOKENS), -9.0))
    assert weights.tolist() == [[1.0] * TOKENS]


@everything
def test_rows_do_not_see_each_other(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(ROWS, TOKENS, generator=generator)
    sampling = -torch.rand(ROWS, TOKENS, generator=generator)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    assert weigh(name, mask, old, sampling)[:1].equal(weigh(name, mask[:1], old[:1], sampling[:1]))


@pytest.mark.parametrize("name", ["tis", "tis_sequence", "tis_two_sided", "target_tis"])
def test_truncation_survives_an_overflowing_ratio(name: str) -> None:
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    weights = weigh(name, mask, torch.zeros(1, TOKENS), torch.full((1, TOKENS), -500.0))
    assert weights.tolist() == [[BOUNDS[name][1]] * TOKENS]


def test_by_hand() -> None:
    # Ratios 4, 0.25 and 1: product 1, geometric mean 1.
    mask = torch.ones(1, 3, dtype=torch.bool)
    old = torch.tensor([[4.0, 0.25, 1.0]], dtype=torch.float64).log()
    sampling = torch.zeros_like(old)
    assert tis(old, sampling, mask)[0].tolist() == pytest.approx([2.0, 0.25, 1.0])
    assert tis_sequence(old, sampling, mask)[0].tolist() == pytest.approx([1.0] * 3)
    assert TwoSidedTIS(high=3.0)(old, sampling, mask)[0].tolist() == pytest.approx([3.0, 0.5, 1.0])
    assert IcePop()(old, sampling, mask)[0].tolist() == pytest.approx([4.0, 0.0, 1.0])
    assert SequenceMask()(old, sampling, mask)[0].tolist() == pytest.approx([1.0] * 3)
    assert GeometricMask()(old, sampling, mask)[0].tolist() == pytest.approx([4.0, 0.25, 1.0])
    assert GeometricMask(kept="one")(old, sampling, mask)[0].tolist() == [1.0] * 3


def test_a_geometric_mean_does_not_drift_with_length() -> None:
    for tokens in (4, 400):
        old, mask = torch.full((1, tokens), 0.005), torch.ones(1, tokens, dtype=torch.bool)
        assert bool(GeometricMask()(old, torch.zeros_like(old), mask).all())
    assert not SequenceMask()(old, torch.zeros_like(old), mask).any(), "exp(2) > 3"


def test_opsm_drops_only_what_is_bad_and_far() -> None:
    mask = torch.tensor([[True, True, False]] * 4)
    sampling = torch.zeros(4, 3)
    # Mean of sampling - current over the two tokens: 0.6, 0.6, 0.4, -0.6.
    current = torch.tensor([[-0.2, -1.0, 99.0], [-0.2, -1.0, 99.0], [-0.2, -0.6, 99.0], [0.6, 0.6, 99.0]])
    advantages = torch.tensor([[-1.0], [0.0], [-1.0], [-1.0]]).expand(4, 3)
    assert opsm(current, sampling, advantages, mask)[:, 0].tolist() == [0.0, 1.0, 1.0, 1.0]
    assert opsm(current, sampling, advantages, mask, delta=0.1)[:, 0].tolist() == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("build", [TwoSidedTIS, IcePop, SequenceMask, GeometricMask, TargetSequenceMask])
def test_bounds_that_leave_nothing(build: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(low=2.0, high=2.0)
    assert caught.value.message == "correction options `low` 2 and `high` 2 leave nothing between them"
    assert caught.value.hint == "choose `low` < `high`"


def test_declares_what_a_weight_belongs_to() -> None:
    """A weight that is the same along the row belongs to the row."""
    generator = torch.Generator().manual_seed(5)
    old = -torch.rand(ROWS, TOKENS, generator=generator) * 0.01
    sampling = -torch.rand(ROWS, TOKENS, generator=generator) * 0.01
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    sampling[:, 0] -= 1.0
    sampling[:, 1] += 1.0
    for name, correction in CORRECTIONS.items():
        weights = weigh(name, mask, old, sampling)
        constant = bool((weights == weights[:, :1]).all())
        expected = "token" if name == "icepop one" else "sequence" if constant else "token"
        assert declared(correction, "level") == expected, name


def test_to_a_target_by_hand() -> None:
    """Two tokens of a coin with odds 3 to 1 at temperature 1: odds 9 to 1 at 1/2, sqrt 3 to 1 at 2."""
    mask = torch.ones(1, 2, dtype=torch.bool)

    def coin(odds: float) -> Tensor:
        return torch.tensor([[odds / (1 + odds), 1 / (1 + odds)]], dtype=torch.float64).log()

    cold, target, hot = coin(9.0), coin(3.0), coin(3.0**0.5)
    assert TargetTIS()(target, cold, mask)[0].tolist() == pytest.approx([0.75 / 0.9, 2.0]), "0.25 / 0.1, cut"
    rare = (1 + 3.0**0.5) / 4
    assert TargetTIS()(target, hot, mask)[0].tolist() == pytest.approx([3.0**0.5 * rare, rare])
    product = 0.75 * 0.25 / (0.9 * 0.1)
    assert TargetSequenceMask()(target, cold, mask)[0].tolist() == pytest.approx([product] * 2)
    assert TargetSequenceMask(high=2.0)(target, cold, mask)[0].tolist() == [0.0, 0.0]
    assert TargetSequenceMask(kept="one")(target, cold, mask)[0].tolist() == [1.0, 1.0]


def test_the_mean_weight_over_the_draws_of_a_row_is_1() -> None:
    """``E_T[p_1 / p_T] = 1``: what is drawn at another temperature counts, on average, as once."""
    logits = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)
    target = logits.log_softmax(dim=0)[None]
    for temperature in (0.7, 1.3):
        own = (logits / temperature).log_softmax(dim=0)[None]
        weights = TargetTIS(cap=1e9)(target, own, torch.ones(1, 4, dtype=torch.bool))
        assert float((own.exp() * weights).sum()) == pytest.approx(1.0, abs=1e-14)
