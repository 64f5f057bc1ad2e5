"""Builders of loss inputs, in float64, and what a loss makes of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.plugins import load_plugins
from grpoforge.registry import Registry
from grpoforge.types import LossInputs


def make_inputs(lengths: Sequence[int], seed: int = 0, *, spread: float = 0.3, **given: Any) -> LossInputs:
    """Random rows of these lengths, by turns of positive and negative advantage; ``given`` fields replace the random.

    Log-ratios have a deviation of ``spread``.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    sign = 1 - 2 * (torch.arange(shape[0]) % 2)[:, None]
    logprobs = -3 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.05
    old = logprobs + spread * normal(*shape)
    fields: dict[str, Any] = {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": old,
        "sampling_logprobs": old + 0.3 * spread * normal(*shape),
        "advantages": (sign * normal(len(lengths), 1).abs()).expand(shape),
        "completion_mask": torch.arange(shape[1]) < torch.tensor(lengths)[:, None],
        "entropy": normal(*shape).abs(),
        "seed": 5,
    }
    return LossInputs(**(fields | given))


def one_token(ratio: float, advantage: float, logprob: float = -1.0) -> LossInputs:
    """A single token: its log-prob, and the old one ``log ratio`` below it."""
    logprobs = torch.full((1, 1), logprob, dtype=torch.float64)
    old = logprobs - math.log(ratio)
    return LossInputs(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=old,
        sampling_logprobs=old,
        advantages=torch.full_like(old, advantage),
        completion_mask=torch.ones_like(old, dtype=torch.bool),
        entropy=torch.zeros_like(old),
    )


@functools.cache
def registry() -> Registry:
    return load_plugins().registry


def build_loss(name: str, **options: Any) -> Any:
    """The registered loss with its options bound."""
    return registry().get("loss", f"grpoforge:{name}").build(options)


def slope_of(loss: Any, inputs: LossInputs, weights: Tensor | None = None) -> Tensor:
    """Gradient of the summed (or weighted) loss of all real tokens with respect to the log-probs."""
    per_token_loss, _ = loss(inputs)
    kept = torch.where(inputs.completion_mask, per_token_loss, torch.zeros_like(per_token_loss))
    total = (kept if weights is None else kept * weights).sum()
    (gradient,) = torch.autograd.grad(total, inputs.logprobs)
    return gradient


@pytest.fixture(scope="session", name="make_inputs")
def _make_inputs() -> Callable[..., LossInputs]:
    return make_inputs


@pytest.fixture(scope="session", name="one_token")
def _one_token() -> Callable[..., LossInputs]:
    return one_token


@pytest.fixture(scope="session", name="build_loss")
def _build_loss() -> Callable[..., Any]:
    return build_loss


@pytest.fixture(scope="session", name="slope_of")
def _slope_of() -> Callable[..., Tensor]:
    return slope_of
