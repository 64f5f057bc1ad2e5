"""Rewards are foreign code: whatever they return or do is turned into numbers, or into an error with their name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpoforge.errors import RewardError
from grpoforge.scoring import BUILTIN_DATA, BoundReward, apply_gates, bind_data, check_values, ledger, score
from grpoforge.types import Completion, Prompt, Rollouts, Scores

REWARDS = Path(__file__).with_name("fixtures") / "rewards"


def rollouts(num_prompts: int = 2, group_size: int = 2, **columns: Any) -> Rollouts:
    """Prompt ``i`` says ``p<i>``; its completion ``j`` says ``c<i><j>`` in ``j + 1`` tokens."""
    prompts = tuple(
        Prompt(text=f"p{i}", token_ids=(1,), columns={name: values[i] for name, values in columns.items()}, index=i)
        for i in range(num_prompts)
    )
    completions = tuple(
        tuple(
            Completion(
                text=f"c{i}{j}",
                token_ids=(7,) * (j + 1),
                logprobs=(-1.0,) * (j + 1),
                temperature=1.0 + j,
                finish_reason="stop" if j else "length",
                policy_version=0,
            )
            for j in range(group_size)
        )
        for i in range(num_prompts)
    )
    return Rollouts(prompts=prompts, completions=completions, max_completion_length=9)


def reward(function: Callable[..., Any], *data: str, name: str = "r", **options: Any) -> BoundReward:
    return BoundReward(name=name, function=function, data=data or ("completions",), weight=1.0, **options)


def gives(values: Any) -> BoundReward:
    return reward(lambda completions: values)


def raw(*rewards: BoundReward, **options: Any) -> list[Any]:
    """Raw rewards of four rows as ``[row][reward]``, None where not scored."""
    scores = score(rollouts(), rewards, **options)
    return [[None if math.isnan(value) else value for value in row] for row in scores.raw.reshape(4, -1).tolist()]


def refusal(*rewards: BoundReward, **options: Any) -> tuple[str, str]:
    with pytest.raises(RewardError) as caught:
        score(rollouts(), rewards, **options)
    return caught.value.message, caught.value.hint


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged as a warning, also after the command line has taken the logger over."""
    monkeypatch.setattr(logging.getLogger("grpoforge"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="grpoforge"):
        yield caplog


NUMBERS = [
    [0, 1, 2, 3],
    (0.0, 1.0, 2.0, 3.0),
    range(4),
    torch.arange(4),
    torch.arange(4, dtype=torch.bfloat16),
    torch.arange(4.0, requires_grad=True),
    np.arange(4),
    np.arange(4, dtype=np.float16),
    [torch.tensor(0.0), torch.tensor([1]), np.float32(2), np.int64(3)],
    [False, True, Fraction(2), 3],
    [np.bool_(False), torch.tensor(True), np.array([[2.0]]), 3],
]


@pytest.mark.parametrize("values", NUMBERS, ids=[f"{type(v).__name__}{n}" for n, v in enumerate(NUMBERS)])
def test_numbers_of_every_kind(values: Any) -> None:
    assert raw(gives(values)) == [[0.0], [1.0], [2.0], [3.0]]


def test_none_is_not_scored_and_never_zero() -> None:
    scores = score(rollouts(), [gives([None, 0.0, None, None])])
    assert scores.rewards.isnan().flatten().tolist() == [True, False, True, True]
    assert scores.total().isnan().flatten().tolist() == [True, False, True, True]


EACH = "return one float, or None for 'not scored', per completion"
CONTAINERS = [
    ("1111", "returned '1111' (str), not a list of 4 numbers"),
    (b"1111", "returned b'1111' (bytes), not a list of 4 numbers"),
    ({0: 1, 1: 1, 2: 1, 3: 1}, "returned {0: 1, 1: 1, 2: 1, 3: 1} (dict), not a list of 4 numbers"),
    ({1, 2, 3, 4}, "returned {1, 2, 3, 4} (set), not a list of 4 numbers"),
    (None, "returned None (NoneType), not a list of 4 numbers"),
    (0.5, "returned 0.5 (float), not a list of 4 numbers"),
    (torch.tensor(0.5), "returned 0.5 (float), not a list of 4 numbers"),
    (np.float64(0.5), "returned 0.5 (float), not a list of 4 numbers"),
    ([], "returned 0 values for 4 completions"),
    ([1.0], "returned 1 values for 4 completions"),
    ([1.0] * 5, "returned 5 values for 4 completions"),
    (torch.ones(5), "returned 5 values for 4 completions"),
]


@pytest.mark.parametrize(("values", "message"), CONTAINERS, ids=[message for _, message in CONTAINERS])
def test_wrong_containers(values: Any, message: str) -> None:
    assert refusal(gives(values)) == (f"reward `r` {message}", EACH)


@pytest.mark.parametrize(("values", "message"), CONTAINERS, ids=[message for _, message in CONTAINERS])
def test_a_wrong_container_is_an_error_of_all_rows(
    values: Any, message: str, warnings: pytest.LogCaptureFixture
) -> None:
    assert raw(gives(values), on_error="skip") == [[None]] * 4
    assert warnings.messages == [f"reward `r` {message}; its rows stay unscored"]


def test_a_generator_is_no_list() -> None:
    message, _ = refusal(gives(value for value in range(4)))
    assert message.endswith("(generator), not a list of 4 numbers")


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


VALUES = [
    (float("nan"), "nan (float)"),
    (float("inf"), "inf (float)"),
    (float("-inf"), "-inf (float)"),
    (1e39, "1e+39 (float)"),
    (10**400, "1" + "0" * 58 + "… (int)"),
    ("0.5", "'0.5' (str)"),
    ("\x1b[2J", "'\\x1b[2J' (str)"),
    ([0.5], "[0.5] (list)"),
    ({}, "{} (dict)"),
    (1j, "1j (complex)"),
    (np.array([1.0, 2.0]), "array([1., 2.]) (ndarray)"),
    (torch.tensor(float("nan")), "tensor(nan) (Tensor)"),
    (Unspeakable(), "an object without a repr (Unspeakable)"),
]


@pytest.mark.parametrize(("value", "shown"), VALUES, ids=[shown for _, shown in VALUES])
def test_wrong_values(value: Any, shown: str, warnings: pytest.LogCaptureFixture) -> None:
    wrong = gives([1.0, 0.0, value, 1.0])
    assert refusal(wrong) == (
        f"reward `r` returned {shown} for row 2",
        "return a finite number, or None for 'not scored'",
    )
    assert raw(wrong, on_error="skip") == [[1.0], [0.0], [None], [1.0]]
    assert warnings.messages == [f"reward `r` returned {shown} for row 2; the row stays unscored"]


def test_a_table_is_a_list_of_wrong_values() -> None:
    assert refusal(gives(torch.ones(4, 1)))[0] == "reward `r` returned [1.0] (list) for row 0"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(ANYTHING, st.integers(1, 4))
def test_check_values_gives_storable_numbers_or_one_error(values: Any, num_rows: int) -> None:
    with contextlib.suppress(RewardError):
        checked = check_values("r", values, num_rows, "stop")
        assert len(checked) == num_rows
        assert all((value is None) == math.isnan(number) for value, number in zip(values, checked, strict=True))
        assert not torch.tensor(checked, dtype=torch.float32).isinf().any()


@given(st.lists(st.none() | st.floats(-1e38, 1e38), min_size=4, max_size=4))
def test_numbers_pass_unchanged(values: list[float | None]) -> None:
    assert raw(gives(values)) == [[value] for value in values]


def breaks(failure: BaseException) -> Callable[..., Any]:
    def function(completions: Sequence[str]) -> list[float]:
        raise failure

    return function


@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        (ValueError("bad\nsecond line"), "ValueError: bad"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_what_a_reward_raises(failure: BaseException, shown: str, warnings: pytest.LogCaptureFixture) -> None:
    line = breaks.__code__.co_firstlineno + 2
    message = f"reward `r` raised {shown} ({__file__}:{line})"
    assert refusal(reward(breaks(failure))) == (
        message,
        "fix the reward, or pass `--set scoring.on_error=skip` to leave its rows unscored",
    )
    assert raw(reward(breaks(failure)), gives([1, 1, 1, 1]), on_error="skip") == [[None, 1.0]] * 4
    assert warnings.messages == [f"{message}; its rows stay unscored"]


def test_a_reward_that_expects_chat_messages_is_told_that_completions_are_strings() -> None:
    def chats(completions: Sequence[str]) -> list[float]:
        return [float(bool(completion[0]["content"])) for completion in completions]  # type: ignore[call-overload]

    assert refusal(reward(chats))[1] == (
        "completions are strings here, not chat messages: read `completion`, not `completion[0]['content']`"
    )


def test_a_bad_value_is_named_with_the_line_of_its_prompt() -> None:
    with pytest.raises(RewardError) as error:
        check_values("r", [0.5, "x"], 2, "stop", ["train.jsonl:17", "train.jsonl:18"])
    assert error.value.message == "reward `r` returned 'x' (str) for row 1 (train.jsonl:18)"


def test_the_line_shown_is_the_rewards_own() -> None:
    def parses(completions: Sequence[str]) -> list[float]:
        return [Fraction(completion) for completion in completions]  # type: ignore[misc]

    message, _ = refusal(reward(parses))
    assert message == (
        "reward `r` raised ValueError: Invalid literal for Fraction: 'c00' "
        f"({__file__}:{parses.__code__.co_firstlineno + 1})"
    )


def test_the_line_of_a_class() -> None:
    class Judge:
        def __call__(self, completions: Sequence[str]) -> list[float]:
            return [float(completion) for completion in completions]

    message, _ = refusal(reward(Judge()))
    assert message.endswith(f"({__file__}:{Judge.__call__.__code__.co_firstlineno + 1})")


def test_a_reward_that_hangs(warnings: pytest.LogCaptureFixture) -> None:
    message = "reward `slow` did not return within 0.05 s for 4 completions"
    slow = reward(lambda completions: time.sleep(5), name="slow")
    start = time.monotonic()
    assert refusal(slow, time_limit=0.05) == (message, "make it faster, or raise `scoring.time_limit`")
    scores = score(rollouts(), [slow, gives([1, 2, 3, 4])], on_error="skip", time_limit=0.05)
    assert time.monotonic() - start < 2
    assert scores.raw[:, :, 0].isnan().all()
    assert scores.raw[:, :, 1].flatten().tolist() == [1, 2, 3, 4]
    assert warnings.messages == [f"{message}; its rows stay unscored"]
    assert all(0.0 <= seconds < 2 for seconds in scores.seconds)


def test_an_async_reward_that_hangs() -> None:
    async def slow(completions: Sequence[str]) -> list[float]:
        await asyncio.sleep(5)
        return [0.0] * 4

    assert refusal(reward(slow), time_limit=0.05)[0] == "reward `r` did not return within 0.05 s for 4 completions"


def test_a_hung_reward_does_not_keep_the_process_alive() -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(REWARDS / "run_hanging.py")], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "reward `hang` did not return within 0.1 s for 1 completions\n", done.stderr
    assert done.returncode == 0
    assert time.monotonic() - start < 50


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], bool]:
    """True as soon as a condition holds, False when it does not within a second."""

    def wait(condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + 1
        while not condition() and time.monotonic() < end:
            time.sleep(0.005)
        return condition()

    return wait


LIMIT = asyncio.Semaphore(1)  # made once, as a client of a judge would be


async def limited(completions: Sequence[str]) -> list[float]:
    async def judge(text: str) -> float:
        async with LIMIT:  # contended, so that it is bound to a loop
            await asyncio.sleep(0.001)
            return float(text[2])

    return await asyncio.gather(*(judge(text) for text in completions))


def test_what_an_async_reward_keeps_between_steps_stays_usable() -> None:
    for _ in range(3):
        assert raw(reward(limited)) == [[0.0], [1.0], [0.0], [1.0]]


def test_an_async_reward_out_of_time_is_cancelled(until: Callable[..., bool]) -> None:
    ended = []

    async def slow(completions: Sequence[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return [0.0] * 4

    assert raw(reward(slow), on_error="skip", time_limit=0.05) == [[None]] * 4
    assert until(lambda: ended == ["cancelled"])


def test_an_async_reward_is_cancelled_when_another_reward_stops_the_run(until: Callable[..., bool]) -> None:
    ended = []

    async def slow(completions: Sequence[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("ended")
        return [0.0] * 4

    def fails(completions: Sequence[str]) -> list[float]:
        time.sleep(0.1)
        raise ValueError("bad")

    start = time.monotonic()
    refusal(reward(fails, name="fails"), reward(slow, name="slow"))
    assert until(lambda: ended == ["ended"]) and time.monotonic() - start < 5


def test_what_is_awaited_too_late_is_cancelled_too(until: Callable[..., bool]) -> None:
    def slow(completions: Sequence[str]) -> Any:
        time.sleep(0.15)
        return asyncio.sleep(60)

    def running() -> bool:
        return any(thread.name == "reward late" for thread in threading.enumerate())

    assert raw(reward(slow, name="late"), on_error="skip", time_limit=0.02) == [[None]] * 4
    assert running()
    assert until(lambda: not running())


@pytest.mark.parametrize("failure", [ValueError("bad"), SystemExit("bad"), KeyboardInterrupt("bad")])
def test_an_async_reward_that_raises_leaves_the_others_running(failure: BaseException) -> None:
    async def fails(completions: Sequence[str]) -> list[float]:
        raise failure

    line = fails.__code__.co_firstlineno + 1
    assert refusal(reward(fails))[0] == f"reward `r` raised {type(failure).__name__}: bad ({__file__}:{line})"
    several = [reward(fails, name="fails"), reward(limited, name="limited")]
    assert raw(*several, on_error="skip") == [[None, 0.0], [None, 1.0], [None, 0.0], [None, 1.0]]


def test_a_reward_with_a_time_limit_of_its_own_is_told_to_drop_it() -> None:
    def parse() -> None:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        except ValueError as error:
            raise ValueError("parse does not support threads") from error  # as math_verify does

    def plain(completions: Sequence[str]) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def wrapped(completions: Sequence[str]) -> None:
        parse()

    hint = (
        "switch off the reward's own time limit (math_verify: `parsing_timeout=None`, `timeout_seconds=None`); "
        "`scoring.time_limit` bounds it"
    )
    message, found = refusal(reward(plain))
    assert message.startswith("reward `r` raised ValueError: signal only works in main thread") and found == hint
    message, found = refusal(reward(wrapped))
    assert message.startswith("reward `r` raised ValueError: parse does not support threads") and found == hint


def test_a_reward_runs_on_the_cuda_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append((threading.current_thread().name, device)))
    raw(gives([0.0] * 4), reward(limited, name="judge"))
    assert sorted(used) == [("async rewards", 3), ("reward judge", 3), ("reward r", 3)]


def test_rewards_overlap() -> None:
    async def asleep(completions: Sequence[str]) -> list[float]:
        await asyncio.sleep(0.3)
        return [1.0] * 4

    def waiting(completions: Sequence[str]) -> list[float]:
        time.sleep(0.3)
        return [2.0] * 4

    start = time.monotonic()
    several = [reward(function, name=f"r{n}") for n, function in enumerate((asleep, waiting, asleep, waiting, asleep))]
    assert raw(*several) == [[1.0, 2.0, 1.0, 2.0, 1.0]] * 4
    assert time.monotonic() - start < 1.2  # one after another: 1.5 s


def test_an_async_reward_runs_its_own_calls_at_once() -> None:
    async def judge(text: str) -> float:
        await asyncio.sleep(0.1)
        return float(text[1])

    async def rates(completions: Sequence[str]) -> list[float]:
        return await asyncio.gather(*(judge(text) for text in completions))

    start = time.monotonic()
    assert raw(reward(rates)) == [[0.0], [0.0], [1.0], [1.0]]
    assert time.monotonic() - start < 0.35


def test_a_reward_cannot_change_what_others_see_or_the_dataset() -> None:
    def vandal(completions: list[str], tests: list[Any], completion_ids: list[Any]) -> list[float]:
        for cell in tests:
            cell["cases"].append("mine")
        completions[:] = []
        tests.clear()
        completion_ids.clear()
        return [0.0] * 4

    def witness(completions: list[str], tests: list[Any]) -> list[float]:
        time.sleep(0.05)
        unharmed = completions == ["c00", "c01", "c10", "c11"] and tests == [{"cases": [1]}] * 4
        return [float(unharmed)] * 4

    given_rows = rollouts(tests=[{"cases": [1]}, {"cases": [1]}])
    for _ in range(2):
        first = reward(vandal, "completions", "tests", "completion_ids", name="vandal")
        scores = score(given_rows, [first, reward(witness, "completions", "tests")])
        assert scores.raw[:, :, 1].flatten().tolist() == [1.0] * 4
    assert given_rows.prompts[0].columns == {"tests": {"cases": [1]}}


def test_a_reward_that_seeds_the_generators_changes_no_other_reward() -> None:
    def seeds(completions: Sequence[str]) -> list[float]:
        torch.manual_seed(0)
        random.seed(0)
        return [0.0] * len(completions)

    first = raw(reward(seeds), gives([1, 2, 3, 4]))
    assert first == raw(gives([0] * 4), gives([1, 2, 3, 4]))


def test_what_a_reward_prints_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def talks(completions: Sequence[str]) -> list[float]:
        print("hello")
        return [0.0] * len(completions)

    assert raw(reward(talks)) == [[0.0]] * 4
    assert capsys.readouterr().out == "hello\n"


def test_the_data_a_reward_may_ask_for() -> None:
    data = bind_data(rollouts(answer=["x", "y"]))
    assert set(data) == {*BUILTIN_DATA, "answer"}
    assert data["completions"] == ["c00", "c01", "c10", "c11"]
    assert data["prompts"] == ["p0", "p0", "p1", "p1"]
    assert data["completion_ids"] == [(7,), (7, 7), (7,), (7, 7)]
    assert data["finish_reasons"] == ["length", "stop", "length", "stop"]
    assert data["temperatures"] == [1.0, 2.0, 1.0, 2.0]
    assert data["max_completion_length"] == 9
    assert data["answer"] == ["x", "x", "y", "y"]


def test_no_dataset_column_shadows_the_runs_own_data() -> None:
    shadows: dict[str, Any] = {name: ["theirs", "theirs"] for name in BUILTIN_DATA}
    assert bind_data(rollouts(**shadows)) | {"rollouts": 0} == bind_data(rollouts()) | {"rollouts": 0}


NAN = float("nan")


def test_gates() -> None:
    """Right pays, wrong is 0, and where the gate was not scored nobody knows."""
    given_raw = torch.tensor([[[1.0, 0.5], [0.0, 0.5], [NAN, 0.5], [1.0, NAN], [0.99, 0.5], [2.0, -0.5]]])
    gated = apply_gates(given_raw, [reward(len, name="math"), reward(len, name="brevity", gate="math")])
    assert gated[0, :, 0].nan_to_num(nan=-9).tolist() == pytest.approx([1.0, 0.0, -9, 1.0, 0.99, 2.0])
    assert gated[0, :, 1].nan_to_num(nan=-9).tolist() == [0.5, 0.0, -9, -9, 0.0, -0.5]


def test_raw_rewards_are_kept_beside_gated_ones() -> None:
    rewards = [
        reward(lambda completions: [1, 0, 1, 0], name="math"),
        reward(lambda completions: [0.5] * 4, name="brevity", gate="math"),
    ]
    scores = score(rollouts(), rewards)
    assert scores.names == ("math", "brevity")
    assert scores.raw[:, :, 1].flatten().tolist() == [0.5] * 4
    assert scores.rewards[:, :, 1].flatten().tolist() == [0.5, 0.0, 0.5, 0.0]
    assert scores.total().flatten().tolist() == [1.5, 0.0, 1.5, 0.0]


def test_rewards_keep_float64() -> None:
    scores = score(rollouts(), [gives([0.1, 0.2, 0.3, 1e-300])])
    assert scores.raw.flatten().tolist() == scores.rewards.flatten().tolist() == [0.1, 0.2, 0.3, 1e-300]
    assert scores.weights.dtype == scores.rewards.dtype == scores.raw.dtype == torch.float64


def test_rewards_are_prompt_major() -> None:
    assert score(rollouts(), [gives([1, 2, 3, 4])]).rewards.tolist() == [[[1.0], [2.0]], [[3.0], [4.0]]]


def test_the_ledger_divides_the_advantage() -> None:
    rewards = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    scores = Scores(names=("a", "b"), rewards=rewards, raw=rewards, weights=weights, seconds=(0.0, 0.0))
    # Centred: a is +-0.5, b is -+0.25, together +-0.25; an advantage of 1 is 2 from a and -1 from b.
    shares = ledger(scores, torch.tensor([[1.0, -1.0]]))
    assert shares.tolist() == [[[2.0, -1.0], [-2.0, 1.0]]]


def test_the_ledger_of_a_group_without_spread_is_zero() -> None:
    rewards = torch.ones(1, 2, 1, dtype=torch.float64)
    scores = Scores(names=("a",), rewards=rewards, raw=rewards, weights=rewards[0, 0], seconds=(0.0,))
    assert ledger(scores, torch.zeros(1, 2)).tolist() == [[[0.0], [0.0]]]
