"""Pairs of completions: in which order, at which temperatures, how many, and with which log-probs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from grpoforge.collate import collate
from grpoforge.engine import Engine
from grpoforge.errors import ConfigError
from grpoforge.policy import Policy
from grpoforge.scoring import BoundReward
from grpoforge.types import Prompt
from grpoforge_plugins.advantages.paired import Paired
from grpoforge_plugins.samplers import paired
from grpoforge_plugins.samplers.native import NativeSampler
from grpoforge_plugins.samplers.paired import PairedSampler

PROMPTS = [[5, 9, 3], [7], [4, 4, 21, 6]]


@pytest.fixture
def prompts(make_prompts: Callable[..., tuple[Prompt, ...]]) -> tuple[Prompt, ...]:
    return make_prompts(PROMPTS)


@pytest.fixture
def policy(tiny_policy: Callable[..., Policy]) -> Policy:
    return tiny_policy(dtype=torch.float32)


def share_of_a(completions: Sequence[str]) -> list[float]:
    return [text.count("a") / max(len(text), 1) for text in completions]


SHARE = BoundReward(name="share", function=share_of_a, data=("completions",), weight=1.0)


@pytest.mark.parametrize("pairs", [1, 3])
def test_rows_are_cold_hot_cold_hot(pairs: int, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    rollouts = PairedSampler(max_completion_length=4).sample(policy, prompts, 2 * pairs, seed=0)
    assert rollouts.prompts == prompts and rollouts.max_completion_length == 4
    for group in rollouts.completions:
        assert [one.temperature for one in group] == [0.7, 1.3] * pairs


def test_the_first_temperature_is_that_of_the_first_row(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    rollouts = PairedSampler(temperatures=(2.0, 0.5), max_completion_length=4).sample(policy, prompts, 2, seed=0)
    assert [one.temperature for one in rollouts.flat()] == [2.0, 0.5] * 3


@pytest.mark.parametrize("size", [0, 1, 2])
def test_reported_logprobs_are_the_policys_at_the_temperature_of_the_row(
    size: int, policy: Policy, prompts: tuple[Prompt, ...]
) -> None:
    rollouts = PairedSampler(max_completion_length=8, paired_batch_size=size).sample(policy, prompts, 4, seed=1)
    batch = collate(rollouts, pad_token_id=0)
    own = policy.frozen_logprobs(batch, 64).logprobs[batch.completion_mask]
    assert batch.sampling_logprobs[batch.completion_mask].tolist() == pytest.approx(own.tolist(), abs=1e-5)
    swapped = dataclasses.replace(batch, temperatures=batch.temperatures.flip(0))
    other = policy.frozen_logprobs(swapped, 64)
    assert float((other.logprobs[batch.completion_mask] - own).abs().max()) > 0.05, "the temperature matters"


def test_temperatures_alternate_and_greedy_has_none(
    policy: Policy, prompts: tuple[Prompt, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[float], dict[str, Any]]] = []

    def noted(policy: Any, rows: Any, temperatures: Sequence[float], *rest: Any, **how: Any) -> Any:
        calls.append((list(temperatures), {name: how[name] for name in ("do_sample", "slots")}))
        return original(policy, rows, temperatures, *rest, **how)

    original = paired.decode
    monkeypatch.setattr(paired, "decode", noted)
    sampler = PairedSampler(paired_batch_size=2, max_completion_length=2)
    assert sampler.sample(policy, prompts, 2, seed=5).group_size == 2
    assert sampler.greedy(policy, prompts).group_size == 1
    assert calls == [
        ([0.7, 1.3] * 3, {"do_sample": True, "slots": 4}),
        ([1.0] * 3, {"do_sample": False, "slots": 0}),
    ]


def test_how_many_are_decoded_at_a_time_changes_nothing(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    whole, by_two = (
        PairedSampler(max_completion_length=6, paired_batch_size=size).sample(policy, prompts, 6, seed=3).flat()
        for size in (0, 2)
    )
    assert [one.token_ids for one in whole] == [one.token_ids for one in by_two]


def test_each_row_comes_from_the_distribution_at_its_temperature(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    group = PairedSampler(max_completion_length=1).sample(policy, prompts[:1], 4000, seed=3).completions[0]
    with torch.no_grad():
        logits = policy.model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    for temperature, row in ((0.7, 0), (1.3, 1)):
        count = torch.tensor([one.token_ids[0] for one in group[row::2]]).bincount(minlength=24)
        expected = 2000 * (logits / temperature).softmax(dim=0)
        chi_squared = ((count - expected).square() / expected)[expected > 5].sum()
        assert float(chi_squared) < 50, "23 degrees of freedom: above 50 once in a thousand"


def test_only_the_seed_decides(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    sampler = PairedSampler(max_completion_length=5, paired_batch_size=2)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = sampler.sample(policy, prompts, 4, seed=7)
    assert torch.get_rng_state().equal(state), "the global generator is left alone"
    torch.manual_seed(321)
    assert sampler.sample(policy, prompts, 4, seed=7) == first
    assert sampler.sample(policy, prompts, 4, seed=8) != first


def test_greedy_is_that_of_the_plain_sampler(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    ours = PairedSampler(max_completion_length=6).greedy(policy, prompts)
    assert ours == NativeSampler(temperature=1.0, max_completion_length=6).greedy(policy, prompts)


def test_cuts_reach_the_draw(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    narrow = PairedSampler(max_completion_length=4, top_k=1).sample(policy, prompts, 2, seed=0)
    greedy = PairedSampler(max_completion_length=4).greedy(policy, prompts)
    assert [one.token_ids for one in narrow.flat()] == [one.token_ids for one in greedy.flat() for _ in range(2)]


@pytest.mark.parametrize("asked", [1, 3, 5])
def test_an_odd_number_of_completions(asked: int, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        PairedSampler().sample(policy, prompts, asked, seed=0)
    assert refused.value.message == (
        f"sampler `paired` draws two completions at a time, and {asked} per prompt are asked for"
    )
    assert refused.value.hint == f"ask for {asked + 1}"


def test_the_number_of_pairs_is_that_of_the_batch() -> None:
    PairedSampler().check_batch(64, 2)
    PairedSampler(num_sample_pairs=96).check_batch(24, 8)
    with pytest.raises(ConfigError) as refused:
        PairedSampler().check_batch(24, 8)
    assert refused.value.message == (
        "sampler option `num_sample_pairs` is 64, and a step of 24 prompts x 8 completions has 96 pairs"
    )
    assert refused.value.hint == (
        "use `--set sampler.num_sample_pairs=96`, or change `batch.prompts_per_step` and `batch.completions_per_prompt`"
    )


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"temperatures": (0.7, 0.0)}, "sampler option `temperatures` is 0", "choose both above 0"),
        ({"temperatures": (-1.0, 1.0)}, "sampler option `temperatures` is -1", "choose both above 0"),
        ({"temperatures": (1.0, math.nan)}, "sampler option `temperatures` is nan", "choose both above 0"),
        ({"num_sample_pairs": 0}, "sampler option `num_sample_pairs` is 0", "choose it at least 1"),
        (
            {"paired_batch_size": -1},
            "sampler option `paired_batch_size` is -1",
            "choose it at least 0; 0 for all at once",
        ),
        ({"max_completion_length": 0}, "sampler option `max_completion_length` is 0", "choose it at least 1"),
        ({"top_p": 1.5}, "sampler option `top_p` is 1.5", "choose it in (0, 1]"),
        ({"top_k": -1}, "sampler option `top_k` is -1", "choose it at least 0; 0 for all tokens"),
        ({"min_p": -0.1}, "sampler option `min_p` is -0.1", "choose it in [0, 1]"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as failure:
        PairedSampler(**options)
    assert (failure.value.message, failure.value.hint) == (message, hint)


@pytest.mark.parametrize("micro", [1, 3, 64])
def test_step_0_has_ratio_1_and_no_kl_for_every_row(
    micro: int, policy: Policy, prompts: tuple[Prompt, ...], make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(
        policy,
        sampler=PairedSampler(max_completion_length=6),
        advantage=Paired(preference_threshold=0.0),
        rewards=[SHARE],
        reference=policy.freeze(),
        beta=0.1,
        group_size=4,
        micro_batch_size=micro,
    )
    report = engine.step(prompts, step=1, seed=3)
    assert [one.temperature for one in report.rollouts.flat()] == [0.7, 1.3] * 6
    assert report.advantages.any()
    # Largest over all tokens of all rows: 0 is exactly 0 for each of them.
    assert report.metrics["invariant/ratio_dev_step0"] == 0.0
    assert report.metrics["invariant/kl_step0"] == 0.0
    assert report.metrics["sampling/sampling_logp_difference/max"] < 1e-5


def test_a_step_reports_its_pairs_and_its_temperatures(
    policy: Policy, prompts: tuple[Prompt, ...], make_engine: Callable[..., Engine]
) -> None:
    engine = make_engine(
        policy,
        sampler=PairedSampler(max_completion_length=6),
        advantage=Paired(preference_threshold=0.05),
        rewards=[SHARE],
        group_size=4,
    )
    report = engine.step(prompts, step=1, seed=3)
    total = report.scores.total()
    cold, hot = total[:, 0::2], total[:, 1::2]
    ties = (cold - hot).abs() < 0.05
    assert 0 < int(ties.sum()) < 6, "some are, some are not"
    metrics = report.metrics
    assert metrics["reward_T/0.7/mean"] == pytest.approx(float(cold.mean()), abs=1e-15)
    assert metrics["reward_T/1.3/mean"] == pytest.approx(float(hot.mean()), abs=1e-15)
    assert metrics["paired/gap_mean"] == pytest.approx(float((cold - hot).abs().mean()), abs=1e-15)
    assert metrics["paired/tie_ratio"] == pytest.approx(float(ties.double().mean()))
    assert metrics["paired/win_rate_cold"] == pytest.approx(float((cold > hot)[~ties].double().mean()))
    expected = torch.where(ties, 0.0, (cold - hot) / 2)
    torch.testing.assert_close(report.advantages, torch.stack([expected, -expected], dim=2).reshape(3, 4))
    torch.testing.assert_close(report.shares.sum(dim=2), report.advantages)
