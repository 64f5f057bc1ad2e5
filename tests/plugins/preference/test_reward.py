"""The reward that learns during the run: its labels, its silence, its memory."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from grpoforge.errors import ConfigError, ModelError
from grpoforge.learner import Learner
from grpoforge.state import pack_state, unpack_state
from grpoforge.types import Rollouts, Scores, Stateful, StepReport
from grpoforge_plugins.preference.reward import Preference, win_rates

A, B, C = 2, 3, 4
"""Tokens of the letters a, b and c."""


def small(**options: Any) -> Preference:
    chosen = {"hidden_size": 32, "num_layers": 1, "max_length": 32, "batch_size": 4, "min_pairs": 8, "updates": 2}
    return Preference(**{**chosen, "learning_rate": 3e-3, **options})


def report(rollouts: Rollouts, **columns: list[list[float]]) -> StepReport:
    """A step whose rewards, all of weight 1, are `columns`, `[P, G]` each."""
    rewards = torch.stack([torch.tensor(values, dtype=torch.float64) for values in columns.values()], dim=2)
    scores = Scores(
        names=tuple(columns),
        rewards=rewards,
        raw=rewards,
        weights=torch.ones(len(columns), dtype=torch.float64),
        seconds=(0.0,) * len(columns),
    )
    zeros = torch.zeros(rewards.shape[:2], dtype=torch.float64)
    return StepReport(
        step=1, metrics={}, rollouts=rollouts, scores=scores, advantages=zeros, shares=torch.zeros_like(rewards)
    )


def step_of(make_rollouts: Any, number: int) -> StepReport:
    """A step in which a completion with the letter c is right, in one of many wordings."""
    draws = torch.randint(0, 2, (4, 2, 5), generator=torch.Generator().manual_seed(number)) + A
    completions = [[[*group[0].tolist(), C], group[1].tolist()] for group in draws]
    rollouts = make_rollouts([[A], [B], [A, B], [B, A]], completions)
    return report(rollouts, right=[[1.0, 0.0]] * 4, preference=[[float("nan")] * 2] * 4)


def taught(make_rollouts: Any, steps: int, reward: Preference | None = None, first: int = 0) -> Preference:
    reward = reward or small()
    for number in range(first, first + steps):
        reward.learn(reward.lessons(step_of(make_rollouts, number), "preference"))
    return reward


def test_it_is_what_the_run_looks_for() -> None:
    assert isinstance(small(), Learner) and isinstance(small(), Stateful)


def test_a_reward_against_its_siblings_by_hand() -> None:
    # sigmoid(1) = 0.7310586; the third row is not scored, the second group has one scored row.
    found = win_rates(torch.tensor([[0.0, 1.0, torch.nan], [2.0, torch.nan, torch.nan]], dtype=torch.float64))
    assert found[0, :2].tolist() == pytest.approx([-0.2310586, 0.2310586], abs=1e-7)
    assert found[0, 2].isnan() and found[1].isnan().all()
    three = win_rates(torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64))
    # The first loses to the second by 1 and to the third by 3: (0.2689414 + 0.0474259) / 2 - 0.5.
    assert float(three[0, 0]) == pytest.approx(-0.3418164, abs=1e-7)
    assert float(three.sum()) == pytest.approx(0.0, abs=1e-15)


def test_labels_come_from_the_other_rewards_only(make_rollouts: Any) -> None:
    rollouts = make_rollouts([[5]], [[[A], [B]]])
    # Its own score says the opposite, and loudly.
    found = small().lessons(report(rollouts, right=[[0.0, 1.0]], preference=[[9.0, -9.0]]), "preference")
    assert found == [[rollouts.prompts[0].text, "b", "a", 1.0]]
    unlabelled = report(rollouts, preference=[[9.0, -9.0]], other=[[float("nan")] * 2])
    assert small().lessons(unlabelled, "preference") == []


def test_a_small_gap_makes_no_pair(make_rollouts: Any) -> None:
    step = report(make_rollouts([[5]], [[[A], [B]]]), right=[[0.5, 0.55]], preference=[[0.0, 0.0]])
    assert small().lessons(step, "preference") == []
    assert len(small(preference_threshold=0.05).lessons(step, "preference")) == 1


def test_it_is_silent_until_it_judges_what_it_has_not_learned(make_rollouts: Any) -> None:
    step = step_of(make_rollouts, 99)
    reward = small(min_accuracy=0.9)
    assert reward(step.rollouts) == [None] * 8
    heard = []
    for number in range(12):
        metrics = reward.learn(reward.lessons(step_of(make_rollouts, number), "preference"))
        heard.append(metrics["pref/accuracy"])
        if len(reward.recent) < 8 or metrics["pref/accuracy"] < 0.9:
            assert reward(step.rollouts) == [None] * 8
    assert heard[-1] == 1.0, heard
    values = reward(step.rollouts)
    assert all(value is not None for value in values)
    pairs = [(values[row], values[row + 1]) for row in range(0, 8, 2)]
    assert all(good > 0 > bad and good + bad == pytest.approx(0.0, abs=1e-12) for good, bad in pairs), values


def test_its_metrics_add_up(make_rollouts: Any) -> None:
    reward = small(every=2, buffer_size=10)
    seen = [reward.learn(reward.lessons(step_of(make_rollouts, number), "preference")) for number in range(4)]
    assert [one["pref/pairs"] for one in seen] == [4.0] * 4
    assert [one["pref/buffer"] for one in seen] == [4.0, 8.0, 10.0, 10.0]
    # An update every other step, two optimizer steps each.
    assert [one["pref/loss"] > 0 for one in seen] == [False, True, False, True]
    assert reward.num_updates == 4


def test_a_step_without_a_pair_teaches_what_it_remembers(make_rollouts: Any) -> None:
    reward = taught(make_rollouts, 2)
    metrics = reward.learn([])
    assert metrics["pref/pairs"] == 0.0 and metrics["pref/loss"] > 0 and math.isnan(metrics["pref/margin"])
    assert small().learn([])["pref/buffer"] == 0.0


def test_stored_and_taken_back_it_goes_on_bit_for_bit(make_rollouts: Any) -> None:
    whole = taught(make_rollouts, 6)
    half = taught(make_rollouts, 3)
    tensors, spec = pack_state(half.state_dict())
    resumed = small()
    resumed.load_state_dict(unpack_state(tensors, json.loads(json.dumps(spec))))
    taught(make_rollouts, 3, resumed, first=3)
    assert resumed.num_updates == whole.num_updates and resumed.recent == whole.recent
    assert resumed.buffer.pairs == whole.buffer.pairs
    assert whole.teacher and resumed.teacher
    ours, theirs = whole.teacher.encoder.model.state_dict(), resumed.teacher.encoder.model.state_dict()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    step = step_of(make_rollouts, 50)
    assert whole(step.rollouts) == resumed(step.rollouts)


def test_before_it_has_learned_its_state_is_small() -> None:
    state = small().state_dict()
    assert state["weights"] is None and state["optimizer"] is None and state["buffer"] == []


def test_a_completion_too_long_to_be_read_is_not_scored(make_rollouts: Any) -> None:
    reward = taught(make_rollouts, 12, small(min_accuracy=0.0))
    long = make_rollouts([[A]], [[[A, C], [B], [A] * 31]], max_completion_length=64)
    long = type(long)(
        prompts=long.prompts,
        completions=((*long.completions[0][:2], _spaced(long.completions[0][2])),),
        max_completion_length=64,
    )
    assert [value is None for value in reward(long)] == [False, False, True]
    # It is not learned from either, and nothing breaks.
    lesson = ["a", " ".join("a" * 40), "b", 1.0]
    assert reward.learn([lesson])["pref/pairs"] == 1.0


def _spaced(completion: Any) -> Any:
    import dataclasses

    return dataclasses.replace(completion, text=" ".join(completion.text))


def test_options_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError) as small_buffer:
        Preference(buffer_size=8, batch_size=16)
    assert small_buffer.value.message == "reward option `buffer_size` is 8, less than the 16 pairs of an update"
    assert small_buffer.value.hint == "raise `buffer_size` or lower `batch_size`"
    with pytest.raises(ModelError) as nowhere:
        Preference(model="./no/such/encoder")
    assert nowhere.value.message == "reward option `model` is ./no/such/encoder, and there is no such folder"
    assert "config.json" in nowhere.value.hint
