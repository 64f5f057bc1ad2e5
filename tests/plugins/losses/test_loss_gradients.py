"""What gradients share: -A on policy, finite differences, and nothing at all from masked tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.declarations import declared
from grpoforge.plugins import load_plugins
from grpoforge.types import LossInputs

LOSSES = sorted(component.name for component in load_plugins().registry.list("loss"))
OFF_POLICY_BY_DESIGN = ("clip_cov", "luspo")
"""Their gradient at ratio 1 is another, and they declare it: `clip_cov` drops tokens, `luspo` multiplies by length."""

VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in LOSSES] + [
    ("clip", {"delta": 2.0}),
    ("clip", {"dual_clip": 1.1}),
    ("cispo", {"min_ratio": 0.8, "max_ratio": 1.2}),
    ("vespo", {"behavior": "sampling"}),
    ("dppo_tv", {"behavior": "sampling"}),
    ("dppo_kl", {"behavior": "sampling"}),
    ("topr", {"ratio": "token"}),
    ("clip_cov", {"share": 0.3, "cov_low": 0.0}),
    ("kl_cov", {"share": 0.4}),
]
VARIANT_NAMES = ["-".join([name, *map(str, options)]) for name, options in VARIANTS]

WITHOUT_STOP_GRADIENT = ("clip", "gspo", "luspo", "sapo", "gmpo", "reinforce", "dro", "clip_cov", "kl_cov")
"""The gradient of the others is not the slope of their value, by design; the golden files have it."""


def on_policy(make_inputs: Callable[..., LossInputs]) -> LossInputs:
    inputs = make_inputs([4, 1, 6, 3])
    same = inputs.logprobs.detach().clone()
    return replace(inputs, old_logprobs=same, sampling_logprobs=same)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in OFF_POLICY_BY_DESIGN])
def test_on_policy_every_gradient_is_minus_the_advantage(
    name: str, make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any], slope_of: Callable[..., Tensor]
) -> None:
    inputs = on_policy(make_inputs)
    expected = torch.where(inputs.completion_mask, -inputs.advantages, torch.zeros_like(inputs.advantages))
    torch.testing.assert_close(slope_of(build_loss(name), inputs), expected, rtol=1e-12, atol=1e-12)


def test_the_exceptions_say_so(build_loss: Callable[..., Any]) -> None:
    claims = {name: declared(build_loss(name), "on_policy_gradient", True) for name in LOSSES}
    assert [name for name, claim in claims.items() if not claim] == list(OFF_POLICY_BY_DESIGN)


def test_luspo_on_policy_is_minus_the_advantage_times_the_length(
    make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any], slope_of: Callable[..., Tensor]
) -> None:
    inputs = on_policy(make_inputs)
    lengths = torch.tensor([[4.0], [1.0], [6.0], [3.0]], dtype=torch.float64)
    expected = torch.where(inputs.completion_mask, -lengths * inputs.advantages, torch.zeros_like(inputs.advantages))
    torch.testing.assert_close(slope_of(build_loss("luspo"), inputs), expected, rtol=1e-12, atol=1e-12)


def test_clip_cov_on_policy_is_minus_the_advantage_or_nothing(
    make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any], slope_of: Callable[..., Tensor]
) -> None:
    inputs = on_policy(make_inputs)
    loss = build_loss("clip_cov", share=0.2, cov_low=0.0)
    dropped = loss(inputs)[1]["clip_cov/dropped_mean"].bool()
    assert int(dropped.sum()) == 2, "a fifth of 14 tokens"
    kept = inputs.completion_mask & ~dropped
    expected = torch.where(kept, -inputs.advantages, torch.zeros_like(inputs.advantages))
    torch.testing.assert_close(slope_of(loss, inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("new", "old"), [(1e4, 0.0), (-1e4, 0.0), (math.inf, 0.0), (math.inf, math.inf), (0.0, -math.inf)]
)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=VARIANT_NAMES)
def test_masked_tokens_are_nothing_whatever_stands_there(
    name: str,
    options: dict[str, Any],
    new: float,
    old: float,
    dtype: torch.dtype,
    make_inputs: Callable[..., LossInputs],
    build_loss: Callable[..., Any],
    slope_of: Callable[..., Tensor],
) -> None:
    clean = make_inputs([4, 1, 6, 3])
    mask = clean.completion_mask
    clean = replace(
        clean,
        logprobs=clean.logprobs.detach().to(dtype).requires_grad_(),
        **{field: getattr(clean, field).to(dtype) for field in ("old_logprobs", "sampling_logprobs", "advantages")},
    )
    far = replace(
        clean,
        logprobs=torch.where(mask, clean.logprobs.detach(), new).requires_grad_(),
        old_logprobs=torch.where(mask, clean.old_logprobs, old),
        sampling_logprobs=torch.where(mask, clean.sampling_logprobs, old),
    )
    loss = build_loss(name, **options)
    per_token_loss, metrics = loss(far)
    assert bool(per_token_loss.isfinite().all()), "the loss, at masked places too"
    assert all(bool(values[mask].isfinite().all()) for values in metrics.values())
    slope = slope_of(loss, far)
    assert bool((slope[~mask] == 0).all()) and bool(slope.isfinite().all())
    assert torch.equal(per_token_loss[mask], loss(clean)[0][mask])
    assert torch.equal(slope, slope_of(loss, clean))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, options in VARIANTS if name in WITHOUT_STOP_GRADIENT],
    ids=[name for variant, name in zip(VARIANTS, VARIANT_NAMES) if variant[0] in WITHOUT_STOP_GRADIENT],
)
def test_the_gradient_is_the_slope_of_the_value(
    name: str,
    options: dict[str, Any],
    seed: int,
    make_inputs: Callable[..., LossInputs],
    build_loss: Callable[..., Any],
    slope_of: Callable[..., Tensor],
) -> None:
    """Central differences, at tokens where both sides have the same slope (no kink between them)."""
    inputs = make_inputs([4, 1, 6, 3], seed)
    weights = make_inputs([4, 1, 6, 3], seed + 10).entropy
    loss = build_loss(name, **options)
    slope = slope_of(loss, inputs, weights)
    point, step, num_compared = inputs.logprobs.detach(), 1e-6, 0

    def value(row: int, token: int, shift: float) -> float:
        moved = point.clone()
        moved[row, token] += shift
        per_token_loss, _ = loss(replace(inputs, logprobs=moved))
        return float((per_token_loss * weights)[inputs.completion_mask].sum())

    for row, token in inputs.completion_mask.nonzero().tolist():
        here, above, below = (value(row, token, shift) for shift in (0.0, step, -step))
        if abs((above - here) - (here - below)) > 1e-4 * step:
            continue
        assert (above - below) / (2 * step) == pytest.approx(float(slope[row, token]), rel=1e-6, abs=1e-7)
        num_compared += 1
    assert num_compared >= 12, "of 14 tokens"
