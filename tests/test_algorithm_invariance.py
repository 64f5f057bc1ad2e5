"""For every loss, reduction, KL estimator, advantage and correction that is registered: the gradient of an optimizer
step does not depend on the micro-batch, the padding, or the order of groups and of rows in a group."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from grpoforge.binding import bind
from grpoforge.coefficients import AdaptiveEntropy, AdaptiveKL
from grpoforge.collate import collate
from grpoforge.contracts import advantages_of
from grpoforge.declarations import declared
from grpoforge.engine import Engine
from grpoforge.metrics import Meter
from grpoforge.objective import Frozen, coupling_of
from grpoforge.plugins import load_plugins
from grpoforge.policy import Policy
from grpoforge.reduction import REDUCTIONS
from grpoforge.registry import Component
from grpoforge.scoring import BoundReward
from grpoforge.types import Batch, Rollouts

REGISTRY = load_plugins([]).registry
REQUIRED: dict[str, dict[str, Any]] = {"dro": {"beta": 0.5}}
"""Options of components that have no default for them."""


def names(kind: Any) -> list[str]:
    return [component.name for component in REGISTRY.list() if component.kind == kind]


def build(kind: Any, name: str) -> Any:
    component: Component = REGISTRY.get(kind, name)
    return component.build(REQUIRED.get(name, {}))


PROMPTS = [[5, 9, 3, 12], [7], [4, 4, 21, 6, 2, 11]]
COMPLETIONS = [
    [[3, 8, 1], [14, 6, 20, 9, 2, 7], [5, 1], [9]],
    [[22], [5, 1], [8, 8, 8, 1], [3, 4]],
    [[9, 13, 4, 4], [17, 2, 8, 19, 1], [], [6, 1]],
]
TEMPERATURES = [[0.7, 1.3, 0.7, 1.3]] * 3
REWARDS = torch.tensor(
    [
        [[1.0, 0.2], [0.0, 0.0], [1.0, 0.4], [0.0, 0.1]],
        [[0.0, 0.3], [1.0, 0.0], [float("nan"), float("nan")], [1.0, 0.9]],
        [[1.0, 0.0], [0.0, 0.7], [0.0, 0.0], [1.0, 0.3]],
    ],
    dtype=torch.float64,
)
WEIGHTS = torch.tensor([1.0, 0.5], dtype=torch.float64)


@pytest.fixture(scope="module")
def gradient(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_frozen: Callable[..., Frozen],
    flat_gradient: Callable[[Policy], Tensor],
) -> Callable[..., Tensor]:
    """Loss and gradient of one optimizer step off-policy, against a reference, rows in any order."""
    current, old, reference = tiny_policy(0), tiny_policy(1, scale=0.97), tiny_policy(2)

    @functools.cache
    def prepare(groups: tuple[int, ...], rows: tuple[int, ...], **pad: Any) -> tuple[Batch, Tensor, list[Tensor]]:
        """The rows in this order, their lengths, and the old policy, the reference, the old policy at temperature 1."""

        def ordered(table: list[list[Any]]) -> list[list[Any]]:
            return [[table[group][row] for row in rows] for group in groups]

        rollouts = make_rollouts([PROMPTS[group] for group in groups], ordered(COMPLETIONS), ordered(TEMPERATURES))
        batch = collate(rollouts, pad_token_id=0, **pad)
        lengths = torch.tensor([[float(len(c.token_ids)) for c in group] for group in rollouts.completions])
        return (
            batch,
            lengths.double(),
            [
                policy.frozen_logprobs(one, 12).logprobs
                for policy, one in ((old, batch), (reference, batch), (old, at_one(batch)))
            ],
        )

    def compute(parts: dict[str, Any], *, groups: Sequence[int], rows: Sequence[int], micro: int, **pad: Any) -> Tensor:
        batch, lengths, logprobs = prepare(tuple(groups), tuple(rows), **pad)
        advantages, _ = advantages_of(
            bind("advantage", parts["advantage"]),
            {
                "rewards": REWARDS[list(groups)][:, list(rows)],
                "weights": WEIGHTS,
                "lengths": lengths,
                "temperatures": batch.temperatures.reshape(3, 4),
            },
        )
        engine = make_engine(
            current,
            reference=reference,
            beta=0.1,
            micro_batch_size=micro,
            **{name: parts[name] for name in ("loss", "kl", "reduction", "corrections")},
        )
        meter = Meter()
        before, ref, target = logprobs
        frozen = dataclasses.replace(make_frozen(before, ref, advantages), target=target)
        engine.accumulate(batch, frozen, 8, meter)
        return torch.cat([torch.tensor([meter.totals["loss"][0]]).double(), flat_gradient(current)])

    return compute


def at_one(batch: Batch) -> Batch:
    """The same rows at temperature 1."""
    return dataclasses.replace(batch, temperatures=torch.ones_like(batch.temperatures))


def in_blocks(rows: Sequence[int], advantage: Any) -> list[int]:
    """The order in which ``rows`` puts the blocks of the advantage, each in its own order."""
    block: int = declared(advantage, "block", 1)
    return [first + row for first in rows if first % block == 0 for row in range(block)]


ORDERS = st.permutations(range(3)), st.permutations(range(4))
RANDOM = {"clip_cov"}
"""Losses that choose tokens at random: the order of the rows decides which, so only splits and padding are compared."""


@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
@pytest.mark.parametrize("loss", names("loss"))
def test_it_depends_on_neither_split_nor_padding_nor_order(
    loss: str, reduction: str, gradient: Callable[..., Tensor]
) -> None:
    # Seeded by name, so that every pair is tried with other estimators, advantages and corrections.
    @seed(zlib.crc32(f"{loss}/{reduction}".encode()))
    @settings(max_examples=6, deadline=None)
    @given(
        kl=st.sampled_from(names("kl")),
        advantage=st.sampled_from(names("advantage")),
        corrections=st.lists(st.sampled_from(names("correction")), max_size=1),
        groups=ORDERS[0],
        rows=ORDERS[1],
        micro=st.integers(1, 11),
        side=st.sampled_from(["left", "right"]),
        extra=st.integers(0, 3),
    )
    def check(
        kl: str,
        advantage: str,
        corrections: list[str],
        groups: list[int],
        rows: list[int],
        micro: int,
        side: str,
        extra: int,
    ) -> None:
        parts = {
            "loss": build("loss", loss),
            "kl": build("kl", kl),
            "advantage": build("advantage", advantage),
            "corrections": [build("correction", name) for name in corrections],
            "reduction": reduction,
        }
        assume(not (coupling_of(parts["loss"]) == "batch" and bind("kl", parts["kl"]).needs_distributions))
        if loss in RANDOM:
            groups, rows = list(range(3)), list(range(4))
        plain = gradient(parts, groups=list(range(3)), rows=list(range(4)), micro=12)
        rows = in_blocks(rows, parts["advantage"])
        other = gradient(parts, groups=groups, rows=rows, micro=micro, padding_side=side, extra=extra)
        assert bool(plain.isfinite().all())
        assert float((plain - other).norm()) <= 1e-10 * max(float(plain.norm()), 1.0)

    check()


@pytest.mark.parametrize("micro", [64, 2], ids=["at once", "in micro-batches"])
@pytest.mark.parametrize("loss", names("loss"))
def test_a_step_without_a_token_to_learn_from_moves_nothing(
    loss: str,
    micro: int,
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    given_rollouts: Callable[..., Any],
) -> None:
    cut = [[[token for token in row if token != 1] or [3] for row in group] for group in COMPLETIONS]
    rollouts = make_rollouts(PROMPTS, cut)
    policy = tiny_policy()
    before = [parameter.detach().clone() for parameter in policy.trainable()]
    beta, bonus = AdaptiveKL(0.3, target=0.1, horizon=20), AdaptiveEntropy(0.1, target=9.0, delta=0.1, maximum=1.0)
    engine = make_engine(
        policy,
        sampler=given_rollouts(rollouts),
        rewards=[
            BoundReward(
                name="length", function=lambda completions: [*map(len, completions)], data=("completions",), weight=1
            )
        ],
        reference=tiny_policy(2),
        optimizer=torch.optim.Adam(policy.trainable(), lr=0.1),
        loss=build("loss", loss),
        corrections=[build("correction", name) for name in names("correction")],
        beta=beta,
        entropy=bonus,
        mask_truncated=True,
        top_entropy_quantile=0.5,
        micro_batch_size=micro,
    )
    report = engine.step(rollouts.prompts, step=1, seed=0)
    assert report.metrics["completions/clipped_ratio"] == 1.0 and bool(report.advantages.any())
    assert report.metrics["loss"] == report.metrics["grad_norm"] == 0.0
    assert policy.version == 1
    for parameter, was in zip(policy.trainable(), before):
        assert parameter.equal(was)
    assert (beta.value, bonus.coefficient) == (0.3, 0.1), "what measured nothing steers nothing"
