"""Single tokens on either side of every bound, by hand; and what the metrics say of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.types import LossInputs


@pytest.mark.parametrize(
    ("name", "options", "ratio", "advantage", "slope"),
    [
        # Within 1e-9 of a bound on either side. Inside the slope is -A r; outside, pushed outward, it is 0.
        ("clip", {}, 1.2 - 1e-9, 2.0, -2.4),
        ("clip", {}, 1.2 + 1e-9, 2.0, 0.0),
        ("clip", {}, 0.8 + 1e-9, -2.0, 1.6),
        ("clip", {}, 0.8 - 1e-9, -2.0, 0.0),
        ("clip", {"delta": 4.0}, 4.0 - 1e-9, -1.0, 4.0),
        ("clip", {"delta": 4.0}, 4.0 + 1e-9, -1.0, 0.0),
        ("clip", {"dual_clip": 3.0}, 3.0 - 1e-9, -1.0, 3.0),
        ("clip", {"dual_clip": 3.0}, 3.0 + 1e-9, -1.0, 0.0),
        ("clip", {"dual_clip": 3.0}, 0.5, 1.0, -0.5),
        ("gspo", {}, 1.0004 - 1e-9, 1.0, -1.0004),
        ("gspo", {}, 1.0004 + 1e-9, 1.0, 0.0),
        ("gspo", {}, 0.9997 - 1e-9, -1.0, 0.0),
        ("gspo_token", {}, 0.9997 + 1e-9, -1.0, 0.9997),
        ("gspo_token", {}, 0.9997 - 1e-9, -1.0, 0.0),
        ("luspo", {}, 1.0025 + 1e-9, 1.0, 0.0),
        # CISPO's weight stays at the bound, whatever the sign.
        ("cispo", {}, 6.0, 2.0, -10.0),
        ("cispo", {}, 6.0, -2.0, 10.0),
        ("cispo", {}, 0.1, 2.0, -0.2),
        ("cispo", {"min_ratio": 0.8, "max_ratio": 1.2}, 0.1, 2.0, -1.6),
        ("gmpo", {}, math.exp(0.4 - 1e-9), 1.0, -math.exp(0.4)),
        ("gmpo", {}, math.exp(0.4 + 1e-9), 1.0, 0.0),
        ("gmpo", {}, math.exp(-0.5), 1.0, -math.exp(-0.5)),
        ("gmpo", {}, math.exp(-0.4 - 1e-9), -1.0, 0.0),
        # SAPO: -A r 4 p (1 - p); at r = 1 + ln 3, tau = 1, p = 3/4.
        ("sapo", {}, 1 + math.log(3), 1.0, -(1 + math.log(3)) * 0.75),
        # VESPO at w = 2: phi = e^3 2^2 e^-6 where A > 0, e^2 2^3 e^-4 where A < 0.
        ("vespo", {}, 2.0, 1.0, -4 * math.exp(-3)),
        ("vespo", {}, 2.0, -1.0, 8 * math.exp(-2)),
        ("dro", {"beta": 0.5}, math.exp(2.0), 1.5, -0.5),
        ("reinforce", {}, 3.0, 1.5, -1.5),
        ("topr", {}, 0.5, -2.0, 1.0),
        ("topr", {}, 2.0, -2.0, 2.0),
        ("topr", {}, 0.5, 2.0, -2.0),
        ("kl_cov", {"coefficient": 0.3}, 2.0, 1.0, -1.7),
        ("kl_cov", {"coefficient": 0.3}, 0.5, 1.0, -0.8),
    ],
)
def test_slope_of_one_token(
    name: str,
    options: dict[str, float],
    ratio: float,
    advantage: float,
    slope: float,
    one_token: Callable[..., LossInputs],
    build_loss: Callable[..., Any],
    slope_of: Callable[..., Tensor],
) -> None:
    found = slope_of(build_loss(name, **options), one_token(ratio, advantage))
    assert float(found) == pytest.approx(slope, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(
    ("new", "old", "advantage", "kept"),
    [
        # The probability moves from `old` to `new`; 0.15 is the bound in variation.
        (0.649, 0.5, 1.0, True),
        (0.651, 0.5, 1.0, False),
        (0.651, 0.5, -1.0, True),
        (0.351, 0.5, -1.0, True),
        (0.349, 0.5, -1.0, False),
        (0.349, 0.5, 1.0, True),
        (0.1, 0.001, 1.0, True),  # a ratio of 100: no matter
    ],
)
def test_dppo_tv_bounds_the_move_in_probability(
    new: float,
    old: float,
    advantage: float,
    kept: bool,
    one_token: Callable[..., LossInputs],
    build_loss: Callable[..., Any],
    slope_of: Callable[..., Tensor],
) -> None:
    inputs = one_token(new / old, advantage, math.log(new))
    expected = -advantage * min(new / old, 20.0) if kept else 0.0
    assert float(slope_of(build_loss("dppo_tv"), inputs)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("old", [0.2, 0.5, 0.9, 1 - 1e-6])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("new", [0.01, 0.15, 0.4, 0.6, 0.8, 0.99, 1.0])
def test_dppo_kl_bounds_the_divergence_of_two_coins(
    new: float,
    old: float,
    advantage: float,
    one_token: Callable[..., LossInputs],
    build_loss: Callable[..., Any],
    slope_of: Callable[..., Tensor],
) -> None:
    far = new == 1.0 or old * math.log(old / new) + (1 - old) * math.log((1 - old) / (1 - new)) > 0.05
    if old == 1 - 1e-6 and new == 1.0:
        far = False  # 1 - p counts as 1e-8: 1e-6 log(1e-6 / 1e-8) is nothing
    outward = new > old if advantage > 0 else new < old
    expected = 0.0 if far and outward else -advantage * new / old
    inputs = one_token(new / old, advantage, math.log(new))
    assert float(slope_of(build_loss("dppo_kl"), inputs)) == pytest.approx(expected, rel=1e-9)


def test_delta_and_dual_clip_are_one_function(
    make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any], slope_of: Callable[..., Tensor]
) -> None:
    inputs = make_inputs([40, 30], spread=2.0)
    delta, dual_clip = build_loss("clip", delta=3.0), build_loss("clip", dual_clip=3.0)
    assert torch.equal(delta(inputs)[0], dual_clip(inputs)[0])
    assert torch.equal(slope_of(delta, inputs), slope_of(dual_clip, inputs))
    assert not torch.equal(delta(inputs)[0], build_loss("clip")(inputs)[0])


def test_gspo_and_its_token_form_agree_where_a_row_has_one_advantage(
    make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any], slope_of: Callable[..., Tensor]
) -> None:
    inputs = make_inputs([4, 1, 6, 3])
    gspo, by_token = build_loss("gspo", epsilon_low=0.1), build_loss("gspo_token", epsilon_low=0.1)
    torch.testing.assert_close(gspo(inputs)[0], by_token(inputs)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope_of(gspo, inputs), slope_of(by_token, inputs), rtol=1e-12, atol=1e-12)
    uneven = torch.rand(inputs.logprobs.shape, dtype=torch.float64)
    assert not torch.allclose(slope_of(gspo, inputs, uneven), slope_of(by_token, inputs, uneven))


def test_luspo_under_sequence_is_gspo_under_sequence_sum(
    make_inputs: Callable[..., LossInputs], build_loss: Callable[..., Any]
) -> None:
    inputs = make_inputs([4, 1, 6, 3])
    options = {"epsilon_low": 0.1, "epsilon_high": 0.1}
    gspo, luspo = (build_loss(name, **options)(inputs)[0] for name in ("gspo", "luspo"))
    torch.testing.assert_close(inputs.sequence_mean(luspo), inputs.sequence_sum(gspo), rtol=1e-12, atol=1e-12)


def test_vespo_survives_long_rows_far_off_policy(
    build_loss: Callable[..., Any], make_inputs: Callable[..., LossInputs]
) -> None:
    inputs = make_inputs([3000, 3000])
    for gap in (-1.0, 1.0, -1e4, 1e4):
        far = replace(inputs, old_logprobs=inputs.logprobs.detach() + gap)
        per_token_loss, metrics = build_loss("vespo")(far)
        assert bool(per_token_loss.isfinite().all())
        assert float(metrics["vespo/phi_seq_mean"].max()) < 1e-9


def of_tokens(log_ratios: list[float], advantages: list[float], logprobs: list[float] | None = None) -> LossInputs:
    """One row per token, of these values."""
    new = torch.tensor(logprobs or [-1.0] * len(log_ratios), dtype=torch.float64)[:, None]
    old = new - torch.tensor(log_ratios, dtype=torch.float64)[:, None]
    return LossInputs(
        logprobs=new,
        old_logprobs=old,
        sampling_logprobs=old,
        advantages=torch.tensor(advantages, dtype=torch.float64)[:, None],
        completion_mask=torch.ones_like(old, dtype=torch.bool),
        entropy=torch.zeros_like(old),
        seed=0,
    )


FAR = ([2.0, 2.0, -2.0, -2.0, 0.0], [1.0, -1.0, 1.0, -1.0, 1.0])
"""Above and below, pushed either way, and one that did not move."""
CLIPPED = {"clip_ratio/low_mean": [0, 0, 0, 1, 0], "clip_ratio/high_mean": [1, 0, 0, 0, 0]}
REGION = {"clip_ratio/region_mean": [1, 0, 0, 1, 0]}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("clip", {}, CLIPPED | REGION),
        ("clip", {"delta": 4.0}, CLIPPED | REGION | {"clip_ratio/bound_mean": [0, 1, 0, 0, 0]}),
        ("gspo", {}, CLIPPED | REGION),
        ("gspo_token", {}, CLIPPED | REGION),
        ("luspo", {}, CLIPPED | REGION),
        ("gmpo", {}, CLIPPED | REGION),
        (
            "cispo",
            {"min_ratio": 0.8},
            {
                "clip_ratio/low_mean": [0, 0, 1, 1, 0],
                "clip_ratio/high_mean": [1, 1, 0, 0, 0],
                "clip_ratio/region_mean": [1, 1, 1, 1, 0],
                "cispo_clip_ratio": [1, 0, 0, 0, 0],
            },
        ),
        ("dppo_tv", {}, CLIPPED | REGION | {"dppo/truncated_mean": [0, 0, 0, 0, 0]}),
        ("dppo_kl", {"max_ratio": 3.0}, CLIPPED | REGION | {"dppo/truncated_mean": [0, 1, 0, 0, 0]}),
        ("reinforce", {}, {}),
        ("dro", {}, {"dro/pull": [0.2, 0.2, 0.2, 0.2, 0]}),
        ("topr", {}, {"topr/weight_mean": [1, 1, 1, math.exp(-2), 1]}),
    ],
)
def test_metrics(
    name: str, options: dict[str, float], expected: dict[str, list[float]], build_loss: Callable[..., Any]
) -> None:
    _, metrics = build_loss(name, **options)(of_tokens(*FAR))
    assert {key: values[:, 0].tolist() for key, values in metrics.items()} == {
        key: pytest.approx(values) for key, values in expected.items()
    }


def test_metrics_of_the_soft_weights(build_loss: Callable[..., Any]) -> None:
    inputs = of_tokens([0.0, math.log(2)], [1.0, -1.0])
    share = 1 / (1 + math.exp(-1.05))
    assert build_loss("sapo")(inputs)[1]["sapo/gate_mean"][:, 0].tolist() == pytest.approx([1, 4 * share * (1 - share)])
    assert build_loss("vespo")(inputs)[1]["vespo/phi_seq_mean"][:, 0].tolist() == pytest.approx([1, 8 * math.exp(-2)])


def test_vespo_peaks_where_the_paper_says(build_loss: Callable[..., Any]) -> None:
    weights = [0.5, 2 / 3, 0.8, 1.3, 1.5, 1.7]
    logs = [math.log(weight) for weight in weights]
    up = build_loss("vespo")(of_tokens(logs, [1.0] * 6))[1]["vespo/phi_seq_mean"][:, 0]
    down = build_loss("vespo")(of_tokens(logs, [-1.0] * 6))[1]["vespo/phi_seq_mean"][:, 0]
    assert (int(up.argmax()), int(down.argmax())) == (1, 4)
