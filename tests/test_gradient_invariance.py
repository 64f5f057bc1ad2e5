"""The gradient of a step is that of the formulas, however the rows are split, padded, ordered or reduced."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpoforge.collate import PaddingSide, collate
from grpoforge.engine import Engine
from grpoforge.metrics import Meter
from grpoforge.objective import Frozen
from grpoforge.policy import Policy, micro_batched
from grpoforge.reduction import REDUCTIONS
from grpoforge.types import Rollouts
from grpoforge_plugins.advantages.group import group

EOS = 1
GOLDEN = Path(__file__).parent / "golden/step.json"
Rewards = Sequence[Sequence[float | None]]

tokens = st.integers(min_value=2, max_value=23)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Rollouts of random lengths (1 included), some cut at the limit, at two temperatures, some rows unscored."""
    num_prompts, group_size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    rows = st.lists(tokens, min_size=1, max_size=6)
    completion = st.tuples(rows, st.booleans()).map(lambda drawn: [*drawn[0], EOS] if drawn[1] else drawn[0])
    score = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 1.0]), st.floats(-2, 2, width=32))

    def groups(one: st.SearchStrategy[Any]) -> list[list[Any]]:
        each = st.lists(one, min_size=group_size, max_size=group_size)
        return draw(st.lists(each, min_size=num_prompts, max_size=num_prompts))

    return {
        "prompts": draw(st.lists(rows, min_size=num_prompts, max_size=num_prompts)),
        "completions": groups(completion),
        "temperatures": groups(st.sampled_from([0.7, 1.3])),
        "rewards": groups(score),
    }


CASE: dict[str, Any] = {
    "prompts": [[5, 9, 3, 12], [7], [4, 4, 21, 6, 2, 11]],
    "completions": [[[3, 8, 1], [14, 6, 20, 9, 2, 7]], [[22], [5, 1]], [[9, 13, 4, 4], [17, 2, 8, 19, 1]]],
    "temperatures": [[0.7, 1.3], [1.3, 0.7], [0.7, 1.3]],
    "rewards": [[1.0, 0.25], [0.0, 1.5], [0.5, -1.0]],
}


@pytest.fixture(scope="module")
def policies(tiny_policy: Callable[..., Policy]) -> tuple[Policy, Policy, Policy]:
    """The policy, an older one (ratios on both sides of the clip) and the reference."""
    return tiny_policy(0), tiny_policy(1, scale=0.97), tiny_policy(2)


