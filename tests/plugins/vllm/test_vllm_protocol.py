"""What is asked of vLLM, and which answers are refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from grpoforge_plugins.samplers.vllm_protocol import Drawn, Malformed, Request, read_choices, seed_of

REQUEST = Request(prompt_ids=(1, 2), num=2, temperature=0.7, seed=5, max_tokens=3, stop_ids=(9,), top_k=4)


def choice(index: int, tokens: Any, logprobs: Any) -> dict[str, Any]:
    return {"index": index, "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "abort"}


def test_every_setting_is_sent_so_that_no_default_of_the_model_is_used() -> None:
    assert REQUEST.sampling() == {
        "n": 2,
        "max_tokens": 3,
        "temperature": 0.7,
        "seed": 5,
        "top_p": 1.0,
        "top_k": 4,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "logprobs": 0,
    }


def test_choices_are_put_in_order_and_ends_are_told_from_the_tokens() -> None:
    answer = {"choices": [choice(1, [3, 4, 5], [-1, -2.0, -0.5]), choice(0, [3, 9], [-0.25, 1e-7])]}
    assert read_choices(answer, REQUEST, 10) == [
        Drawn(token_ids=(3, 9), logprobs=(-0.25, 0.0), finish_reason="stop"),
        Drawn(token_ids=(3, 4, 5), logprobs=(-1.0, -2.0, -0.5), finish_reason="length"),
    ]


def test_an_end_at_the_limit_is_an_end() -> None:
    answer = {"choices": [choice(0, [3, 4, 9], [-1.0] * 3), choice(1, [3, 4, 5], [-1.0] * 3)]}
    assert [one.finish_reason for one in read_choices(answer, REQUEST, 10)] == ["stop", "length"]


GOOD = choice(1, [3, 9], [-1.0, -1.0])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([], "without `choices`"),
        ({"choices": "none"}, "without `choices`"),
        ({"choices": [None, GOOD]}, "without `choices`"),
        ({"choices": [GOOD]}, "with 1 choices instead of 2"),
        ({"choices": [GOOD, GOOD]}, r"with choices numbered \[1, 1\]"),
        ({"choices": [{**GOOD, "index": None}, GOOD]}, "with choices numbered"),
        ({"choices": [choice(0, None, [-1.0]), GOOD]}, "without `token_ids`"),
        ({"choices": [choice(0, [], []), GOOD]}, "without `token_ids`"),
        ({"choices": [choice(0, [10], [-1.0]), GOOD]}, "with the token 10, and the vocabulary has 10"),
        ({"choices": [choice(0, [-1], [-1.0]), GOOD]}, "with the token -1"),
        ({"choices": [choice(0, [True], [-1.0]), GOOD]}, "with the token True"),
        ({"choices": [choice(0, ["3"], [-1.0]), GOOD]}, "with the token '3'"),
        ({"choices": [{**GOOD, "index": 0, "logprobs": None}, GOOD]}, "without `logprobs`"),
        ({"choices": [choice(0, [3, 9], None), GOOD]}, "without `logprobs`"),
        ({"choices": [choice(0, [3, 9], [-1.0]), GOOD]}, "with 1 log-probs for 2 tokens"),
        ({"choices": [choice(0, [3, 9], [-1.0, None]), GOOD]}, "with the log-prob None of token 1.*not finite"),
        ({"choices": [choice(0, [3, 9], [float("nan"), -1]), GOOD]}, "with the log-prob nan of token 0"),
        ({"choices": [choice(0, [3, 9], [float("-inf"), -1]), GOOD]}, "with the log-prob -inf of token 0"),
        ({"choices": [choice(0, [3, 4], [-1.0, -1.0]), GOOD]}, r"an end after 2 of 3 tokens \(abort\)"),
    ],
)
def test_answers_that_cannot_be_are_refused(answer: Any, told: str) -> None:
    with pytest.raises(Malformed, match=told):
        read_choices(answer, REQUEST, 10)


def test_seeds_depend_on_the_draw_and_on_the_prompt() -> None:
    seeds = [seed_of(seed, position) for seed, position in itertools.product(range(30), range(30))]
    assert len(set(seeds)) == 900
    assert all(0 <= seed < 2**62 for seed in seeds)
    # Completion i is drawn with seed + i: groups of neighbors must not meet.
    assert min(b - a for a, b in itertools.pairwise(sorted(seeds))) > 10**6
    assert seed_of(7, 3) == seed_of(7, 3)
