"""What the sampler draws, from which distribution, and the log-probs it reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from grpoforge.collate import collate
from grpoforge.errors import ConfigError
from grpoforge.policy import Policy
from grpoforge.types import Prompt, Rollouts
from grpoforge_plugins.samplers.hf import HFSampler, generate, seeded

PROMPTS = [[5, 9, 3], [7], [4, 4, 21, 6]]


@pytest.fixture
def prompts(make_prompts: Callable[..., tuple[Prompt, ...]]) -> tuple[Prompt, ...]:
    return make_prompts(PROMPTS)


@pytest.fixture
def policy(tiny_policy: Callable[..., Policy]) -> Policy:
    """A policy whose own generation settings would spoil every log-prob."""
    policy = tiny_policy(dtype=torch.float32)
    theirs = policy.model.generation_config
    theirs.do_sample, theirs.repetition_penalty, theirs.top_k, theirs.temperature = True, 1.3, 5, 0.6
    theirs.max_new_tokens, theirs.no_repeat_ngram_size, theirs.suppress_tokens = 2, 2, [3, 4]
    return policy


def recomputed(policy: Policy, rollouts: Rollouts) -> tuple[list[float], list[float]]:
    """The sampler's log-probs and the policy's own, token by token."""
    batch = collate(rollouts, pad_token_id=0)
    own = policy.frozen_logprobs(batch, 64).logprobs
    mask = batch.completion_mask
    return batch.sampling_logprobs[mask].tolist(), own[mask].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_reported_logprobs_are_the_policys(temperature: float, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    sampler = HFSampler(temperature=temperature, max_completion_length=9)
    rollouts = sampler.sample(policy, prompts, 4, seed=1)
    reported, own = recomputed(policy, rollouts)
    assert len(reported) > 50
    assert reported == pytest.approx(own, abs=1e-5)
    assert {completion.temperature for completion in rollouts.flat()} == {temperature}


def test_reported_logprobs_with_pad_equal_to_eos_and_several_ends(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    policy.tokenizer.pad_token_id = 1
    policy.model.generation_config.eos_token_id = [6, 11]
    rollouts = HFSampler(temperature=1.3, max_completion_length=12).sample(policy, prompts, 16, seed=2)
    reported, own = recomputed(policy, rollouts)
    assert reported == pytest.approx(own, abs=1e-5)
    last = {completion.token_ids[-1] for completion in rollouts.flat() if completion.finish_reason == "stop"}
    assert last == {1, 6, 11}, "each of the three ends was drawn"
    for completion in rollouts.flat():
        assert not {1, 6, 11} & set(completion.token_ids[:-1])
        ended = completion.token_ids[-1] in (1, 6, 11)
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == 12


def test_an_end_at_the_token_limit_is_an_end(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    rollouts = HFSampler(temperature=2.0, max_completion_length=1).sample(policy, prompts, 64, seed=0)
    assert all(len(completion.token_ids) == 1 for completion in rollouts.flat())
    for completion in rollouts.flat():
        assert completion.finish_reason == ("stop" if completion.token_ids == (1,) else "length")
    assert {completion.finish_reason for completion in rollouts.flat()} == {"stop", "length"}


def test_the_models_generation_settings_come_back(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    theirs = policy.model.generation_config
    HFSampler(max_completion_length=2).greedy(policy, prompts)
    assert policy.model.generation_config is theirs
    assert (theirs.repetition_penalty, theirs.top_k, theirs.temperature) == (1.3, 5, 0.6)


def test_rows_may_have_temperatures_of_their_own(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    with seeded(0, policy.device):
        drawn = generate(policy, [*prompts, *prompts], [0.7, 1.3, 1.0] * 2, 6, do_sample=True)
    rollouts = Rollouts(
        prompts=prompts, completions=tuple((drawn[row], drawn[row + 3]) for row in range(3)), max_completion_length=6
    )
    assert [completion.temperature for completion in rollouts.flat()] == [0.7, 0.7, 1.3, 1.3, 1.0, 1.0]
    reported, own = recomputed(policy, rollouts)
    assert reported == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_tokens_come_from_the_whole_tempered_distribution(
    temperature: float, policy: Policy, prompts: tuple[Prompt, ...]
) -> None:
    rollouts = HFSampler(temperature=temperature, max_completion_length=1).sample(policy, prompts[:1], 4000, seed=0)
    drawn = torch.tensor([completion.token_ids[0] for completion in rollouts.flat()])
    with torch.no_grad():
        logits = policy.model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = 4000 * (logits / temperature).softmax(dim=0)
    chi_squared = ((drawn.bincount(minlength=24) - expected).square() / expected)[expected > 5].sum()
    assert float(chi_squared) < 50, "23 degrees of freedom: above 50 once in a thousand"


def test_the_greedy_completion_takes_the_most_probable_token(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    rollouts = HFSampler(temperature=1.3, max_completion_length=6).greedy(policy, prompts)
    assert rollouts.group_size == 1
    for ids, completion in zip(PROMPTS, rollouts.flat(), strict=True):
        tokens: list[int] = []
        while len(tokens) < 6 and tokens[-1:] != [1]:
            with torch.no_grad():
                tokens.append(int(policy.model(torch.tensor([ids + tokens])).logits[0, -1].argmax()))
        assert completion.token_ids == tuple(tokens)
        assert completion.text == "".join(chr(ord("a") + token - 2) for token in tokens if token > 1)


def test_only_the_seed_decides(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    sampler = HFSampler(max_completion_length=5)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = sampler.sample(policy, prompts, 4, seed=7)
    assert torch.get_rng_state().equal(state), "the global generator is left alone"
    torch.manual_seed(321)
    assert sampler.sample(policy, prompts, 4, seed=7) == first
    assert sampler.sample(policy, prompts, 4, seed=8) != first


def test_parts_of_a_batch_fill_every_group(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    rollouts = HFSampler(max_completion_length=3, batch_size=5).sample(policy, prompts, 4, seed=0)
    assert (rollouts.num_prompts, rollouts.group_size, rollouts.max_completion_length) == (3, 4, 3)
    assert rollouts.prompts == prompts
    reported, own = recomputed(policy, rollouts)
    assert reported == pytest.approx(own, abs=1e-5)


def test_a_cut_narrows_the_draw_but_not_the_logprob(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    narrow = HFSampler(max_completion_length=4, top_k=1).sample(policy, prompts, 2, seed=0)
    greedy = HFSampler(max_completion_length=4).greedy(policy, prompts)
    assert [group[0].token_ids for group in narrow.completions] == [group[0].token_ids for group in greedy.completions]
    reported, own = recomputed(policy, narrow)
    assert reported == pytest.approx(own, abs=1e-5)
    assert max(reported) < -0.01, "log 1 = 0 would be the log-prob after the cut"


def test_training_mode_and_version(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    policy.model.train()
    policy.version = 17
    rollouts = HFSampler(max_completion_length=2).sample(policy, prompts, 2, seed=0)
    assert policy.model.training
    assert {completion.policy_version for completion in rollouts.flat()} == {17}


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"temperature": 0.0}, "sampler option `temperature` is 0", "choose it above 0"),
        ({"temperature": -1.0}, "sampler option `temperature` is -1", "choose it above 0"),
        ({"temperature": math.nan}, "sampler option `temperature` is nan", "choose it above 0"),
        ({"max_completion_length": 0}, "sampler option `max_completion_length` is 0", "choose it at least 1"),
        ({"top_p": 0.0}, "sampler option `top_p` is 0", "choose it in (0, 1]"),
        ({"top_p": 1.5}, "sampler option `top_p` is 1.5", "choose it in (0, 1]"),
        ({"top_k": -1}, "sampler option `top_k` is -1", "choose it at least 0; 0 for all tokens"),
        ({"min_p": 1.5}, "sampler option `min_p` is 1.5", "choose it in [0, 1]"),
        ({"batch_size": -4}, "sampler option `batch_size` is -4", "choose it at least 0; 0 for all at once"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as failure:
        HFSampler(**options)
    assert (failure.value.message, failure.value.hint) == (message, hint)


def test_prompts_of_different_lengths_do_not_disturb_each_other(policy: Policy, prompts: Sequence[Prompt]) -> None:
    sampler = HFSampler(max_completion_length=5)
    together = sampler.greedy(policy, prompts).flat()
    alone = [sampler.greedy(policy, [prompt]).flat()[0] for prompt in prompts]
    assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