@pytest.fixture(scope="module")
def gradient(
    policies: tuple[Policy, Policy, Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    flat_gradient: Callable[[Policy], Tensor],
    make_frozen: Callable[..., Frozen],
) -> Callable[..., tuple[float, Tensor]]:
    """Loss and gradient of one optimizer step, by the engine."""
    current, old, reference = policies

    def compute(
        case: dict[str, Any], *, micro: int = 64, reduction: str = "token", beta: float = 0.1, **pad: Any
    ) -> Any:
        engine = make_engine(
            current, reference=reference, beta=beta, reduction=reduction, micro_batch_size=micro, minibatch_size=64
        )
        rollouts = make_rollouts(case["prompts"], case["completions"], case["temperatures"])
        batch = collate(rollouts, pad_token_id=0, **pad)
        with torch.no_grad():
            frozen = make_frozen(
                micro_batched(old.logprobs, batch, micro).logprobs,
                micro_batched(reference.logprobs, batch, micro).logprobs,
                advantages(case["rewards"]),
            )
        meter = Meter()
        engine.accumulate(batch, frozen, rollouts.max_completion_length, meter)
        return meter.totals["loss"][0], flat_gradient(current)

    return compute


def advantages(rewards: Rewards) -> Tensor:
    table = [[float("nan") if reward is None else reward for reward in row] for row in rewards]
    return group(torch.tensor(table, dtype=torch.float64)[:, :, None], torch.ones(1, dtype=torch.float64))


def by_hand(
    policies: Sequence[Policy], rollouts: Rollouts, rewards: Rewards, reduction: str, beta: float
) -> tuple[float, Tensor]:
    """Loss and gradient from the formulas: every row by itself, no padding, no code of the program."""

    def logprobs(policy: Policy, prompt: tuple[int, ...], completion: tuple[int, ...], temperature: float) -> Tensor:
        logits = policy.model(torch.tensor([prompt + completion])).logits[0] / temperature
        table = logits.log_softmax(dim=-1)
        return torch.stack([table[len(prompt) - 1 + place, token] for place, token in enumerate(completion)])

    rows: list[Tensor] = []
    for prompt, completions, scores in zip(rollouts.prompts, rollouts.completions, rewards, strict=True):
        known = [score for score in scores if score is not None]
        mean = sum(known) / max(len(known), 1)
        std = (sum((score - mean) ** 2 for score in known) / max(len(known) - 1, 1)) ** 0.5
        for completion, score in zip(completions, scores, strict=True):
            advantage = 0.0 if score is None else (score - mean) / (std + 1e-4)
            new, old, ref = (
                logprobs(policy, prompt.token_ids, completion.token_ids, completion.temperature) for policy in policies
            )
            ratio = (new - old.detach()).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            difference = ref.detach() - new
            rows.append(-surrogate + beta * (difference.exp() - difference - 1))
    loss = {
        "sequence": lambda: torch.stack([row.mean() for row in rows]).mean(),
        "token": lambda: torch.cat(rows).mean(),
        "constant": lambda: torch.cat(rows).sum() / (len(rows) * rollouts.max_completion_length),
        "sequence_sum": lambda: torch.stack([row.sum() for row in rows]).mean(),
    }[reduction]()
    parameters = policies[0].trainable()
    return float(loss.detach()), torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def assert_equal(found: tuple[float, Tensor], expected: tuple[float, Tensor], tolerance: float = 1e-12) -> None:
    assert float((found[1] - expected[1]).norm()) <= tolerance * max(float(expected[1].norm()), 0.1)
    assert abs(found[0] - expected[0]) <= tolerance * max(abs(expected[0]), 1.0)


@given(case=cases(), reduction=st.sampled_from(sorted(REDUCTIONS)), beta=st.sampled_from([0.0, 0.1]))
def test_the_gradient_is_that_of_the_formulas(
    case: dict[str, Any],
    reduction: str,
    beta: float,
    policies: tuple[Policy, Policy, Policy],
    gradient: Callable[..., tuple[float, Tensor]],
    make_rollouts: Callable[..., Rollouts],
) -> None:
    rollouts = make_rollouts(case["prompts"], case["completions"], case["temperatures"])
    expected = by_hand(policies, rollouts, case["rewards"], reduction, beta)
    assert_equal(gradient(case, reduction=reduction, beta=beta), expected)


@given(case=cases(), reduction=st.sampled_from(sorted(REDUCTIONS)), data=st.data())
def test_how_rows_are_split_and_padded_changes_nothing(
    case: dict[str, Any], reduction: str, data: st.DataObject, gradient: Callable[..., tuple[float, Tensor]]
) -> None:
    whole = gradient(case, reduction=reduction)
    for micro in (1, 2):
        assert_equal(gradient(case, reduction=reduction, micro=micro), whole)
    side = data.draw(st.sampled_from(["left", "right"]))
    for extra in (0, 3):
        assert_equal(gradient(case, reduction=reduction, padding_side=side, extra=extra), whole)
    assert_equal(gradient(case, reduction=reduction, micro=2, padding_side="right", extra=2), whole)


@given(case=cases(), reduction=st.sampled_from(sorted(REDUCTIONS)), data=st.data())
def test_the_order_of_groups_and_rows_changes_nothing(
    case: dict[str, Any], reduction: str, data: st.DataObject, gradient: Callable[..., tuple[float, Tensor]]
) -> None:
    groups = data.draw(st.permutations(range(len(case["prompts"]))))
    rows = data.draw(st.permutations(range(len(case["rewards"][0]))))
    shuffled = {"prompts": [case["prompts"][g] for g in groups]} | {
        key: [[case[key][g][r] for r in rows] for g in groups] for key in ("completions", "temperatures", "rewards")
    }
    assert_equal(gradient(shuffled, reduction=reduction, micro=2), gradient(case, reduction=reduction))


@pytest.mark.parametrize("reduction", sorted(REDUCTIONS))
def test_the_gradient_is_unchanged_in_float32(
    reduction: str,
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    flat_gradient: Callable[[Policy], Tensor],
    make_frozen: Callable[..., Frozen],
) -> None:
    policy, old, reference = (tiny_policy(seed, torch.float32) for seed in range(3))
    rollouts = make_rollouts(CASE["prompts"], CASE["completions"], CASE["temperatures"])
    found = []
    ways: list[tuple[int, PaddingSide, int]] = [(6, "left", 0), (1, "left", 0), (2, "left", 0), (6, "right", 0)]
    for micro, side, extra in [*ways, (2, "right", 5)]:
        engine = make_engine(policy, reference=reference, beta=0.1, reduction=reduction, micro_batch_size=micro)
        batch = collate(rollouts, pad_token_id=0, padding_side=side, extra=extra)
        with torch.no_grad():
            frozen = make_frozen(
                old.logprobs(batch).logprobs, reference.logprobs(batch).logprobs, advantages(CASE["rewards"])
            )
        engine.accumulate(batch, frozen, 8, Meter())
        found.append(flat_gradient(policy))
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) <= 1e-6


