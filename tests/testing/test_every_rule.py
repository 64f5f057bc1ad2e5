"""Components with a fault, and the rule that must name it: every rule of every kind has one that breaks it."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from grpoforge.registry import Kind, make_component
from grpoforge.testing import (
    advantages,
    check_component,
    corrections,
    datasets,
    general,
    kl,
    losses,
    rewards,
    samplers,
    trackers,
)
from grpoforge.testing.kit import Subject
from grpoforge.types import LossInputs, Rollouts
from grpoforge_plugins.advantages.group import group_mean
from grpoforge_plugins.samplers.hf import HFSampler

calls = itertools.count()


def first_gets_more(completions: list[str]) -> list[float]:
    return [float(row == 0) for row in range(len(completions))]


def against_the_mean(completions: list[str]) -> list[float]:
    mean = sum(map(len, completions)) / len(completions)
    return [float(len(text) > mean) for text in completions]


def noisy(completions: list[str]) -> list[float]:
    return [random.random() for _ in completions]


def divides_by_words(completions: list[str]) -> list[float]:
    return [1 / len(text.split()) for text in completions]


def reads_numbers(completions: list[str]) -> list[float]:
    words = [word.strip(".,\n#") for text in completions for word in text.split()[-1:]]
    return [float(int(word) > 0) if word.isdigit() else 0.0 for word in words]


def one_too_many(completions: list[str]) -> list[float]:
    return [0.0] * (len(completions) + 1)


def wrong_if_unreadable(completions: list[str], answer: list[str]) -> list[float]:
    return [
        float(gold[-1:].isdigit() and gold.split()[-1] in text) for text, gold in zip(completions, answer, strict=True)
    ]


class Forgetful:
    """Counts its calls and saves something else."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, completions: list[str]) -> list[float]:
        self.count += 1
        return [float(self.count) for _ in completions]

    def state_dict(self) -> dict[str, Any]:
        return {"name": "forgetful"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["name"] == "forgetful"


def slow(rewards: Tensor, weights: Tensor) -> Tensor:
    time.sleep(0.03)
    return group_mean(rewards, weights)


def asks_for_more(rewards: Tensor, weights: Tensor, answer: Any) -> Tensor:
    return group_mean(rewards, weights)


def transposed(rewards: Tensor, weights: Tensor) -> Tensor:
    return group_mean(rewards, weights).T


def by_place(rewards: Tensor, weights: Tensor) -> Tensor:
    advantages = group_mean(rewards, weights)
    return advantages * torch.arange(1, len(advantages) + 1, dtype=torch.float64)[:, None]


def all_or_nothing(rewards: Tensor, weights: Tensor) -> Tensor:
    total = (rewards * weights).sum(dim=2)
    unscored = rewards.isnan().all(dim=2)
    return torch.where(unscored, 0.0, total - total.masked_fill(unscored, 0.0).sum() / (~unscored).sum())


def squares(rewards: Tensor, weights: Tensor) -> Tensor:
    advantages = group_mean(rewards, weights)
    return advantages**31 * 1e10


def drifting(rewards: Tensor, weights: Tensor) -> Tensor:
    return group_mean(rewards, weights) * (1 + next(calls))


def two_inputs(inputs: LossInputs, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    return -inputs.ratio * inputs.advantages, {}


def one_number(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return (-inputs.ratio * inputs.advantages).mean(), {}


def double_always(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return (-inputs.ratio * inputs.advantages).double(), {}


def by_row(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    place = torch.arange(len(inputs.ratio), dtype=inputs.ratio.dtype)[:, None]
    return -inputs.ratio * inputs.advantages * (1 + place), {}


def by_width(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return -inputs.ratio * inputs.advantages * inputs.ratio.shape[1], {}


def reinforce_backwards(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return inputs.ratio * inputs.advantages, {}


def unrelated(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return -inputs.ratio.detach() * inputs.advantages, {}


def edits_masked(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    ratio = (inputs.logprobs - inputs.old_logprobs).exp() * inputs.completion_mask
    return -ratio * inputs.advantages, {}


class StuckLoss:
    """Saves what no checkpoint can hold."""

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        return -inputs.ratio * inputs.advantages, {}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {1, 2}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def mixed(logprobs: Tensor, distribution: Tensor) -> Tensor:
    return logprobs


def shifted(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return logprobs - ref_logprobs + 1e-3


def averaged(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    difference = logprobs - ref_logprobs
    return difference - difference.mean()


def row_mean(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    difference = logprobs - ref_logprobs
    return difference.mean(dim=1, keepdim=True).expand_as(difference)


def by_length(logprobs: Tensor, ref_logprobs: Tensor, completion_mask: Tensor) -> Tensor:
    return (logprobs - ref_logprobs) / completion_mask.sum(dim=1, keepdim=True).min()


def root(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return (logprobs - ref_logprobs).square().sqrt()


def half(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return 0.5 * (logprobs - ref_logprobs).square()


half.unbiased = True  # type: ignore[attr-defined]


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def turned(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    difference: Tensor = Backward.apply(logprobs) - ref_logprobs  # type: ignore[no-untyped-call]
    return difference


def endless(old_logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    return (old_logprobs - sampling_logprobs).exp()


def negative(old_logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    return (old_logprobs - sampling_logprobs).clamp(-1, 1)


def never_1(old_logprobs: Tensor) -> Tensor:
    return torch.full_like(old_logprobs, 0.5)


class OneShort(HFSampler):
    def sample(self, policy: Any, prompts: Any, group_size: int, seed: int) -> Rollouts:
        return super().sample(policy, prompts, group_size - 1 or 1, seed)


def changed(rollouts: Rollouts, **values: Any) -> Rollouts:
    """The rollouts with fields of every completion replaced."""
    groups = tuple(tuple(replace(one, **values) for one in group) for group in rollouts.completions)
    return replace(rollouts, completions=groups)


class OldVersion(HFSampler):
    def sample(self, policy: Any, prompts: Any, group_size: int, seed: int) -> Rollouts:
        return changed(super().sample(policy, prompts, group_size, seed), policy_version=7)


class WrongTemperature(HFSampler):
    def sample(self, policy: Any, prompts: Any, group_size: int, seed: int) -> Rollouts:
        return changed(super().sample(policy, prompts, group_size, seed), temperature=0.7)


class Unseeded(HFSampler):
    def sample(self, policy: Any, prompts: Any, group_size: int, seed: int) -> Rollouts:
        return super().sample(policy, prompts, group_size, int(torch.randint(1000, ())))


class OneSeed(HFSampler):
    def sample(self, policy: Any, prompts: Any, group_size: int, seed: int) -> Rollouts:
        return super().sample(policy, prompts, group_size, 0)


class GreedyBySampling(HFSampler):
    def greedy(self, policy: Any, prompts: Any) -> Rollouts:
        return super().sample(policy, prompts, 1, 3)


class NeedsTwo(HFSampler):
    def sample(self, policy: Any, prompts: Any, group_size: int, seed: int) -> Rollouts:
        if len(prompts) < 2:
            raise IndexError("prompts[1]")
        return super().sample(policy, prompts, group_size, seed)


class Quiet:
    """A tracker without a fault."""

    closed: ClassVar[bool] = False

    def __init__(self, run: Any) -> None:
        self.run = run

    def step_finished(self, report: Any) -> None:
        """Nothing."""

    def evaluated(self, step: int, metrics: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class NoRun(Quiet):
    def __init__(self) -> None:
        super().__init__(None)


class Demanding(Quiet):
    def step_finished(self, report: Any) -> None:
        report.metrics["my/metric"]


class Loud(Quiet):
    def step_finished(self, report: Any) -> None:
        print("step", report.step)


class Raw(Quiet):
    def step_finished(self, report: Any) -> None:
        import sys

        sys.stderr.write("".join(one.text for one in report.rollouts.flat()))


class Rounds(Quiet):
    def step_finished(self, report: Any) -> None:
        self.loss = round(report.metrics["loss"])


class ClosesOnce(Quiet):
    def close(self) -> None:
        assert not self.closed
        self.closed = True  # type: ignore[misc]


class Exclusive(Quiet):
    def __init__(self, run: Any) -> None:
        (run.run_dir / "mine").mkdir()


class Edits(Quiet):
    def step_finished(self, report: Any) -> None:
        report.advantages.zero_()


def tuples(split: str) -> list[Any]:
    return [("question", split)]


def uneven(split: str) -> list[dict[str, str]]:
    return [{"question": f"{split} 1"}, {"question": f"{split} 2", "answer": "2"}]


def shuffled(split: str) -> list[dict[str, str]]:
    return [{"question": f"{split} {random.random()}"}]


def one_list(split: str) -> list[dict[str, str]]:
    return [{"question": "1"}, {"question": "2"}]


def inner() -> Callable[..., Any]:
    """A function that no other process can find."""

    def local(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    return local


def inner_class(base: type) -> type:
    """A class that no other process can find."""

    class Local(base):  # type: ignore[misc]
        """As its base."""

    return Local


FAULTS: dict[Kind, list[tuple[str, Callable[..., Any]]]] = {
    "reward": [
        ("returns", one_too_many),
        ("deterministic", noisy),
        ("order", first_gets_more),
        ("alone", against_the_mean),
        ("empty_completion", divides_by_words),
        ("hostile_text", reads_numbers),
        ("abstains", wrong_if_unreadable),
        ("state", Forgetful),
        ("travels", inner()),
    ],
    "advantage": [
        ("signature", asks_for_more),
        ("returns", transposed),
        ("deterministic", drifting),
        ("group_order", by_place),
        ("partly_scored_row", all_or_nothing),
        ("extremes_are_finite", squares),
    ],
    "loss": [
        ("signature", two_inputs),
        ("returns", one_number),
        ("keeps_dtype", double_always),
        ("row_order", by_row),
        ("padding", by_width),
        ("masked_tokens", edits_masked),
        ("on_policy_gradient", reinforce_backwards),
        ("gradient_is_the_slope", unrelated),
        ("state", StuckLoss),
    ],
    "kl": [
        ("signature", mixed),
        ("zero_when_equal", shifted),
        ("rows_alone", averaged),
        ("coupling", averaged),
        ("padding", row_mean),
        ("empty_row", by_length),
        ("finite_gradient", root),
        ("mean_over_the_policy", half),
        ("gradient_is_the_slope", turned),
    ],
    "correction": [
        ("bounded_far_off_policy", endless),
        ("returns", negative),
        ("on_policy_weight_is_1", never_1),
    ],
    "sampler": [
        ("returns", OneShort),
        ("completions", OldVersion),
        ("logprobs", WrongTemperature),
        ("seeds", Unseeded),
        ("seeds", OneSeed),
        ("global_state", Unseeded),
        ("greedy", GreedyBySampling),
        ("batch_of_one", NeedsTwo),
        ("travels", inner_class(HFSampler)),
    ],
    "tracker": [
        ("signature", NoRun),
        ("a_whole_run", Demanding),
        ("quiet_on_stdout", Loud),
        ("hostile_text", Raw),
        ("odd_numbers", Rounds),
        ("close_twice", ClosesOnce),
        ("resumed", Exclusive),
        ("leaves_report_alone", Edits),
        ("travels", inner_class(Quiet)),
    ],
    "dataset": [
        ("returns", tuples),
        ("columns", uneven),
        ("deterministic", shuffled),
        ("splits_apart", one_list),
    ],
}
CASES = [(kind, rule, factory) for kind, faults in FAULTS.items() for rule, factory in faults]


@pytest.mark.parametrize(("kind", "rule", "factory"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_the_rule_names_the_fault(kind: Kind, rule: str, factory: Callable[..., Any]) -> None:
    report = check_component(make_component(kind, "faulty", "tests", factory))
    assert rule in {one.rule for one in report.broken}, report


ELSEWHERE = {
    # By the broken examples.
    "reward": {"quick"},
    "advantage": {
        *("float64", "leaves_data_alone", "row_order", "unscored_row_is_0", "unscored_rows_do_not_count"),
        *("equal_totals_get_0", "batch_of_one", "invariances"),
        *("state", "travels", "quick"),
    },
    "loss": {
        *("deterministic", "leaves_data_alone", "rows_alone", "coupling", "normalizes_nothing", "empty_row"),
        *("travels", "quick"),
    },
    # The same rules as for losses and advantages.
    "kl": {"returns", "keeps_dtype", "deterministic", "leaves_data_alone", "row_order", "state", "travels", "quick"},
    "correction": {
        *("signature", "keeps_dtype", "deterministic", "leaves_data_alone", "row_order", "rows_alone", "coupling"),
        *("padding", "empty_row", "state", "travels", "quick"),
    },
    "sampler": {"quick"},
    "tracker": set[str](),
    "dataset": {"travels", "quick"},
}
RULES = {
    "reward": rewards.RULES,
    "advantage": advantages.RULES,
    "loss": losses.RULES,
    "kl": kl.RULES,
    "correction": corrections.RULES,
    "sampler": samplers.RULES,
    "tracker": trackers.RULES,
    "dataset": datasets.RULES,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_every_rule_has_a_fault_that_breaks_it(kind: Kind) -> None:
    names = {one.name for one in RULES[kind]}
    assert names == {rule for rule, _ in FAULTS[kind]} | ELSEWHERE[kind]


def test_a_slow_component_is_named() -> None:
    class Impatient(advantages.AdvantageSubject):
        seconds = 0.01

    subject: Subject = Impatient(component=make_component("advantage", "slow", "tests", slow))
    finding = general.quick.examine(subject)
    assert (finding.status, finding.detail) == ("failed", "it took 0.0 s, more than 0.01 s")
