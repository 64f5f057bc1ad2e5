"""What every advantage promises: who may notice an unscored row, a permutation, a shift, a scale, an outlier."""

from __future__ import annotations

import functools
import itertools
import math
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
from grpoforge_plugins.advantages.batch import batch_std, gdpo, prpo, reinforce_pp, reinforce_pp_baseline
from grpoforge_plugins.advantages.group import gpg, group, group_mean, leave_one_out, maxrl, opo, robust
from grpoforge_plugins.advantages.pass_at_k import PassAtK

NAN = float("nan")

GROUP: dict[str, Callable[..., Tensor]] = {
    "group": group,
    "group population": functools.partial(group, std="population", epsilon=1e-6),
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "opo": opo,
    "maxrl": maxrl,
    "robust": robust,
    "pass_at_k": PassAtK(),
    "pass_at_k 2": PassAtK(k=2),
}
BATCH: dict[str, Callable[..., Tensor]] = {
    "gpg": gpg,
    "batch_std": batch_std,
    "prpo": prpo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "gdpo": gdpo,
    "gdpo tokens": functools.partial(gdpo, whiten="tokens"),
}
ALL = GROUP | BATCH
everything = pytest.mark.parametrize("name", ALL)


def apply(name: str, rewards: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Advantages with weights 1, 0.5, 0.1 and, unless given, equal lengths."""
    weights = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64)[: rewards.shape[2]]
    lengths = torch.full(rewards.shape[:2], 4.0, dtype=torch.float64) if lengths is None else lengths
    found: Tensor = bind("advantage", ALL[name])({"rewards": rewards, "weights": weights, "lengths": lengths})
    return found


def table(*groups: list[float]) -> Tensor:
    """``[P, G, 1]``."""
    return torch.tensor(groups, dtype=torch.float64)[:, :, None]


@st.composite
def batches(draw: st.DrawFn, unscored: bool = True) -> tuple[Tensor, Tensor]:
    """Rewards ``[P, G, K]`` that differ by more than rounding or not at all, and lengths ``[P, G]``."""
    size = draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(1, 3))
    number = st.integers(0, 80).map(lambda eighths: eighths / 8)
    cell = st.one_of(st.just(NAN), number) if unscored else number
    cells = draw(st.lists(cell, min_size=math.prod(size), max_size=math.prod(size)))
    tokens = draw(st.lists(st.integers(0, 20), min_size=size[0] * size[1], max_size=size[0] * size[1]))
    return (
        torch.tensor(cells, dtype=torch.float64).reshape(size),
        torch.tensor(tokens, dtype=torch.float64).reshape(size[:2]),
    )


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@everything
@given(batch=batches())
def test_finite_and_0_where_unscored(name: str, batch: tuple[Tensor, Tensor]) -> None:
    rewards, lengths = batch
    found = apply(name, rewards, lengths)
    assert found.shape == rewards.shape[:2] and found.dtype == torch.float64
    assert bool(found.isfinite().all())
    assert not found[rewards.isnan().all(dim=2)].any()


@everything
@given(batch=batches())
def test_an_unscored_row_changes_nothing_for_the_others(name: str, batch: tuple[Tensor, Tensor]) -> None:
    rewards, lengths = batch
    unscored = torch.full_like(rewards[:, :1], NAN)
    found = apply(name, torch.cat([unscored, rewards], dim=1), torch.cat([lengths[:, :1] + 3, lengths], dim=1))
    close(found[:, 1:], apply(name, rewards, lengths))
    assert not found[:, 0].any()


@pytest.mark.parametrize("name", ALL)
def test_a_weight_of_0_makes_no_row_scored(name: str) -> None:
    lengths = torch.tensor([[3.0, 5.0, 2.0, 9.0]], dtype=torch.float64)
    rewards = torch.tensor([[[NAN, 7.0], [1.0, 5.0], [0.0, 2.0], [4.0, NAN]]], dtype=torch.float64)
    advantage = bind("advantage", ALL[name])
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = advantage({"rewards": rewards, "weights": weights, "lengths": lengths})
    close(found, apply(name, rewards[:, :, :1], lengths))
    assert float(found[0, 0]) == 0.0


@everything
@given(batch=batches(), data=st.data())
def test_follow_rows_and_groups_when_they_are_reordered(
    name: str, batch: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    rewards, lengths = batch
    prompts = data.draw(st.permutations(range(rewards.shape[0])))
    rows = data.draw(st.permutations(range(rewards.shape[1])))
    moved = apply(name, rewards[prompts][:, rows], lengths[prompts][:, rows])
    close(moved, apply(name, rewards, lengths)[prompts][:, rows])


@pytest.mark.parametrize("name", GROUP)
@given(batch=batches())
def test_groups_do_not_see_each_other(name: str, batch: tuple[Tensor, Tensor]) -> None:
    rewards, lengths = batch
    assert apply(name, rewards, lengths)[:1].equal(apply(name, rewards[:1], lengths[:1]))


@pytest.mark.parametrize("name", sorted({*ALL} - {"prpo", "reinforce_pp"}))
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 7.3, 1e6])
def test_a_constant_group_gets_exactly_0(name: str, value: float) -> None:
    assert apply(name, table([value] * 7, [0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 5.0]))[0].tolist() == [0.0] * 7


@everything
def test_a_constant_batch_gets_exactly_0(name: str) -> None:
    assert not apply(name, table([0.1] * 3, [0.1] * 3)).any()
    assert not apply(name, table([NAN] * 3, [NAN] * 3)).any()
    rounded = torch.tensor([[[0.1, 0.4], [0.3, 0.0], [0.0, 0.6]]], dtype=torch.float64)  # 0.1 + 0.2, 0.3, 0.3
    if not name.startswith("gdpo"):
        assert not apply(name, rounded).any(), "rounding is no signal"


@pytest.mark.parametrize(
    "name", ["group", "group population", "group_mean", "leave_one_out", "maxrl", "gpg", "batch_std"]
)
@given(batch=batches())
def test_groups_sum_to_0(name: str, batch: tuple[Tensor, Tensor]) -> None:
    assert float(apply(name, *batch).sum(dim=1).abs().max()) <= 1e-9


@given(batch=batches())
def test_gdpo_sums_to_0_in_every_group(batch: tuple[Tensor, Tensor]) -> None:
    assert float(apply("gdpo", *batch).sum(dim=1).abs().max()) <= 1e-9


@given(batch=batches())
def test_opo_sums_to_0_when_weighted_by_length(batch: tuple[Tensor, Tensor]) -> None:
    assert float((apply("opo", *batch) * batch[1]).sum(dim=1).abs().max()) <= 1e-9


@pytest.mark.parametrize("name", sorted({*ALL} - {"maxrl"}))
@given(batch=batches(unscored=False), shift=st.integers(-40, 40))
def test_do_not_move_with_a_shift(name: str, batch: tuple[Tensor, Tensor], shift: int) -> None:
    rewards, lengths = batch
    torch.testing.assert_close(
        apply(name, rewards + shift / 8, lengths), apply(name, rewards, lengths), rtol=1e-8, atol=1e-8
    )


SCALE_FREE: dict[str, Callable[..., Tensor]] = {
    "group": functools.partial(group, epsilon=0.0),
    "maxrl": maxrl,
    "robust": functools.partial(robust, epsilon=0.0, fallback="zero"),
    "pass_at_k std": PassAtK(std="sample", epsilon=0.0),
    "batch_std": functools.partial(batch_std, epsilon=0.0),
    "prpo": functools.partial(prpo, epsilon=0.0),
    "reinforce_pp": functools.partial(reinforce_pp, epsilon=0.0),
    "gdpo": functools.partial(gdpo, epsilon=0.0),
}
LINEAR = ["group_mean", "leave_one_out", "opo", "gpg", "pass_at_k", "pass_at_k 2"]


@pytest.mark.parametrize("name", [*SCALE_FREE, *LINEAR])
@given(batch=batches(), scale=st.sampled_from([0.125, 3.0, 100.0]))
def test_scale_as_declared(name: str, batch: tuple[Tensor, Tensor], scale: float) -> None:
    rewards, lengths = batch
    weights = torch.ones(rewards.shape[2], dtype=torch.float64)
    advantage, factor = (ALL[name], scale) if name in LINEAR else (SCALE_FREE[name], 1.0)
    call = bind("advantage", advantage)
    one = call({"rewards": rewards, "weights": weights, "lengths": lengths})
    scaled = call({"rewards": rewards * scale, "weights": weights, "lengths": lengths})
    torch.testing.assert_close(scaled, one * factor, rtol=1e-8, atol=1e-8)


@given(batch=batches())
def test_leave_one_out_is_a_multiple_of_group_mean(batch: tuple[Tensor, Tensor]) -> None:
    rewards = batch[0]
    scored = (~rewards.isnan()).any(dim=2).sum(dim=1, keepdim=True)
    expected = apply("group_mean", rewards) * scored / (scored - 1).clamp(min=1)
    torch.testing.assert_close(apply("leave_one_out", rewards), expected, rtol=1e-15, atol=1e-15)


@given(batch=batches(unscored=False))
def test_opo_with_equal_lengths_is_group_mean(batch: tuple[Tensor, Tensor]) -> None:
    close(apply("opo", batch[0]), apply("group_mean", batch[0]))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_one_winner(size: int) -> None:
    rewards = table([1.0] + [0.0] * (size - 1))
    assert apply("leave_one_out", rewards)[0].tolist() == pytest.approx([1.0] + [-1 / (size - 1)] * (size - 1))
    assert apply("maxrl", rewards)[0].tolist() == pytest.approx([size - 1.0] + [-1.0] * (size - 1)), "1 / success rate"
    assert apply("pass_at_k", rewards)[0].tolist() == [1.0] + [0.0] * (size - 1)
    assert apply("robust", rewards).equal(apply("group_mean", rewards)) or size == 2, "MAD 0 falls back"


def test_two_completions() -> None:
    """What survives of a gap of 1 beside one of 0.01."""
    rewards = table([1.0, 0.0], [0.01, 0.0])
    assert apply("group", rewards)[:, 0].tolist() == pytest.approx([0.70701, 0.69725], abs=5e-6)
    assert apply("group population", rewards)[:, 0].tolist() == pytest.approx([1.0, 0.9998], abs=1e-5)
    assert apply("group_mean", rewards)[:, 0].tolist() == [0.5, 0.005]
    assert apply("leave_one_out", rewards)[:, 0].tolist() == [1.0, 0.01]
    assert apply("robust", rewards)[:, 0].tolist() == pytest.approx([0.6744, 0.6655], abs=1e-4)
    first, second = apply("batch_std", rewards)[:, 0].tolist()
    assert first == pytest.approx(100 * second)
    first, second = apply("gdpo", rewards)[:, 0].tolist()
    assert first == pytest.approx(second, rel=0.02)


def test_maxrl_by_hand_and_where_the_mean_is_not_positive() -> None:
    assert apply("maxrl", table([3.0, 1.0, 0.0, 0.0])).tolist() == [[2.0, 0.0, -1.0, -1.0]]
    assert apply("maxrl", table([0.0, 0.0], [-1.0, 0.5])).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_gpg_makes_up_for_groups_that_agree() -> None:
    # 8 rows, 4 of them in a group that says something: alpha 2.
    found = apply("gpg", table([1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]))
    assert found.tolist() == [[1.0, -1.0, -1.0, 1.0], [0.0] * 4]


def test_robust_by_hand() -> None:
    # Median 2.5, deviations 1.5, 0.5, 0.5, 1.5: MAD 1.
    found = robust(table([1.0, 2.0, 3.0, 4.0]), torch.ones(1, dtype=torch.float64), epsilon=0.0)
    assert (found * 1.4826)[0].tolist() == pytest.approx([-1.5, -0.5, 0.5, 1.5])


@pytest.mark.parametrize("wild", [10.0, 1e3, 1e9])
def test_one_outlier_moves_the_others_of_robust_no_further(wild: float) -> None:
    calm = [0.1, 0.2, 0.4, 0.7, 0.9]
    found = apply("robust", table([*calm, wild]))[0]
    assert found[:5].tolist() == pytest.approx(apply("robust", table([*calm, 1.5]))[0, :5].tolist())
    assert float(found[5]) == 3.0, "cut"
    spread = apply("group", table([*calm, wild]))[0, :5]
    assert float(spread.max() - spread.min()) < 0.3, "what a standard deviation does to the others"


def test_robust_where_most_agree() -> None:
    rewards, one = table([1.0, 0.0, 0.0, 0.0]), torch.ones(1, dtype=torch.float64)
    assert robust(rewards, one).tolist() == [[0.75, -0.25, -0.25, -0.25]]
    assert robust(rewards, one, fallback="zero").tolist() == [[0.0] * 4]


@given(batch=batches())
def test_reinforce_pp_whitens_tokens(batch: tuple[Tensor, Tensor]) -> None:
    rewards, lengths = batch
    one = torch.ones(rewards.shape[2], dtype=torch.float64)
    size = lengths * (~rewards.isnan()).any(dim=2)
    for advantage in (reinforce_pp, reinforce_pp_baseline):
        found = advantage(rewards, one, lengths, epsilon=0.0, std="population")
        if float(found.abs().max()) == 0.0:
            continue
        assert float((size * found).sum()) == pytest.approx(0.0, abs=1e-8 * float(size.sum()))
        assert float((size * found.square()).sum() / size.sum()) == pytest.approx(1.0)


def test_reinforce_pp_baseline_gives_a_constant_group_the_shift_of_the_batch() -> None:
    rewards = table([1.0, 0.0], [1.0, 1.0])
    assert apply("reinforce_pp_baseline", rewards)[1].tolist() == [0.0, 0.0]
    # The long completion won: the token mean of +-1/2 is 0.5 * (9 - 1) / 12 > 0.
    shifted = apply("reinforce_pp_baseline", rewards, torch.tensor([[9, 1], [1, 1]]))[1]
    assert float(shifted[0]) == float(shifted[1]) < 0


def test_prpo_works_without_groups() -> None:
    found = prpo(table([1.0], [0.0], [0.5]), torch.ones(1, dtype=torch.float64), epsilon=0.0)
    assert found.tolist() == [[1.0], [-1.0], [0.0]]


def test_gdpo_with_one_reward_is_group_over_its_batch_std() -> None:
    rewards = table([1.0, 0.0, 0.25], [3.0, 1.0, 9.0])
    z = apply("group", rewards)
    close(apply("gdpo", rewards), z / (z.std() + 1e-4))


def test_gdpo_weighs_rewards_whatever_their_scale() -> None:
    rewards = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 0.5]]], dtype=torch.float64)
    scaled = rewards * torch.tensor([1.0, 1000.0], dtype=torch.float64)
    torch.testing.assert_close(apply("gdpo", scaled), apply("gdpo", rewards), rtol=1e-3, atol=1e-3)
    # A constant reward has no part.
    flat = torch.cat([rewards[:, :, :1], torch.full_like(rewards[:, :, :1], 7.0)], dim=2)
    close(apply("gdpo", flat), apply("gdpo", rewards[:, :, :1]))


@given(
    rewards=st.lists(st.integers(0, 6), min_size=2, max_size=6),
    k=st.integers(2, 6),
)
def test_pass_at_k_is_the_mean_over_subsets(rewards: list[int], k: int) -> None:
    if k > len(rewards):
        return
    found = PassAtK(k=k)(table([float(reward) for reward in rewards]), torch.ones(1, dtype=torch.float64))[0]
    for index, reward in enumerate(rewards):
        others = rewards[:index] + rewards[index + 1 :]
        gains = [max(reward, *rest) - max(rest) for rest in itertools.combinations(others, k - 1)]
        assert float(found[index]) == pytest.approx(sum(gains) / len(gains), abs=1e-12)


@pytest.mark.parametrize(("size", "k"), [(4, 2), (4, 3), (4, 4), (3, 2)])
def test_pass_at_k_is_an_unbiased_gradient_of_the_best_of_k(size: int, k: int) -> None:
    """Over every group a policy of three completions can draw: ``E[sum_i A_i grad log pi] k / G = grad max@k``."""
    logits = torch.tensor([0.2, -0.7, 0.5], dtype=torch.float64, requires_grad=True)
    payoff = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    logprobs = logits.log_softmax(dim=0)
    best = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=k):
        best = best + logprobs[list(drawn)].sum().exp() * payoff[list(drawn)].max()
    (exact,) = torch.autograd.grad(best, logits, retain_graph=True)
    surrogate = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=size):
        chosen = logprobs[list(drawn)]
        advantages = PassAtK(k=k)(payoff[list(drawn)][None, :, None], torch.ones(1, dtype=torch.float64))[0]
        surrogate = surrogate + chosen.sum().exp().detach() * (advantages * chosen).sum()
    (estimated,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(estimated * k / size, exact, rtol=0, atol=1e-12)


def test_pass_at_k_of_the_whole_group_is_the_lead_over_the_second() -> None:
    assert apply("pass_at_k", table([0.5, 3.0, 1.0, NAN])).tolist() == [[0.0, 2.0, 0.0, 0.0]]
    assert not apply("pass_at_k", table([3.0, 3.0, 1.0])).any(), "ties"


def test_pass_at_k_with_too_few_scored_rows() -> None:
    assert PassAtK(k=3)(table([1.0, 0.0, NAN]), torch.ones(1, dtype=torch.float64)).tolist() == [[0.0] * 3]


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "k of 1": (
        lambda: PassAtK(k=1),
        "advantage option `k` is 1",
        "choose it >= 2; `leave_one_out` is the case of 1",
    ),
    "k beyond the group": (
        lambda: PassAtK(k=5)(table([1.0, 0.0]), torch.ones(1)),
        "advantage option `k` is 5, and a prompt has 2 completions",
        "choose `k` <= 2, or raise `batch.completions_per_prompt`",
    ),
    "a single completion": (
        lambda: PassAtK().check(1),
        "advantage `pass_at_k` compares the completions of a prompt, and there is 1",
        "raise `batch.completions_per_prompt`",
    ),
}


@pytest.mark.parametrize(("call", "message", "hint"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(call: Callable[[], Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize("name", [*ALL, "pass_at_k std"])
def test_declares_whether_two_completions_keep_the_size_of_their_gap(name: str) -> None:
    advantage = ALL[name] if name in ALL else SCALE_FREE[name]
    rewards = table([10.0, 9.0], [10.0, 9.99])
    data = {"rewards": rewards, "weights": torch.ones(1).double(), "lengths": torch.full((2, 2), 4.0).double()}
    found: Tensor = bind("advantage", advantage)(data)
    wide, narrow = (found.amax(dim=1) - found.amin(dim=1)).tolist()
    assert declared(advantage, "scales_by_std", False) == (wide < 2 * narrow)


def test_the_smallest_group_of_pass_at_k_is_its_k() -> None:
    assert declared(PassAtK(), "min_group") == 2
    assert declared(PassAtK(k=5), "min_group") == 5
    assert declared(prpo, "min_group") == declared(reinforce_pp, "min_group") == 1
