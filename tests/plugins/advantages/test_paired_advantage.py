"""The gap inside a pair: its threshold, its size, its baselines by temperature, and what it does to the policy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpoforge.binding import bind
from grpoforge.engine import Engine
from grpoforge.errors import ConfigError
from grpoforge.policy import Policy
from grpoforge.scoring import BoundReward, ledger
from grpoforge.state import load_state, save_state
from grpoforge.types import Prompt, Rollouts, Scores
from grpoforge_plugins.advantages.batch import batch_std
from grpoforge_plugins.advantages.group import group, group_mean
from grpoforge_plugins.advantages.paired import Paired

NAN = float("nan")
ONE = torch.ones(1, dtype=torch.float64)


def table(*groups: Sequence[float]) -> Tensor:
    """``[P, G, 1]``."""
    return torch.tensor(groups, dtype=torch.float64)[:, :, None]


def heat(rewards: Tensor, cold: float = 0.7, hot: float = 1.3) -> Tensor:
    """Temperatures cold, hot, cold, hot."""
    return torch.tensor([cold, hot], dtype=torch.float64).repeat(rewards.shape[0], rewards.shape[1] // 2)


def of(rewards: Tensor, weights: Tensor | None = None, **options: Any) -> list[list[float]]:
    """Advantages of a fresh instance."""
    weights = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)[: rewards.shape[2]] if weights is None else weights
    found: list[list[float]] = Paired(**options)(rewards, weights, heat(rewards))[0].tolist()
    return found


def metrics(rewards: Tensor, temperatures: Tensor | None = None, **options: Any) -> dict[str, tuple[float, float]]:
    return dict(Paired(**options)(rewards, ONE, heat(rewards) if temperatures is None else temperatures)[1])


def test_by_hand() -> None:
    # Gaps 1 and -0.5 in the first group, 0.2 and 0 in the second.
    rewards = table([1.0, 0.0, 0.25, 0.75], [0.5, 0.3, 0.4, 0.4])
    assert of(rewards) == [
        [0.5, -0.5, -0.25, 0.25],
        pytest.approx([0.1, -0.1, 0.0, 0.0], abs=1e-15),
    ]


@pytest.mark.parametrize(
    ("gap", "counts"),
    [(0.0, False), (0.01, False), (0.0999, False), (0.1, True), (-0.1, True), (0.1001, True), (-1.0, True)],
)
def test_the_threshold(gap: float, counts: bool) -> None:
    assert of(table([0.5 + gap, 0.5])) == [[pytest.approx(gap / 2 * counts), pytest.approx(-gap / 2 * counts)]]


@pytest.mark.parametrize("rows", [(0.3, 0.2), (1.1, 1.0), (0.7, 0.6), (100.1, 100.0)])
def test_a_gap_that_is_the_threshold_on_paper_counts(rows: tuple[float, float]) -> None:
    assert of(table(rows))[0] == pytest.approx([0.05, -0.05])


def test_rounding_is_no_gap() -> None:
    rewards = torch.tensor([[[0.1, 0.4], [0.3, 0.0]]], dtype=torch.float64)  # 0.1 + 0.2 against 0.3
    assert of(rewards, preference_threshold=0.0) == [[0.0, 0.0]]
    assert of(table([0.0, 1e-9]), preference_threshold=0.0) == [[-5e-10, 5e-10]]


def test_a_pair_with_an_unscored_row_contributes_nothing_and_takes_nothing() -> None:
    assert of(table([NAN, 1.0, 1.0, 0.0], [0.0, NAN, NAN, NAN])) == [[0.0, 0.0, 0.5, -0.5], [0.0] * 4]
    partly = torch.tensor([[[1.0, NAN], [NAN, 1.0]]], dtype=torch.float64)
    assert of(partly) == [[0.25, -0.25]], "1 against 0.5: a missing reward counts as 0, as everywhere"


def test_an_odd_group_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        of(table([1.0, 0.0, 0.5]).expand(1, 3, 1))
    assert refused.value.message == "advantage `paired` compares two completions at a time, and a prompt has 3"
    assert refused.value.hint == "use an even `batch.completions_per_prompt`"


@st.composite
def batches(draw: st.DrawFn) -> Tensor:
    """Rewards ``[P, 2n, K]`` in eighths, some of them unscored."""
    size = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    cell = st.one_of(st.just(NAN), st.integers(0, 40).map(lambda eighths: eighths / 8))
    cells = draw(st.lists(cell, min_size=size[0] * size[1] * size[2], max_size=size[0] * size[1] * size[2]))
    return torch.tensor(cells, dtype=torch.float64).reshape(size)


WEIGHTS = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)
thresholds = st.sampled_from([0.0, 0.1, 0.5])


def apply(rewards: Tensor, **options: Any) -> Tensor:
    return Paired(**options)(rewards, WEIGHTS[: rewards.shape[2]], heat(rewards))[0]


@given(rewards=batches(), threshold=thresholds, std=st.sampled_from(["none", "sample", "population"]))
def test_pairs_sum_to_0_and_unscored_rows_get_0(rewards: Tensor, threshold: float, std: Any) -> None:
    found = apply(rewards, preference_threshold=threshold, std=std)
    assert bool(found.isfinite().all()) and found.dtype == torch.float64
    first, second = found[:, 0::2], found[:, 1::2]
    assert first.equal(-second)
    assert not found[rewards.isnan().all(dim=2)].any()


@given(rewards=batches(), threshold=thresholds, data=st.data())
def test_pairs_may_change_places_and_so_may_the_rows_of_a_pair(
    rewards: Tensor, threshold: float, data: st.DataObject
) -> None:
    plain = apply(rewards, preference_threshold=threshold)
    pairs = data.draw(st.permutations(range(rewards.shape[1] // 2)))
    order = [row for pair in pairs for row in data.draw(st.permutations([2 * pair, 2 * pair + 1]))]
    assert apply(rewards[:, order], preference_threshold=threshold).equal(plain[:, order])


@given(rewards=batches(), threshold=thresholds, shift=st.integers(-16, 16))
def test_a_shift_of_all_rewards_changes_nothing(rewards: Tensor, threshold: float, shift: int) -> None:
    full = rewards.nan_to_num(nan=0.5)
    moved = apply(full + shift / 8, preference_threshold=threshold)
    torch.testing.assert_close(moved, apply(full, preference_threshold=threshold), rtol=1e-9, atol=1e-9)


@given(rewards=batches(), threshold=thresholds)
def test_the_larger_gap_pushes_as_many_times_harder_as_it_is_larger(rewards: Tensor, threshold: float) -> None:
    found = apply(rewards, preference_threshold=threshold)
    scaled = apply(rewards * 4, preference_threshold=threshold * 4)
    torch.testing.assert_close(scaled, found * 4, rtol=1e-12, atol=1e-12)


@given(rewards=batches())
def test_with_one_pair_and_no_threshold_it_is_group_mean_and_batch_std(rewards: Tensor) -> None:
    one = rewards[:, :2].nan_to_num(nan=0.25)
    weights = WEIGHTS[: rewards.shape[2]]
    torch.testing.assert_close(apply(one, preference_threshold=0.0), group_mean(one, weights), rtol=0, atol=1e-14)
    found = apply(one, preference_threshold=0.0, std="sample")
    torch.testing.assert_close(found, batch_std(one, weights), rtol=1e-12, atol=1e-14)


@given(rewards=batches(), threshold=thresholds, std=st.sampled_from(["none", "sample"]))
def test_the_ledger_holds_pair_by_pair(rewards: Tensor, threshold: float, std: Any) -> None:
    weights = WEIGHTS[: rewards.shape[2]]
    advantages = apply(rewards, preference_threshold=threshold, std=std)
    names = tuple(f"r{index}" for index in range(rewards.shape[2]))
    scores = Scores(names=names, rewards=rewards, raw=rewards, weights=weights, seconds=(0.0,) * len(names))
    shares = ledger(scores, advantages, block=2)
    allowed = 1e-12 * shares.abs().sum(dim=2).clamp(min=1.0)
    assert bool(((shares.sum(dim=2) - advantages).abs() <= allowed).all())
    if std == "none":
        values = rewards.nan_to_num(nan=0.0) * weights
        gaps = (values[:, 0::2] - values[:, 1::2]) / 2
        expected = torch.where(advantages[:, 0::2, None] != 0, gaps, 0.0)
        torch.testing.assert_close(shares[:, 0::2], expected, rtol=1e-9, atol=1e-12)


def test_the_ledger_of_a_group_of_four_looks_at_the_pair() -> None:
    # Row 0 lies at the mean of its group and half a point above its partner, by the second reward alone.
    rewards = torch.tensor([[[0.5, 1.0], [0.5, 0.0], [1.0, 0.5], [0.0, 2.5]]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    scores = Scores(names=("a", "b"), rewards=rewards, raw=rewards, weights=weights, seconds=(0.0, 0.0))
    advantages = Paired()(rewards, weights, heat(rewards))[0]
    assert advantages.tolist() == [[0.25, -0.25, 0.0, 0.0]]
    assert ledger(scores, advantages, block=2)[0, :2].tolist() == [[0.0, 0.25], [0.0, -0.25]]


def test_metrics_by_hand() -> None:
    # Gaps 1, -0.5, 0.05, 0, 0.1; one pair has an unscored row.
    rewards = table([1.0, 0.0, 0.0, 0.5], [0.55, 0.5, 0.3, 0.3], [0.4, 0.3, NAN, 1.0])
    found = metrics(rewards)
    assert found["paired/gap_mean"] == pytest.approx((1.65, 5.0))
    assert found["paired/tie_ratio"] == (2.0, 5.0)
    assert found["paired/win_rate_cold"] == (2.0, 3.0)
    assert metrics(rewards, heat(rewards, cold=1.3, hot=0.7))["paired/win_rate_cold"] == (1.0, 3.0)
    assert metrics(rewards, heat(rewards, hot=0.7))["paired/win_rate_cold"] == (0.0, 0.0), "one temperature"
    assert metrics(table([NAN, NAN])) == {name: (0.0, 0.0) for name in found}
    assert metrics(table([0.5, 0.5]), preference_threshold=0.0)["paired/tie_ratio"] == (1.0, 1.0)


def test_baselines_by_hand() -> None:
    advantage = Paired(baseline_decay=0.75, preference_threshold=0.0)
    first = table([1.0, 0.0], [1.0, 1.0])
    # Its own baseline: cold 1, hot 1/2. Gaps 1 - 1/2 and 0 - 1/2.
    assert advantage(first, ONE, heat(first))[0].tolist() == [[0.25, -0.25], [-0.25, 0.25]]
    assert advantage.state_dict() == {"baselines": {"0.7": 1.0, "1.3": 0.5}}
    second = table([0.0, 1.0], [NAN, 0.0])
    # Of earlier steps: gap (0 - 1) - (1 - 1/2); then cold 3/4 1 + 1/4 0, hot 3/4 1/2 + 1/4 1/2.
    assert advantage(second, ONE, heat(second))[0].tolist() == [[-0.75, 0.75], [0.0, 0.0]]
    assert advantage.state_dict() == {"baselines": {"0.7": 0.75, "1.3": 0.5}}
    # A temperature that no row was scored at keeps its mean.
    third = table([NAN, 0.5])
    advantage(third, ONE, heat(third))
    assert advantage.state_dict()["baselines"]["0.7"] == 0.75


def test_the_threshold_is_for_the_gap_beyond_the_baselines() -> None:
    advantage = Paired(baseline_decay=0.5)
    usual = table([1.0, 0.5])
    assert advantage(usual, ONE, heat(usual))[0].tolist() == [[0.0, 0.0]], "just what is usual"
    tie = table([1.0, 1.0])
    assert advantage(tie, ONE, heat(tie))[0].tolist() == [[-0.25, 0.25]], "the hot row did better than usual"


def test_a_resumed_run_has_the_same_bits(tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.rand(4, 4, 1, generator=generator, dtype=torch.float64) for _ in range(6)]
    whole = Paired(baseline_decay=0.95)
    for rewards in steps[:3]:
        whole(rewards, ONE, heat(rewards))
    save_state(tmp_path, "advantage", whole.state_dict())
    resumed = Paired(baseline_decay=0.95)
    resumed.load_state_dict(load_state(tmp_path, "advantage"))
    for rewards in steps[3:]:
        assert resumed(rewards, ONE, heat(rewards))[0].equal(whole(rewards, ONE, heat(rewards))[0])
    assert json.dumps(resumed.state_dict()) == json.dumps(whole.state_dict())


def test_every_rank_has_the_same_baselines() -> None:
    """Each computes on the rows of all, so state and metrics are the same everywhere."""
    rewards = table([1.0, 0.0], [0.5, 0.25])
    ranks = [Paired(baseline_decay=0.9) for _ in range(2)]
    data = {"rewards": rewards, "weights": ONE, "temperatures": heat(rewards)}
    found = [bind("advantage", rank)(data) for rank in ranks]
    assert found[0][0].equal(found[1][0]) and found[0][1] == found[1][1]
    assert ranks[0].state_dict() == ranks[1].state_dict() != Paired().state_dict()


# What a gap does to the policy, measured through the engine.

PROMPTS, COMPLETIONS = [[5, 9, 3]], [[[3, 8, 1], [14, 6, 20, 9, 2]]]


def step_of(
    gap: float,
    advantage: Any,
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
) -> Tensor:
    """How far one step of SGD moves the policy when two completions differ by ``gap`` in reward."""
    policy = tiny_policy()
    before = [parameter.detach().clone() for parameter in policy.trainable()]
    rewards = [BoundReward(name="r", function=lambda completions: [0.5 + gap, 0.5], data=("completions",), weight=1.0)]
    rollouts = make_rollouts(PROMPTS, COMPLETIONS, [[0.7, 1.3]])
    engine = make_engine(
        policy, sampler=given_rollouts(rollouts), rewards=rewards, advantage=advantage, learning_rate=1.0
    )
    engine.step(make_prompts(PROMPTS), step=1, seed=0)
    return torch.cat([(new - old).flatten() for new, old in zip(policy.trainable(), before, strict=True)]).detach()


@pytest.fixture
def move(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    given_rollouts: Callable[..., Any],
) -> Callable[..., Tensor]:
    def by(gap: float, advantage: Any) -> Tensor:
        parts = tiny_policy, make_engine, make_rollouts, make_prompts, given_rollouts
        return step_of(gap, copy.deepcopy(advantage), *parts)

    return by


def test_a_hundredth_of_the_gap_moves_the_policy_a_hundredth_as_far(move: Callable[..., Tensor]) -> None:
    right, brief = (move(gap, Paired(preference_threshold=0.0)) for gap in (1.0, 0.01))
    assert float(right.norm()) > 1e-3
    torch.testing.assert_close(brief * 100, right, rtol=1e-6, atol=1e-9)
    assert float(brief.norm() / right.norm()) == pytest.approx(0.01, rel=1e-6)


def test_with_the_default_threshold_a_gap_of_0_01_moves_nothing(move: Callable[..., Tensor]) -> None:
    assert not move(0.01, Paired()).any()
    torch.testing.assert_close(move(1.0, Paired()), move(1.0, Paired(preference_threshold=0.0)), rtol=0, atol=0)


def test_group_with_std_keeps_only_the_sign_of_the_gap(move: Callable[..., Tensor]) -> None:
    """0.69725 against 0.70701: a gap of a hundredth pushes 98.6% as hard."""
    ratio = float(move(0.01, group).norm() / move(1.0, group).norm())
    assert ratio == pytest.approx(0.69725 / 0.70701, abs=1e-4)


def test_the_better_of_a_pair_becomes_more_probable(move: Callable[..., Tensor]) -> None:
    torch.testing.assert_close(move(-1.0, Paired()), -move(1.0, Paired()), rtol=1e-9, atol=1e-12)
