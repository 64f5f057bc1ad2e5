"""What the sampler `native` draws and reports, by each of its decoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from grpoforge.collate import collate
from grpoforge.errors import ConfigError, RunFailed
from grpoforge.policy import Policy
from grpoforge.types import Prompt, Rollouts
from grpoforge_kernels import decode as kernel
from grpoforge_plugins.samplers import decoders
from grpoforge_plugins.samplers.hf import HFSampler
from grpoforge_plugins.samplers.inverse_cdf import Cuts, draw
from grpoforge_plugins.samplers.native import NativeSampler, decode
from grpoforge_plugins.samplers.streams import stream, streams, uniforms

PROMPTS = [[5, 9, 3], [7], [4, 4, 21, 6], [2, 3] * 9]
COMPILED = kernel.obstacle() is None
DECODERS = ["cpp", "torch"] if COMPILED else ["torch"]
each_decoder = pytest.mark.parametrize("decoder", DECODERS)
needs_cpp = pytest.mark.skipif(not COMPILED, reason="no C++ compiler works here, or another backend is forced")


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


def tokens(rollouts: Rollouts) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in rollouts.flat()]


@each_decoder
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_reported_logprobs_are_the_policys(
    decoder: Any, temperature: float, policy: Policy, prompts: tuple[Prompt, ...]
) -> None:
    sampler = NativeSampler(temperature=temperature, max_completion_length=9, decoder=decoder)
    rollouts = sampler.sample(policy, prompts, 4, seed=1)
    reported, own = recomputed(policy, rollouts)
    assert len(reported) > 60
    assert reported == pytest.approx(own, abs=2e-6)
    assert {completion.temperature for completion in rollouts.flat()} == {temperature}


@each_decoder
def test_rows_may_have_temperatures_of_their_own(decoder: Any, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    rows, heat = [*prompts, *prompts], [0.7, 1.3, 1.0, 2.0, 0.5, 1.0, 1.5, 0.9]
    drawn = decode(policy, rows, heat, streams(3, range(8)), 6, do_sample=True, decoder=decoder)
    groups = tuple((drawn[row], drawn[row + 4]) for row in range(4))
    rollouts = Rollouts(prompts=prompts, completions=groups, max_completion_length=6)
    assert [completion.temperature for completion in drawn] == heat
    reported, own = recomputed(policy, rollouts)
    assert reported == pytest.approx(own, abs=2e-6)
    for row, prompt in enumerate(rows):
        one = decode(policy, [prompt], heat[row : row + 1], streams(3, [row]), 6, do_sample=True, decoder=decoder)
        assert one[0].token_ids == drawn[row].token_ids, "a row alone is what it is in a batch"


@each_decoder
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_what_is_drawn_does_not_depend_on_the_batch(
    decoder: Any, batch_size: int, policy: Policy, prompts: tuple[Prompt, ...]
) -> None:
    def sampled(size: int, some: tuple[Prompt, ...], threads: int = 1) -> Rollouts:
        torch.set_num_threads(threads)
        sampler = NativeSampler(max_completion_length=12, temperature=1.3, batch_size=size, decoder=decoder)
        try:
            return sampler.sample(policy, some, 5, seed=4)
        finally:
            torch.set_num_threads(1)

    whole, parts = sampled(0, prompts), sampled(batch_size, prompts, threads=2)
    assert tokens(parts) == tokens(whole)
    backwards = sampled(batch_size, prompts[::-1])
    assert [tokens(backwards)[row : row + 5] for row in (15, 10, 5, 0)] == [
        tokens(whole)[row : row + 5] for row in (0, 5, 10, 15)
    ]
    if decoder == "cpp":
        assert parts == whole, "the log-probs too, to the last bit"


def test_a_prompt_that_is_asked_twice_gives_no_completion_twice(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    sampler = NativeSampler(max_completion_length=12)
    twice = sampler.sample(policy, (prompts[0], prompts[1], prompts[0]), 4, seed=0)
    eight = sampler.sample(policy, prompts[:1], 8, seed=0)
    assert tokens(twice)[:4] + tokens(twice)[8:] == tokens(eight)
    assert len(set(tokens(eight))) == 8


@each_decoder
@pytest.mark.parametrize(
    "cuts", [Cuts(), Cuts(top_k=3), Cuts(top_p=0.6), Cuts(min_p=0.3), Cuts(top_k=6, top_p=0.7, min_p=0.05)], ids=repr
)
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_tokens_come_from_the_distribution(
    decoder: Any, cuts: Cuts, temperature: float, policy: Policy, prompts: tuple[Prompt, ...]
) -> None:
    """Chi-squared against probabilities that are enumerated; those of a cut by its definition, in plain Python."""
    count = 20_000
    drawn = decode(
        policy, [prompts[0]] * count, [temperature] * count, streams(5, [0] * count), 1,
        do_sample=True, cuts=cuts, decoder=decoder,
    )  # fmt: skip
    with torch.no_grad():
        logits = policy.model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    probabilities = cut_by_definition((logits.double() / temperature).softmax(dim=0).tolist(), cuts)
    expected = count * torch.tensor(probabilities, dtype=torch.float64)
    found = torch.tensor([one.token_ids[0] for one in drawn]).bincount(minlength=24)
    assert not found[expected == 0].any(), "nothing that is cut is drawn"
    often = expected > 5
    assert int(often.sum()) >= 2
    chi_squared = ((found - expected).square() / expected)[often].sum()
    assert float(chi_squared) < 50, "at most 23 degrees of freedom: above 50 once in a thousand"


def cut_by_definition(probabilities: list[float], cuts: Cuts) -> list[float]:
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept = order[: cuts.top_k] if cuts.top_k else order
    mass, share, chosen = sum(probabilities[token] for token in kept), 0.0, []
    for token in kept:
        if share >= cuts.top_p * mass and cuts.top_p < 1:
            break
        chosen.append(token)
        share += probabilities[token]
    chosen = [token for token in chosen if probabilities[token] >= cuts.min_p * probabilities[order[0]]]
    rest = sum(probabilities[token] for token in chosen)
    return [probabilities[token] / rest if token in chosen else 0.0 for token in range(len(probabilities))]


@each_decoder
def test_a_cut_narrows_the_draw_but_not_the_logprob(decoder: Any, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    narrow = NativeSampler(max_completion_length=4, top_k=1, decoder=decoder).sample(policy, prompts, 2, seed=0)
    greedy = NativeSampler(max_completion_length=4, decoder=decoder).greedy(policy, prompts)
    assert [group[0].token_ids for group in narrow.completions] == tokens(greedy)
    reported, own = recomputed(policy, narrow)
    assert reported == pytest.approx(own, abs=2e-6)
    assert max(reported) < -0.01, "log 1 = 0 would be the log-prob after the cut"


@each_decoder
def test_ends_and_limits(decoder: Any, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    policy.model.generation_config.eos_token_id = [6, 11]
    sampler = NativeSampler(temperature=1.3, max_completion_length=12, decoder=decoder)
    rollouts = sampler.sample(policy, prompts, 32, seed=2)
    ends = {1, 6, 11}
    assert {one.token_ids[-1] for one in rollouts.flat() if one.finish_reason == "stop"} == ends
    for one in rollouts.flat():
        assert not ends & set(one.token_ids[:-1])
        assert one.finish_reason == ("stop" if one.token_ids[-1] in ends else "length")
        assert one.finish_reason == "stop" or len(one.token_ids) == 12
    lengths = [len(one.token_ids) for one in rollouts.flat()]
    assert min(lengths) == 1 and max(lengths) == 12, "an end at the first token, and none at the last"
    reported, own = recomputed(policy, rollouts)
    assert reported == pytest.approx(own, abs=4e-6)


@each_decoder
def test_one_token_at_most(decoder: Any, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    rollouts = NativeSampler(temperature=2.0, max_completion_length=1, decoder=decoder).sample(policy, prompts, 64, 0)
    assert all(len(one.token_ids) == 1 for one in rollouts.flat())
    assert {one.finish_reason for one in rollouts.flat()} == {"stop", "length"}
    assert all((one.finish_reason == "stop") == (one.token_ids == (1,)) for one in rollouts.flat())


@each_decoder
def test_the_whole_context_can_be_used(
    decoder: Any, policy: Policy, make_prompts: Callable[..., tuple[Prompt, ...]]
) -> None:
    """64 positions: a prompt of 40 tokens, one of 1, and 24 more of each."""
    prompts = make_prompts([[3, 4, 5, 6] * 10, [7]])
    sampler = NativeSampler(max_completion_length=24, decoder=decoder)
    policy.tokenizer.eos_token_id = policy.model.generation_config.eos_token_id = None
    try:
        rollouts = sampler.sample(policy, prompts, 3, seed=0)
    finally:
        del policy.tokenizer.eos_token_id
    assert {len(one.token_ids) for one in rollouts.flat()} == {24}
    reported, own = recomputed(policy, rollouts)
    assert reported == pytest.approx(own, abs=4e-6)


@each_decoder
def test_greedy_is_what_generate_takes(decoder: Any, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    ours = NativeSampler(temperature=1.3, max_completion_length=20, decoder=decoder).greedy(policy, prompts)
    theirs = HFSampler(temperature=1.3, max_completion_length=20).greedy(policy, prompts)
    assert tokens(ours) == tokens(theirs)
    assert [one.text for one in ours.flat()] == [one.text for one in theirs.flat()]
    assert [one.finish_reason for one in ours.flat()] == [one.finish_reason for one in theirs.flat()]
    for one, other in zip(ours.flat(), theirs.flat(), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=4e-6)


@each_decoder
def test_stop_strings(decoder: Any, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    """A completion with stop strings is the one without, up to the token that completes one."""
    free = NativeSampler(max_completion_length=40, temperature=1.5, decoder=decoder)
    bound = NativeSampler(max_completion_length=40, temperature=1.5, decoder=decoder, stop=("ab", "f"))
    stopped = 0
    for one, other in zip(
        free.sample(policy, prompts, 16, seed=3).flat(), bound.sample(policy, prompts, 16, seed=3).flat(), strict=True
    ):
        places = [one.text.find(stop) + len(stop) for stop in ("ab", "f") if stop in one.text]
        if not places:
            assert other == one
            continue
        stopped += 1
        assert other.text == one.text[: min(places)]
        assert other.token_ids == one.token_ids[: len(other.token_ids)] and other.finish_reason == "stop"
        assert other.token_ids[-1] == ord(other.text[-1]) - ord("a") + 2
    assert stopped > 20


@each_decoder
def test_only_the_seed_decides(decoder: Any, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    sampler = NativeSampler(max_completion_length=5, decoder=decoder)
    state = torch.get_rng_state()
    first = sampler.sample(policy, prompts, 4, seed=7)
    assert torch.get_rng_state().equal(state), "the global generator is left alone"
    assert sampler.sample(policy, prompts, 4, seed=7) == first
    assert tokens(sampler.sample(policy, prompts, 4, seed=8)) != tokens(first)


@needs_cpp
def test_threads_that_share_a_batch_draw_the_same(
    policy: Policy, prompts: tuple[Prompt, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What large models are decoded by: every matrix shared among threads."""
    from grpoforge_kernels.cpp import decode as backend

    options = {"max_completion_length": 12, "temperature": 1.3, "decoder": "cpp"}
    alone = NativeSampler(**options).sample(policy, prompts, 5, seed=4)  # type: ignore[arg-type]
    monkeypatch.setattr(backend, "ALONE", 0)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            for size in (0, 1, 7):
                shared = NativeSampler(**options, batch_size=size).sample(policy, prompts, 5, seed=4)  # type: ignore[arg-type]
                assert shared == alone
        finally:
            torch.set_num_threads(1)


