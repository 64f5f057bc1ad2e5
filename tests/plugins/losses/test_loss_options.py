"""Options out of range, by name, and how a person is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from grpoforge.errors import ConfigError

EPSILON_LOW = ({"epsilon_low": 1.0}, "loss option `epsilon_low` is 1", "choose it in [0, 1)")
EPSILON_HIGH = ({"epsilon_high": -0.2}, "loss option `epsilon_high` is -0.2", "choose it >= 0")
DISTANCES = (
    ({"epsilon_low": -0.1}, "loss option `epsilon_low` is -0.1", "choose it >= 0"),
    ({"epsilon_high": math.nan}, "loss option `epsilon_high` is nan", "choose it >= 0"),
)
SHARES = (
    ({"share": 0.0}, "loss option `share` is 0", "choose it in (0, 1]"),
    ({"share": 1.5}, "loss option `share` is 1.5", "choose it in (0, 1]"),
)
REFUSED: dict[str, tuple[tuple[dict[str, Any], str, str], ...]] = {
    "clip": (
        EPSILON_LOW,
        EPSILON_HIGH,
        ({"epsilon_low": math.nan}, "loss option `epsilon_low` is nan", "choose it in [0, 1)"),
        (
            {"delta": 1.2, "epsilon_high": 0.28},
            "loss option `delta` is 1.2",
            "choose it > 1 + epsilon_high = 1.28",
        ),
        ({"delta": math.nan}, "loss option `delta` is nan", "choose it > 1 + epsilon_high = 1.2"),
        ({"dual_clip": 1.0}, "loss option `dual_clip` is 1", "choose it > 1"),
        (
            {"delta": 4.0, "dual_clip": 3.0},
            "loss options `delta` (4) and `dual_clip` (3) are both given",
            "both bound the ratio where the advantage is negative: give one",
        ),
    ),
    "gspo": (EPSILON_LOW, EPSILON_HIGH),
    "gspo_token": (EPSILON_LOW, EPSILON_HIGH),
    "luspo": (EPSILON_LOW, EPSILON_HIGH),
    "cispo": (
        ({"min_ratio": 1.1}, "loss option `min_ratio` is 1.1", "choose it in [0, 1]"),
        ({"max_ratio": 0.9}, "loss option `max_ratio` is 0.9", "choose it >= 1"),
    ),
    "sapo": (
        ({"tau_positive": 0.0}, "loss option `tau_positive` is 0", "choose it > 0"),
        ({"tau_negative": -1.0}, "loss option `tau_negative` is -1", "choose it > 0"),
    ),
    "gmpo": DISTANCES,
    "vespo": (
        ({"k_positive": -1.0}, "loss option `k_positive` is -1", "choose it >= 0"),
        ({"lambda_positive": 0.0}, "loss option `lambda_positive` is 0", "choose it > 0"),
        ({"k_negative": math.nan}, "loss option `k_negative` is nan", "choose it >= 0"),
        ({"lambda_negative": -2.0}, "loss option `lambda_negative` is -2", "choose it > 0"),
    ),
    "dppo_tv": (*DISTANCES, ({"max_ratio": 0.5}, "loss option `max_ratio` is 0.5", "choose it >= 1")),
    "dppo_kl": (*DISTANCES, ({"max_ratio": 0.5}, "loss option `max_ratio` is 0.5", "choose it >= 1")),
    "dro": (({"beta": 0.0}, "loss option `beta` is 0", "choose it > 0; without the pull it is `reinforce`"),),
    "clip_cov": (
        EPSILON_LOW,
        EPSILON_HIGH,
        *SHARES,
        (
            {"cov_low": 5.0},
            "loss options `cov_low` (5) and `cov_high` (5) leave nothing between them",
            "choose `cov_low` below `cov_high`",
        ),
    ),
    "kl_cov": (*SHARES, ({"coefficient": -1.0}, "loss option `coefficient` is -1", "choose it >= 0")),
}


@pytest.mark.parametrize(
    ("name", "options", "message", "hint"), [(name, *case) for name, cases in REFUSED.items() for case in cases]
)
def test_options_out_of_range(
    name: str, options: dict[str, Any], message: str, hint: str, build_loss: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError) as failure:
        build_loss(name, **options)
    assert (failure.value.message, failure.value.hint) == (message, hint)


def test_choices_are_closed(build_loss: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"option `ratio` of loss `grpoforge:topr`"):
        build_loss("topr", ratio="group")
    with pytest.raises(ConfigError, match=r"option `behavior` of loss `grpoforge:vespo`"):
        build_loss("vespo", behavior="reference")
