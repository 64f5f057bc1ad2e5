"""Measuring: what counts as right, over which problems, under which names."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from grpoforge.declarations import declares
from grpoforge.distributed import Workers
from grpoforge.errors import RewardError
from grpoforge.evaluation import Evaluation
from grpoforge.measure import examine
from grpoforge.metrics import Totals
from grpoforge.policy import Policy
from grpoforge.scoring import BoundReward
from grpoforge.types import PolicyView, Prompt, Rollouts
from grpoforge_plugins.samplers.hf import HFSampler


class Echo:
    """Answers every prompt with its own tokens; sampled answers say them twice."""

    def __init__(self, make_rollouts: Callable[..., Rollouts]) -> None:
        self.make_rollouts = make_rollouts
        self.seeds: list[int] = []
        self.sizes: list[int] = []

    def greedy(self, policy: PolicyView, prompts: Sequence[Prompt]) -> Rollouts:
        self.sizes.append(len(prompts))
        return self._rollouts(prompts, [[list(prompt.token_ids)] for prompt in prompts])

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
        self.seeds.append(seed)
        return self._rollouts(prompts, [[list(prompt.token_ids) * 2] * group_size for prompt in prompts])

    def _rollouts(self, prompts: Sequence[Prompt], ids: list[list[list[int]]]) -> Rollouts:
        rollouts = self.make_rollouts([list(prompt.token_ids) for prompt in prompts], ids)
        return dataclasses.replace(rollouts, prompts=tuple(prompts))

    def sync(self, policy: PolicyView) -> None: ...


class Pretend(Workers):
    """One of several processes, with the sums of all of them."""

    def sum_totals(self, totals: Totals) -> Totals:
        return totals


EOS = 1


def starts_with_a(completions: Sequence[str]) -> list[float | None]:
    """1.0 for ``a...``, not scored for ``z...``."""
    return [None if text.startswith("v") else float(text.startswith("a")) for text in completions]


def length(completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture
def prompts(make_prompts: Callable[..., tuple[Prompt, ...]]) -> tuple[Prompt, ...]:
    return make_prompts([[2, 3], [3], [2], [23, 4], [2, 2, 2]])  # ab, b, a, v (not scored), aaa


@pytest.fixture
def make_evaluation(prompts: tuple[Prompt, ...], make_rollouts: Callable[..., Rollouts]) -> Callable[..., Evaluation]:
    def build(**changes: Any) -> Evaluation:
        parts: dict[str, Any] = {
            "prompts": prompts,
            "sampler": Echo(make_rollouts),
            "rewards": [
                BoundReward(name="right", function=starts_with_a, data=("completions",), weight=1.0),
                BoundReward(name="length", function=length, data=("completions",), weight=0.1),
            ],
            "correctness": "right",
            "question": "row",
            "samples": 0,
            "ks": (1, 2),
            "batch_size": 2,
            "seed": 3,
            "workers": Workers(),
            "on_reward_error": "stop",
            "reward_time_limit": 60.0,
        }
        return Evaluation(**(parts | changes))

    return build


def test_greedy_figures(make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]) -> None:
    evaluation = make_evaluation()
    found = evaluation.measure(tiny_policy())
    assert found == pytest.approx(
        {
            "eval_pass@1": 3 / 5,  # the completion that was not scored counts as wrong
            "eval_rewards/right/mean": 3 / 4,  # over the scored ones
            "eval_rewards/length/mean": (2 + 1 + 1 + 2 + 3) / 5,
            "eval_reward": (1.2 + 0.1 + 1.1 + 0.2 + 1.3) / 5,
            "eval_completions/mean_length": 9 / 5,
            "eval_completions/clipped_ratio": 1.0,
        }
    )
    assert next(iter(found)) == "eval_pass@1"  # the line on the screen begins with it
    assert evaluation.sampler.sizes == [2, 2, 1]  # type: ignore[attr-defined]


def test_sampled_figures_stand_beside_the_greedy_ones(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]
) -> None:
    found = make_evaluation(samples=4).measure(tiny_policy())
    assert found["eval_pass@1"] == found["eval_mean@4"] == 3 / 5
    assert found["eval_rewards/length/mean"] == 9 / 5
    assert found["eval_sampled_rewards/length/mean"] == 18 / 5


def test_samples_have_the_same_seeds_at_every_call(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]
) -> None:
    evaluation = make_evaluation(samples=1)
    for _ in range(2):
        evaluation.measure(tiny_policy())
    seeds = evaluation.sampler.seeds  # type: ignore[attr-defined]
    assert len(seeds) == 6 and seeds[:3] == seeds[3:] and len(set(seeds)) == 3


def test_a_real_policy_measured_twice_gives_the_same_figures(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]
) -> None:
    evaluation = make_evaluation(sampler=HFSampler(max_completion_length=4), samples=2)
    policy = tiny_policy()
    assert evaluation.measure(policy) == evaluation.measure(policy)


class Threads(Workers):
    """One of two workers in one process, a thread each, that really add and gather."""

    def __init__(self, rank: int, board: dict[str, list[object]], barrier: threading.Barrier) -> None:
        super().__init__(rank, 2)
        object.__setattr__(self, "meet", barrier)
        object.__setattr__(self, "board", board)

    def _exchange(self, mine: object) -> list[Any]:
        self.board[self.rank] = mine  # type: ignore[attr-defined]
        self.meet.wait()  # type: ignore[attr-defined]
        found = [self.board[rank] for rank in (0, 1)]  # type: ignore[attr-defined]
        self.meet.wait()  # type: ignore[attr-defined]
        return found

    def sum_totals(self, totals: Totals) -> Totals:
        first, second = self._exchange(totals)
        assert set(first) == set(second)
        return {name: (first[name][0] + second[name][0], first[name][1] + second[name][1]) for name in first}

    def gather_values(self, values: Sequence[Any]) -> list[Any]:
        return [value for part in self._exchange(list(values)) for value in part]


class Dice(Echo):
    """Sampled answers are letters, drawn from the seed and the place in what is drawn at once."""

    def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
        generator = random.Random(seed)
        ids = [[[generator.choice([2, 2, 3, 23]), EOS] for _ in range(group_size)] for _ in prompts]
        return self._rollouts(prompts, ids)


@declares(answer_of=lambda text: text or None)
def starts_with_a_and_says_what_it_reads(completions: Sequence[str]) -> list[float | None]:
    """`starts_with_a` whose answer is the whole text."""
    return starts_with_a(completions)


READS = [BoundReward(name="right", function=starts_with_a_and_says_what_it_reads, data=("completions",), weight=1.0)]


@pytest.mark.parametrize("num_problems", [1, 2, 5])
def test_two_workers_find_what_one_finds(
    make_evaluation: Callable[..., Evaluation],
    tiny_policy: Callable[..., Policy],
    make_rollouts: Callable[..., Rollouts],
    prompts: tuple[Prompt, ...],
    num_problems: int,
) -> None:
    # Blocks of one problem: 4 completions decoded at a time, 4 samples each.
    parts = {"rewards": READS, "samples": 4, "ks": (1, 2, 4), "batch_size": 4, "prompts": prompts[:num_problems]}
    policy = tiny_policy()
    alone = make_evaluation(sampler=Dice(make_rollouts), **parts)
    metrics, outcomes = examine(alone, policy)
    assert len(outcomes) == num_problems
    board: dict[str, list[object]] = {}
    barrier = threading.Barrier(2, timeout=20)
    with ThreadPoolExecutor(2) as pool:
        evaluations = [
            make_evaluation(sampler=Dice(make_rollouts), workers=Threads(rank, board, barrier), **parts)
            for rank in (0, 1)
        ]
        found = list(pool.map(lambda evaluation: examine(evaluation, policy), evaluations))
    for its_metrics, its_outcomes in found:
        assert its_metrics == pytest.approx(metrics, abs=1e-15)
        assert its_outcomes == outcomes


def test_figures_of_samples_by_hand(
    make_evaluation: Callable[..., Evaluation],
    tiny_policy: Callable[..., Policy],
    make_rollouts: Callable[..., Rollouts],
    prompts: tuple[Prompt, ...],
) -> None:
    class Fixed(Echo):
        """Four samples of ``ab``: a, a, b and nothing; four of ``b``: b, a, nothing, nothing (one cut)."""

        def sample(self, policy: PolicyView, prompts: Sequence[Prompt], group_size: int, seed: int) -> Rollouts:
            return self._rollouts(prompts, [[[2, EOS], [2, EOS], [3, EOS], [EOS]], [[3, EOS], [2, EOS], [EOS], [EOS]]])

    evaluation = make_evaluation(
        sampler=Fixed(make_rollouts), rewards=READS, samples=4, ks=(1, 2, 4), batch_size=8, prompts=prompts[:2]
    )
    found = evaluation.examine(tiny_policy())
    assert found.metrics["eval_mean@4"] == (2 / 4 + 1 / 4) / 2
    # 1 - C(2, 2) / C(4, 2) and 1 - C(3, 2) / C(4, 2).
    assert found.metrics["eval_pass@2"] == (5 / 6 + 3 / 6) / 2
    assert found.metrics["eval_pass@4"] == 1.0
    # Pairs of a a b -: aa 1, ab twice 1/2, a- twice 1, b- 0. Of b a - -: ba 1/2, b- twice 0, a- twice 1, -- 0.
    assert found.metrics["eval_maj@2"] == pytest.approx((4 / 6 + 2.5 / 6) / 2, abs=1e-15)
    assert found.metrics["eval_maj@4"] == (1.0 + 0.5) / 2
    assert found.metrics["eval_sampled_completions/no_answer_ratio"] == 3 / 8
    verdicts = [[sample.verdict for sample in outcome.samples] for outcome in found.outcomes]
    assert verdicts == [["right", "right", "wrong", "no answer"], ["wrong", "right", "no answer", "no answer"]]


def test_a_reward_that_reads_no_answers_counts_no_votes(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]
) -> None:
    found = make_evaluation(samples=2).examine(tiny_policy())
    assert "eval_pass@2" in found.metrics
    assert not [name for name in found.metrics if "maj@" in name or "no_answer" in name]
    assert {outcome.greedy.answer for outcome in found.outcomes} == {None}
    assert [outcome.greedy.verdict for outcome in found.outcomes] == [
        *("right", "truncated", "right", "not scored", "right")
    ]


def test_what_a_problem_is(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy], prompts: tuple[Prompt, ...]
) -> None:
    def judged(completions: Sequence[str], answer: Sequence[object] = (), extra: Sequence[object] = ()) -> list[float]:
        return [1.0 for _ in completions]

    columns = {"row": "how many?", "answer": 7, "extra": "x", "unread": None}
    prompt = dataclasses.replace(prompts[0], columns=columns, origin="test.jsonl:4", index=3)
    one = {"function": judged, "weight": 1.0, "name": "right"}

    def outcome(**changes: Any) -> Any:
        reads = changes.pop("reads", ("completions", "answer"))
        asked = dataclasses.replace(prompt, **changes)
        evaluation = make_evaluation(prompts=[asked], rewards=[BoundReward(data=reads, **one)])
        return evaluation.examine(tiny_policy()).outcomes[0]

    found = outcome()
    assert (found.index, found.origin, found.question, found.gold) == (3, "test.jsonl:4", "how many?", "7")
    # Where it stands and what nobody reads make no other problem; question and gold do.
    assert outcome(index=9, origin="elsewhere:1", columns=columns | {"unread": 1}).problem == found.problem
    others = [outcome(columns=columns | {name: "other"}).problem for name in ("row", "answer")]
    assert len({found.problem, *others}) == 3
    assert outcome(reads=("completions", "answer", "extra")).gold == '{"answer": 7, "extra": "x"}'
    assert outcome(reads=("completions",)).gold == ""


@pytest.mark.parametrize(
    ("answer_of", "said"),
    [(lambda text: text[100], "raised IndexError: string index out of range"), (lambda text: 7, "returned a int")],
)
def test_answers_that_cannot_be_had(
    make_evaluation: Callable[..., Evaluation],
    tiny_policy: Callable[..., Policy],
    caplog: pytest.LogCaptureFixture,
    answer_of: Callable[[str], Any],
    said: str,
) -> None:
    @declares(answer_of=answer_of)
    def right(completions: Sequence[str]) -> list[float]:
        return [0.0 for _ in completions]

    rewards = [BoundReward(name="right", function=right, data=("completions",), weight=1.0)]
    with pytest.raises(RewardError) as error:
        make_evaluation(rewards=rewards).measure(tiny_policy())
    assert error.value.message == f"`answer_of` of reward `right` {said}"
    assert error.value.hint == "return the answer as a string, or None"
    found = make_evaluation(rewards=rewards, on_reward_error="skip").measure(tiny_policy())
    assert found["eval_completions/no_answer_ratio"] == 1.0
    assert f"`answer_of` of reward `right` {said}" in caplog.text


def test_processes_share_the_problems(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy]
) -> None:
    parts = [make_evaluation(workers=Pretend(rank, 2)).measure(tiny_policy()) for rank in (0, 1)]
    # Rank 0 has ab, a, aaa; rank 1 has b, v.
    assert [part["eval_pass@1"] for part in parts] == [1.0, 0.0]


def test_a_process_without_problems_reports_the_same_names(
    make_evaluation: Callable[..., Evaluation], tiny_policy: Callable[..., Policy], prompts: tuple[Prompt, ...]
) -> None:
    # Sums over processes are taken name by name: a process with other names would hang the others.
    few = {"prompts": prompts[:1], "samples": 1}
    names = [set(make_evaluation(workers=Pretend(rank, 2), **few).measure(tiny_policy())) for rank in (0, 1)]
    assert names[0] == names[1]