def test_ratios_of_these_cases_reach_both_clips(
    policies: tuple[Policy, Policy, Policy], make_rollouts: Callable[..., Rollouts]
) -> None:
    # Without this the tests above could pass with every ratio inside the clip.
    rollouts = make_rollouts(CASE["prompts"], CASE["completions"], CASE["temperatures"])
    batch = collate(rollouts, pad_token_id=0)
    with torch.no_grad():
        current, old = (policy.logprobs(batch).logprobs for policy in policies[:2])
    ratio = (current - old).exp()[batch.completion_mask]
    assert bool((ratio < 0.8).any()) and bool((ratio > 1.28).any()) and bool(((ratio > 0.8) & (ratio < 1.28)).any())


def test_a_mean_over_the_micro_batch_depends_on_the_split(
    policies: tuple[Policy, Policy, Policy], make_rollouts: Callable[..., Rollouts]
) -> None:
    """Why TRL's ``bnpo`` is absent: averaging token means of micro-batches weighs a token by its neighbors."""
    rollouts = make_rollouts(CASE["prompts"], CASE["completions"], CASE["temperatures"])
    batch = collate(rollouts, pad_token_id=0)

    def local_mean(micro: int) -> Tensor:
        parts = [batch.rows(slice(start, start + micro)) for start in range(0, 6, micro)]
        policy = policies[0]
        means = [
            -(policy.logprobs(part).logprobs * rows[:, None])[part.completion_mask].mean()
            for part, rows in zip(parts, advantages(CASE["rewards"]).reshape(-1).split(micro), strict=True)
        ]
        gradients = torch.autograd.grad(torch.stack(means).mean(), policy.trainable())
        return torch.cat([gradient.flatten() for gradient in gradients])

    whole, halves = local_mean(6), local_mean(2)
    assert float((whole - halves).norm() / whole.norm()) > 0.05


def test_golden_step(
    gradient: Callable[..., tuple[float, Tensor]],
    policies: tuple[Policy, Policy, Policy],
    make_rollouts: Callable[..., Rollouts],
) -> None:
    """Losses and gradient norms by `by_hand` in float64, stored: they hold across versions of torch."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert sorted(golden["steps"]) == sorted(REDUCTIONS)
    for reduction, expected in golden["steps"].items():
        loss, vector = gradient(CASE, reduction=reduction)
        assert loss == pytest.approx(expected["loss"], rel=1e-9)
        assert float(vector.norm()) == pytest.approx(expected["grad_norm"], rel=1e-9)
    rollouts = make_rollouts(CASE["prompts"], CASE["completions"], CASE["temperatures"])
    batch = collate(rollouts, pad_token_id=0)
    with torch.no_grad():
        logprobs = policies[0].logprobs(batch).logprobs
    assert logprobs[batch.completion_mask].tolist() == pytest.approx(golden["logprobs"], rel=1e-9)


def test_gradient_checkpointing_changes_nothing(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    flat_gradient: Callable[[Policy], Tensor],
    make_frozen: Callable[..., Frozen],
) -> None:
    rollouts = make_rollouts(CASE["prompts"], CASE["completions"], CASE["temperatures"])
    batch = collate(rollouts, pad_token_id=0)
    found = []
    for checkpointing in (False, True):
        policy = tiny_policy()
        if checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            policy.model.enable_input_require_grads()
            policy.model.train()
            assert policy.model.is_gradient_checkpointing
        with torch.no_grad():
            old = policy.logprobs(batch).logprobs + 0.1
        make_engine(policy).accumulate(batch, make_frozen(old, old, advantages(CASE["rewards"])), 8, Meter())
        found.append((0.0, flat_gradient(policy)))
    assert_equal(found[1], found[0])
