"""Which tokens the covariance losses pick: the right ones, as many as they should, the same ones every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpoforge.types import LossInputs
from grpoforge_plugins.losses.covariance import covariances, few


def test_covariances_are_centered_over_real_tokens(make_inputs: Callable[..., LossInputs]) -> None:
    inputs = make_inputs([3, 0, 5])
    mask = inputs.completion_mask
    advantages, logprobs = inputs.advantages[mask], inputs.logprobs.detach()[mask]
    expected = (advantages - advantages.mean()) * (logprobs - logprobs.mean())
    found = covariances(inputs)
    torch.testing.assert_close(found[mask], expected, rtol=1e-12, atol=1e-12)
    assert bool((found[~mask] == 0).all()) and not found.requires_grad


@pytest.mark.parametrize(("share", "expected"), [(2e-4, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_how_many(share: float, expected: int) -> None:
    assert few(share, torch.ones(2, 4, dtype=torch.bool)) == expected


def test_clip_cov_drops_random_tokens_of_high_covariance(
    make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any]
) -> None:
    inputs = make_inputs([30] * 8, spread=0.05)
    cov = covariances(inputs)
    loss = build_loss("clip_cov", share=0.05, cov_low=0.3, cov_high=2.0)
    candidates = (cov > 0.3) & (cov < 2.0)
    draws = []
    for seed in range(20):
        per_token_loss, metrics = loss(replace(inputs, seed=seed))
        dropped = metrics["clip_cov/dropped_mean"].bool()
        assert int(dropped.sum()) == 12, "5% of 240"
        assert not bool((dropped & ~candidates).any())
        assert bool((per_token_loss[dropped] == 0).all()) and bool((per_token_loss[~dropped] != 0).all())
        draws.append(dropped)
    assert int(candidates.sum()) > 24, "else there is little to draw from"
    assert len({tuple(one.flatten().tolist()) for one in draws}) == 20
    assert torch.equal(draws[3], loss(replace(inputs, seed=3))[1]["clip_cov/dropped_mean"].bool())


def test_clip_cov_leaves_clipped_tokens_to_the_clip(
    make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any]
) -> None:
    """With everything between its bounds, it drops what the clip leaves alone and nothing else."""
    inputs = make_inputs([6, 6], spread=1.0)
    per_token_loss, metrics = build_loss("clip_cov", share=1.0, cov_low=-99.0, cov_high=99.0)(inputs)
    clipped = metrics["clip_ratio/region_mean"].bool()
    assert 0 < int(clipped.sum()) < 12
    assert torch.equal(metrics["clip_cov/dropped_mean"].bool(), ~clipped)
    assert torch.equal(
        per_token_loss, torch.where(clipped, build_loss("clip")(inputs)[0], torch.zeros_like(per_token_loss))
    )


def test_clip_cov_without_candidates_is_clip(
    make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any]
) -> None:
    inputs = make_inputs([6, 6])
    assert torch.equal(build_loss("clip_cov", cov_low=90.0, cov_high=99.0)(inputs)[0], build_loss("clip")(inputs)[0])


def test_kl_cov_holds_the_tokens_of_highest_covariance(
    make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any]
) -> None:
    inputs = make_inputs([4, 0, 6])
    per_token_loss, metrics = build_loss("kl_cov", share=0.3, coefficient=0.5)(inputs)
    mask = inputs.completion_mask
    bound = covariances(inputs)[mask].sort(descending=True).values[2]
    held = mask & (covariances(inputs) >= bound)
    assert torch.equal(metrics["kl_cov/held_mean"], held.double()) and int(held.sum()) == 3
    plain = -inputs.ratio * inputs.advantages
    torch.testing.assert_close(per_token_loss, plain + 0.5 * held * inputs.log_ratio.abs(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_no_tokens_at_all(name: str, make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any]) -> None:
    inputs = make_inputs([2, 2], completion_mask=torch.zeros(2, 2, dtype=torch.bool))
    per_token_loss, metrics = build_loss(name)(inputs)
    assert bool(per_token_loss.isfinite().all())
    assert all(
        float(values.sum()) == 0 for key, values in metrics.items() if key.endswith(("dropped_mean", "held_mean"))
    )
