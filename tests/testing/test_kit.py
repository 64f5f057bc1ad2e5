"""How reports read, what is compared, and what the kit lets pass: stop-gradients, states, declared exceptions."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from grpoforge.declarations import declares
from grpoforge.errors import ConfigError, PluginError
from grpoforge.registry import make_component
from grpoforge.testing import (
    Finding,
    Report,
    check_advantage,
    check_component,
    check_correction,
    check_dataset,
    check_kl,
    check_loss,
    check_reward,
    check_sampler,
    check_tracker,
)
from grpoforge.testing.gradients import compare_slopes
from grpoforge.testing.kit import Broken, NotApplicable, Subject, difference, examine, foreign, rule
from grpoforge.types import Coupling, LossInputs
from grpoforge_plugins.advantages.group import group_mean
from grpoforge_plugins.advantages.paired import Paired
from grpoforge_plugins.corrections import truncate
from grpoforge_plugins.corrections.target import TargetSequenceMask, TargetTIS
from grpoforge_plugins.datasets.tiny_math import tiny_math
from grpoforge_plugins.kl.schulman import k1, k3
from grpoforge_plugins.losses.clip import Clip
from grpoforge_plugins.rewards.math import Math
from grpoforge_plugins.samplers.hf import HFSampler
from grpoforge_plugins.samplers.paired import PairedSampler
from grpoforge_plugins.trackers.jsonl import Jsonl

NAN = math.nan


def finding(report: Report, name: str) -> tuple[str, str]:
    """Status and detail of one rule."""
    (one,) = [one for one in report.findings if one.rule == name]
    return one.status, one.detail


def names(report: Report) -> list[str]:
    return [one.rule for one in report.broken]


def test_each_kind_has_a_function_that_takes_what_a_plugin_registers() -> None:
    reports = [
        check_reward(Math, extraction="lenient"),
        check_advantage(group_mean),
        check_loss(Clip, epsilon_high=0.28),
        check_kl(k3),
        check_correction(truncate.tis, cap=1.5),
        check_sampler(HFSampler, temperature=0.7),
        check_tracker(Jsonl),
        check_dataset(tiny_math, num_train=8, num_test=4),
    ]
    kinds = ["reward", "advantage", "loss", "kl", "correction", "sampler", "tracker", "dataset"]
    assert [report.kind for report in reports] == kinds
    for report in reports:
        assert report.kept, report


def test_options_are_checked_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="unknown option `epsilon` of loss"):
        check_component(make_component("loss", "clip", "x", Clip), {"epsilon": 0.2})
    with pytest.raises(PluginError, match="hide a misspelled option"):
        check_advantage(lambda rewards, **options: rewards)


def test_a_report_reads_as_text_and_as_json() -> None:
    good = Finding(rule="good", promise="It is good.", hint="be good", status="passed", detail="so it is")
    bad = Finding(rule="bad", promise="It is not bad.", hint="do better", status="failed", detail="2 is\x1b[31m 3")
    away = Finding(rule="away", promise="It is here.", hint="come", status="not applicable", detail="it is away")
    report = Report(kind="loss", component="x:y", source="./x.py:3", findings=(good, bad, away))
    assert str(report).splitlines() == [
        "loss x:y  ./x.py:3",
        "  passed  good  so it is",
        "  BROKEN  bad   2 is\\x1b[31m 3",
        "                It is not bad.",
        "                hint: do better",
        "  n/a     away  it is away",
    ]
    assert not report.kept and report.broken == (bad,)
    document = json.loads(json.dumps(report.as_json()))
    assert (document["id"], document["kept"], len(document["findings"])) == ("x:y", False, 3)
    assert document["findings"][1] == {
        "rule": "bad",
        "promise": "It is not bad.",
        "hint": "do better",
        "status": "failed",
        "detail": "2 is\x1b[31m 3",
    }


@pytest.mark.parametrize(
    ("found", "expected", "tolerance", "text"),
    [
        (1.0, 1.0, 0.0, ""),
        (NAN, NAN, 0.0, ""),
        (NAN, 1.0, 1.0, "nan against 1.0"),
        (1.0, 1.1, 0.1, ""),
        ([1, [2.0, 3.0]], [1, [2.0, 4.0]], 0.0, "[1][1] 3.0 against 4.0"),
        ([1], [1, 2], 0.0, "1 values against 2"),
        ({"a": 1}, {"b": 1}, 0.0, "keys ['a'] against ['b']"),
        ({"a": "x"}, {"a": "y"}, 0.0, "`a` 'x' against 'y'"),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 0.0, ""),
        (torch.tensor([math.inf]), torch.tensor([math.inf]), 0.0, ""),
        (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]), 0.1, "[0, 1] is 2, not 3"),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 0.0]), 9.0, "[1] is nan, not 0"),
        (torch.zeros(2, 1), torch.zeros(2), 0.0, "shape [2, 1] against [2]"),
        (torch.zeros(0), torch.zeros(0), 0.0, ""),
    ],
)
def test_differences(found: Any, expected: Any, tolerance: float, text: str) -> None:
    assert difference(found, expected, tolerance) == text


class Nothing(Subject):
    """A subject for rules that ask nothing."""

    def question(self) -> Any:
        return None

    def answer(self, built: Any, question: Any) -> Any:
        return None


@rule("never mind", decisive=True)
def decides(subject: Nothing) -> str:
    """It never holds."""
    raise Broken("as planned")


@rule("never mind")
def follows(subject: Nothing) -> str:
    """It always holds."""
    return "fine"


@rule("never mind")
def abstains(subject: Nothing) -> str:
    """It cannot be asked."""
    raise NotApplicable("nobody is there")


@rule("never mind")
def is_wrong_itself(subject: Nothing) -> str:
    """It has a bug."""
    raise IndexError("of the kit")


def test_rules_are_run_in_order_and_a_broken_decisive_one_ends_it() -> None:
    subject = Nothing(component=make_component("kl", "k1", "x", k1))
    seen = [
        (one.rule, one.status, one.detail) for one in examine((follows, abstains, decides, follows), subject).findings
    ]
    assert seen == [
        ("follows", "passed", "fine"),
        ("abstains", "not applicable", "nobody is there"),
        ("decides", "failed", "as planned"),
        ("follows", "not applicable", "cannot be asked while `decides` is broken"),
    ]
    assert decides.promise == "It never holds." and decides.hint == "never mind"


def test_a_fault_of_the_kit_is_not_blamed_on_the_component() -> None:
    with pytest.raises(IndexError, match="of the kit"):
        examine((is_wrong_itself,), Nothing(component=make_component("kl", "k1", "x", k1)))


def test_what_foreign_code_raises_is_a_finding() -> None:
    with pytest.raises(Broken, match=r"^raised KeyError: 'left' \(test_kit.py:\d+\)$"), foreign():
        _ = {}["left"]
    with pytest.raises(Broken, match=r"^refused it: too few$"), foreign():
        raise ConfigError("too few", "give more")


def test_random_states_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    check_kl(k1)
    assert torch.equal(torch.random.get_rng_state(), before)


# Stop-gradients


def cispo(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    weight = inputs.ratio.clamp(max=1.2).detach()
    return -weight * inputs.advantages * inputs.logprobs, {"weight": weight}


def gspo_token(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad():
        sequence = inputs.sequence_mean(inputs.log_ratio).exp()
    real = torch.where(inputs.completion_mask, inputs.logprobs, torch.zeros_like(inputs.logprobs))
    return -sequence * (real - real.detach()).exp() * inputs.advantages, {}


@pytest.mark.parametrize(("loss", "num_stops"), [(cispo, 1), (gspo_token, 2)])
def test_stop_gradients_are_held_fixed(loss: Any, num_stops: int) -> None:
    report = check_loss(loss)
    assert report.kept, report
    assert finding(report, "gradient_is_the_slope")[1].endswith(f"; {num_stops} stop-gradients held fixed")


def forgets_a_factor(inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    return -inputs.ratio.detach() * inputs.advantages * inputs.log_ratio.exp().square(), {}


def test_a_stop_gradient_in_the_wrong_place_shows_at_ratio_1() -> None:
    assert names(check_loss(forgets_a_factor)) == ["on_policy_gradient"]


def test_kinks_are_passed_over() -> None:
    at = torch.tensor([0.0, 1.0], dtype=torch.float64)
    slope = compare_slopes(lambda point: point.abs().sum(), at, torch.ones(2, dtype=torch.bool))
    assert (slope.num_elements, slope.num_stops) == (1, 0)


# Declarations


class Whitened:
    """Looks at every row of the minibatch, and says so."""

    coupling: ClassVar[Coupling] = "batch"
    on_policy_gradient: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        mask = inputs.completion_mask
        mean = torch.where(mask, inputs.ratio, 0.0).sum() / mask.sum()
        return -(inputs.ratio - mean) * inputs.advantages, {}


def test_what_a_loss_declares_is_not_held_against_it() -> None:
    report = check_loss(Whitened)
    assert report.kept, report
    assert finding(report, "coupling") == ("passed", "batch: it may look at every row")
    assert finding(report, "rows_alone")[0] == "not applicable"
    status, detail = finding(report, "on_policy_gradient")
    assert status == "not applicable"
    assert detail.startswith("it declares `on_policy_gradient = False`; observed: [")


@declares(invariances=("shift", "group_sum"))
def honest(rewards: Tensor, weights: Tensor) -> Tensor:
    return group_mean(rewards, weights)


@declares(invariances=("scale",))
def boastful(rewards: Tensor, weights: Tensor) -> Tensor:
    return group_mean(rewards, weights)


@declares(invariances=("rotation",))
def confused(rewards: Tensor, weights: Tensor) -> Tensor:
    return group_mean(rewards, weights)


def undeclared(rewards: Tensor, weights: Tensor) -> Tensor:
    return group_mean(rewards, weights)


def test_invariances_are_checked_where_declared_and_observed_elsewhere() -> None:
    facts = "shift yes, scale no, group_sum yes"
    expected = ("passed", f"declared: shift, group_sum; observed: {facts}")
    assert finding(check_advantage(honest), "invariances") == expected
    expected = ("not applicable", f"it declares none; observed: {facts}")
    assert finding(check_advantage(undeclared), "invariances") == expected
    status, detail = finding(check_advantage(boastful), "invariances")
    assert status == "failed" and detail.startswith("it declares `scale`, and with all rewards times 10 [")
    message = "it declares the invariance `rotation`; known: shift, scale, group_sum"
    assert finding(check_advantage(confused), "signature") == ("failed", message)


def test_what_a_kl_estimator_is_worth_is_observed() -> None:
    assert finding(check_kl(k1), "mean_over_the_policy") == (
        "passed",
        "mean 0.3717 where KL(policy || reference) is 0.3717: KL(policy || reference); "
        "on-policy gradient: that of a constant",
    )
    detail = finding(check_kl(k3), "mean_over_the_policy")[1]
    assert detail.endswith(": KL(policy || reference); on-policy gradient: that of KL(reference || policy)")


# State


class Running:
    """Divides by a running mean, and saves it."""

    def __init__(self) -> None:
        self.mean, self.history = 1.0, torch.zeros(1, dtype=torch.float64)

    def __call__(self, rewards: Tensor, weights: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * float(rewards.nan_to_num().mean())
        self.history += 1
        return group_mean(rewards, weights) / self.mean

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.history = state["mean"], state["history"]


class HalfSaved(Running):
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]


class OnlySaves:
    def __call__(self, rewards: Tensor, weights: Tensor) -> Tensor:
        return group_mean(rewards, weights)

    def state_dict(self) -> dict[str, Any]:
        return {}


def test_a_state_goes_round() -> None:
    assert finding(check_advantage(Running), "state") == ("passed", "round trip of mean, history")
    status, detail = finding(check_advantage(HalfSaved), "state")
    assert status == "failed" and detail.startswith("after loading the state the answer differs: [")
    assert finding(check_advantage(OnlySaves), "state")[1] == "it has `state_dict` and not its counterpart"


# Rewards


def trl_style(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    assert kwargs["question"] and kwargs["prompts"]
    return [float(text.strip() == gold) for text, gold in zip(completions, answer, strict=True)]


async def awaited(completions: list[str]) -> list[float]:
    return [float("please" in text.lower()) for text in completions]


def sorts_columns(completions: list[str], tests: list[list[int]]) -> list[float]:
    return [float(sum(numbers) == 6 and "42" in text) for text, numbers in zip(completions, tests, strict=True)]


def wants_siblings(rollouts: Any) -> list[float | None]:
    return [
        float(len(one.token_ids) == min(len(other.token_ids) for other in group))
        for group in rollouts.completions
        for one in group
    ]


def test_rewards_of_every_sort_can_be_checked() -> None:
    for reward in (trl_style, awaited, wants_siblings):
        report = check_reward(reward)
        assert report.kept, report
    assert finding(check_reward(wants_siblings), "alone")[1] == "it reads `rollouts`; a batch of one works"


def test_columns_can_be_given() -> None:
    report = check_reward(sorts_columns, columns={"tests": [[1, 2, 3], [4, 2], [5]]})
    assert report.kept, report
    assert finding(report, "abstains") == ("not applicable", "it reads no text column of the dataset")
    status, detail = finding(check_reward(sorts_columns), "returns")
    assert status == "failed" and detail.startswith("reward `sorts_columns` raised TypeError: unsupported operand")


def test_a_reward_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from grpoforge.testing.rewards import RewardSubject

    def hangs(completions: list[str]) -> list[float]:
        time.sleep(0.5)
        return [0.0] * len(completions)

    monkeypatch.setattr(RewardSubject, "seconds", 0.05)
    status, detail = finding(check_reward(hangs), "returns")
    assert (status, detail) == ("failed", "reward `hangs` did not return within 0.05 s for 12 completions")


def test_a_dataset_that_cannot_be_had_is_not_broken() -> None:
    def remote(split: str) -> list[dict[str, str]]:
        raise ConfigError("no network", "connect")

    report = check_dataset(remote)
    assert finding(report, "returns") == ("not applicable", "refused it: no network")


def by_place(rewards: Tensor, weights: Tensor) -> Tensor:
    """The first row of every pair is good, whatever its reward: it depends on the order inside a pair."""
    total = (rewards * weights).nansum(dim=2).masked_fill(rewards.isnan().all(dim=2), 0.0)
    return total - total.roll(1, dims=1)


def test_rows_that_belong_together_are_moved_together() -> None:
    report = check_advantage(Paired)
    assert report.kept, report
    assert finding(report, "row_order") == ("passed", "eight rows in another order, in blocks of 2")
    assert finding(report, "batch_of_one")[1].startswith("one prompt works; one completion: refused it: advantage")
    assert names(check_advantage(by_place)).count("row_order") == 1
    undeclared = type("Undeclared", (Paired,), {"block": 1, "__module__": __name__})
    assert "row_order" in names(check_advantage(undeclared)), "pairs are no single rows"


def test_a_block_is_no_excuse_for_an_order_of_blocks() -> None:
    assert "row_order" in names(check_advantage(declares(block=2)(by_place)))


def test_metrics_beside_advantages_are_checked() -> None:
    def spoilt(rewards: Tensor, weights: Tensor) -> Any:
        return group_mean(rewards, weights), {"x": (NAN, 1.0)}

    report = check_advantage(spoilt)
    assert finding(report, "returns") == ("failed", "advantage `spoilt` returned as metric `x` (nan, 1.0)")


def test_a_sampler_of_pairs_is_asked_for_pairs() -> None:
    report = check_sampler(PairedSampler)
    assert report.kept, report
    assert finding(report, "returns")[1].startswith("3 groups of 4")
    undeclared = type("Undeclared", (PairedSampler,), {"block": 1, "__module__": __name__})
    assert "batch_of_one" in names(check_sampler(undeclared))


@pytest.mark.parametrize("correction", [TargetTIS, TargetSequenceMask])
def test_a_correction_to_a_target_keeps_the_contract(correction: Any) -> None:
    report = check_correction(correction, target_temperature=0.7)
    assert report.kept, report