@needs_cpp
def test_threads_that_share_a_batch_agree_on_long_prompts_and_few_slots(
    policy: Policy, make_prompts: Callable[..., tuple[Prompt, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass may hold nothing but the middle of a prompt, and all slots may end while rows of the prompt wait."""
    from grpoforge_kernels.cpp import decode as backend

    policy.model.config.max_position_embeddings = 2048
    prompts = make_prompts([[2 + (7 * place + number) % 20 for place in range(900)] for number in range(2)])
    options = {"max_completion_length": 2, "decoder": "cpp"}
    alone = NativeSampler(**options).sample(policy, prompts, 9, seed=4)  # type: ignore[arg-type]
    monkeypatch.setattr(backend, "ALONE", 0)
    torch.set_num_threads(2)
    try:
        for size in (0, 1, 2, 4):
            shared = NativeSampler(**options, batch_size=size).sample(policy, prompts, 9, seed=4)  # type: ignore[arg-type]
            assert shared == alone
    finally:
        torch.set_num_threads(1)


@needs_cpp
def test_the_decoders_draw_the_same(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    for cuts in ({}, {"top_k": 5, "top_p": 0.8}, {"min_p": 0.1}):
        ours, theirs = (
            NativeSampler(max_completion_length=20, decoder=decoder, **cuts).sample(policy, prompts, 16, seed=9)  # type: ignore[arg-type]
            for decoder in DECODERS
        )
        assert tokens(ours) == tokens(theirs)


def test_new_weights_are_used_at_once(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    sampler = NativeSampler(max_completion_length=6)
    before = sampler.sample(policy, prompts, 4, seed=0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    after = sampler.sample(policy, prompts, 4, seed=0)
    assert tokens(after) != tokens(before)
    reported, own = recomputed(policy, after)
    assert reported == pytest.approx(own, abs=1e-5)


def test_training_mode_and_version(policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    policy.model.train()
    policy.version = 17
    rollouts = NativeSampler(max_completion_length=2).sample(policy, prompts, 2, seed=0)
    assert policy.model.training
    assert {completion.policy_version for completion in rollouts.flat()} == {17}


@each_decoder
def test_logits_that_are_not_numbers_stop_the_run(decoder: Any, policy: Policy, prompts: tuple[Prompt, ...]) -> None:
    sampler = NativeSampler(max_completion_length=3, decoder=decoder)
    sampler.sample(policy, prompts, 2, seed=0)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(RunFailed) as failure:
        sampler.sample(policy, prompts, 2, seed=0)
    assert failure.value.message == "the policy of version 0 gives logits that are not numbers"
    assert "lower `optim.learning_rate`" in failure.value.hint


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"temperature": 0.0}, "sampler option `temperature` is 0", "choose it above 0"),
        ({"temperature": math.nan}, "sampler option `temperature` is nan", "choose it above 0"),
        ({"max_completion_length": 0}, "sampler option `max_completion_length` is 0", "choose it at least 1"),
        ({"top_p": 0.0}, "sampler option `top_p` is 0", "choose it in (0, 1]"),
        ({"top_k": -1}, "sampler option `top_k` is -1", "choose it at least 0; 0 for all tokens"),
        ({"min_p": 1.5}, "sampler option `min_p` is 1.5", "choose it in [0, 1]"),
        ({"batch_size": -4}, "sampler option `batch_size` is -4", "choose it at least 0; 0 for all at once"),
        ({"stop": ("a", "")}, "sampler option `stop` has an empty string: ['a', '']", "every text contains it"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as failure:
        NativeSampler(**options)
    assert (failure.value.message, failure.value.hint) == (message, hint)


def test_a_decoder_that_cannot_run_the_model(
    tiny_policy: Callable[..., Policy], prompts: tuple[Prompt, ...], caplog: pytest.LogCaptureFixture
) -> None:
    wide = tiny_policy(dtype=torch.float64)
    with pytest.raises(ConfigError) as failure:
        NativeSampler(decoder="cpp").greedy(wide, prompts)
    assert "sampler option `decoder` is cpp: cpp: " in failure.value.message
    assert failure.value.hint == "leave it out: the best is then chosen"
    with caplog.at_level("INFO", logger=decoders.__name__):
        rollouts = NativeSampler(max_completion_length=4).sample(wide, prompts, 2, seed=0)
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "completions are decoded by the torch decoder"
    ]
    reported, own = recomputed(wide, rollouts)
    assert reported == pytest.approx(own, abs=1e-6)


def test_a_model_without_a_cache_is_left_to_generate(
    policy: Policy, prompts: tuple[Prompt, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("it keeps no keys")

    for decoder in decoders.DECODERS.values():
        monkeypatch.setattr(decoder, "decode", broken)
    rollouts = NativeSampler(max_completion_length=4, batch_size=3, top_k=4).sample(policy, prompts, 2, seed=0)
    assert len(caplog.records) == 1
    assert "decoded by transformers' generate" in caplog.text and "torch: it keeps no keys" in caplog.text
    reported, own = recomputed(policy, rollouts)
    assert reported == pytest.approx(own, abs=1e-5)


def test_uniform_numbers_have_an_address() -> None:
    """The first outputs of splitmix64 started at 0 are known: e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    found = uniforms(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert found.tolist() == [(number >> 12) * 2.0**-52 for number in known]
    assert stream(0, 0, 1) != stream(0, 1, 0) != stream(1, 0, 0)
    many = uniforms(streams(1, [0] * 20_000), torch.full((20_000,), 3))
    assert float(many.min()) >= 0 and float(many.max()) < 1
    assert float(many.mean()) == pytest.approx(0.5, abs=4 * 12**-0.5 / 20_000**0.5)


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    """Probabilities 1/2, 0, 1/8, 3/8: u in [0, 1/2) is token 0, [1/2, 5/8) token 2, the rest token 3."""
    logits = torch.tensor([4.0, 0.0, 1.0, 3.0]).log().expand(5, 4)
    u = torch.tensor([0.0, 0.4999, 0.5001, 0.6249, 1 - 2.0**-52], dtype=torch.float64)
    assert draw(logits, torch.ones(5), u, Cuts()).tolist() == [0, 0, 2, 2, 3]
    assert draw(logits, torch.ones(5), u, Cuts(top_k=2)).tolist() == [0, 0, 0, 3, 3]
    # Squared and divided by 26: 16, 0, 1, 9.
    assert draw(logits, torch.full((5,), 0.5), u, Cuts()).tolist() == [0, 0, 0, 2, 3]
