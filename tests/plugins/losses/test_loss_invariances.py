"""Row order, micro-batches and padding change no token's loss, metrics or gradient, whatever the rows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from grpoforge.declarations import declared
from grpoforge.plugins import load_plugins
from grpoforge.types import LossInputs

LOSSES = sorted(component.name for component in load_plugins().registry.list("loss"))
OF_THE_BATCH = ("clip_cov", "kl_cov")
OF_A_TOKEN = ("cispo", "clip", "dppo_kl", "dppo_tv", "dro", "reinforce", "sapo")
OPTIONS: dict[str, dict[str, Any]] = {"clip_cov": {"share": 0.3, "cov_low": -0.5}, "kl_cov": {"share": 0.3}}
"""So that more than one token is chosen."""

lengths_of_rows = st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any)
seeds = st.integers(0, 2**20)


def assume_no_ties(name: str, lengths: list[int]) -> None:
    """In one row, and in two tokens, all covariances are equal but for rounding, and which is picked is anyone's."""
    assume(name not in OF_THE_BATCH or (sum(map(bool, lengths)) > 1 and sum(lengths) > 2))


def changed(inputs: LossInputs, change: Callable[[Tensor], Tensor]) -> LossInputs:
    """The inputs with ``change`` made to every ``[b, T]`` field."""
    values = {one.name: getattr(inputs, one.name) for one in fields(inputs)}
    moved: dict[str, Any] = {
        name: change(value.detach()) if isinstance(value, Tensor) else value for name, value in values.items()
    }
    return LossInputs(**(moved | {"logprobs": moved["logprobs"].requires_grad_()}))


def answers(loss: Any, inputs: LossInputs, slope_of: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Loss, gradient and metrics, 0 where masked."""
    per_token_loss, metrics = loss(inputs)
    found = {"loss": per_token_loss.detach(), "slope": slope_of(loss, inputs), **metrics}
    return {name: torch.where(inputs.completion_mask, one, torch.zeros_like(one)) for name, one in found.items()}


def expect_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, values in found.items():
        assert torch.allclose(values, expected[name], rtol=1e-11, atol=1e-11), name


def test_couplings(build_loss: Callable[..., Any]) -> None:
    couplings = {name: declared(build_loss(name), "coupling") for name in LOSSES}
    assert [name for name, one in couplings.items() if one == "batch"] == list(OF_THE_BATCH)
    assert [name for name, one in couplings.items() if one == "token"] == list(OF_A_TOKEN)
    assert set(couplings.values()) == {"token", "sequence", "batch"}


@pytest.mark.parametrize("name", LOSSES)
@given(lengths=lengths_of_rows, seed=seeds)
def test_row_order(
    name: str,
    lengths: list[int],
    seed: int,
    make_inputs: Callable[..., LossInputs],
    build_loss: Callable[..., Any],
    slope_of: Callable[..., Tensor],
) -> None:
    assume_no_ties(name, lengths)
    loss, inputs = build_loss(name, **OPTIONS.get(name, {})), make_inputs(lengths, seed)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    expected = {key: one[order] for key, one in answers(loss, inputs, slope_of).items()}
    expect_same(answers(loss, changed(inputs, lambda one: one[order]), slope_of), expected)


@pytest.mark.parametrize("name", LOSSES)
@given(lengths=lengths_of_rows, seed=seeds, columns=st.integers(1, 4))
def test_padding(
    name: str,
    lengths: list[int],
    seed: int,
    columns: int,
    make_inputs: Callable[..., LossInputs],
    build_loss: Callable[..., Any],
    slope_of: Callable[..., Tensor],
) -> None:
    assume_no_ties(name, lengths)
    loss, inputs = build_loss(name, **OPTIONS.get(name, {})), make_inputs(lengths, seed)
    padded = changed(inputs, lambda one: torch.nn.functional.pad(one, (0, columns), value=0))
    found = {key: one[:, : max(lengths)] for key, one in answers(loss, padded, slope_of).items()}
    expect_same(found, answers(loss, inputs, slope_of))


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in OF_THE_BATCH])
@given(lengths=lengths_of_rows, seed=seeds, cut=st.integers(0, 5))
def test_micro_batches(
    name: str,
    lengths: list[int],
    seed: int,
    cut: int,
    make_inputs: Callable[..., LossInputs],
    build_loss: Callable[..., Any],
    slope_of: Callable[..., Tensor],
) -> None:
    """A loss of the batch is excepted: the engine shows it every row of the optimizer step at once."""
    loss, inputs = build_loss(name), make_inputs(lengths, seed)
    parts = [rows for rows in (slice(0, cut), slice(cut, None)) if len(lengths[rows])]
    found = [answers(loss, changed(inputs, operator.itemgetter(rows)), slope_of) for rows in parts]
    expect_same({key: torch.cat([one[key] for one in found]) for key in found[0]}, answers(loss, inputs, slope_of))
