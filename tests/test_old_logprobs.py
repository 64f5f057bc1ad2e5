"""Every pass that a step leaves out is proven to have said what is used in its place."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from grpoforge.collate import collate
from grpoforge.combinations import check_together
from grpoforge.engine import Engine
from grpoforge.errors import ConfigError
from grpoforge.layers import build
from grpoforge.metrics import Meter
from grpoforge.old_logprobs import OldLogprobs, OldLogprobsMode, checked_rows
from grpoforge.policy import Policy, Reference
from grpoforge.scoring import BoundReward
from grpoforge.types import Batch, Prompt, Rollouts, StepReport, TokenLogprobs
from grpoforge_plugins.advantages.group import group
from grpoforge_plugins.corrections.truncate import tis
from grpoforge_plugins.kl.schulman import k1, k3
from grpoforge_plugins.losses.clip import Clip
from grpoforge_plugins.losses.covariance import ClipCov

PROMPTS = [[5, 9, 3], [7], [4, 4, 21, 6]]
COMPLETIONS = [[[3, 8, 1], [14, 6, 20, 9, 2]], [[22], [5, 1]], [[9, 13, 4, 4], [17, 2, 8, 19, 1]]]


def alternate(completions: Sequence[str]) -> list[float]:
    return [float(row % 2) for row in range(len(completions))]


class Reporting:
    """A sampler that reports the policy's own log-probs, ``shift`` beside them, at a version ``age`` behind."""

    def __init__(self, rollouts: Rollouts, *, shift: float = 0.0, age: int = 0) -> None:
        self.rollouts = rollouts
        self.shift = shift
        self.age = age

    def sample(self, policy: Any, prompts: Any, group_size: int, seed: int) -> Rollouts:
        batch = collate(self.rollouts, pad_token_id=0)
        values = policy.frozen_logprobs(batch, 64).logprobs + self.shift
        rows: Iterator[tuple[float, ...]] = iter(
            tuple(row[kept].tolist()) for row, kept in zip(values, batch.completion_mask, strict=True)
        )
        version = policy.version - self.age
        drawn = tuple(
            tuple(dataclasses.replace(one, logprobs=next(rows), policy_version=version) for one in each)
            for each in self.rollouts.completions
        )
        return dataclasses.replace(self.rollouts, completions=drawn)

    def sync(self, policy: Any) -> None: ...


class Counted:
    """A policy or reference whose passes over a batch are counted, in rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any) -> None:
        self.rows = 0
        original = owner.logprobs

        def logprobs(batch: Batch) -> TokenLogprobs:
            self.rows += batch.num_rows
            return original(batch)

        if dataclasses.is_dataclass(owner):
            monkeypatch.setattr(type(owner), "logprobs", lambda _, batch: logprobs(batch))
        else:
            monkeypatch.setattr(owner, "logprobs", logprobs)


@pytest.fixture
def steps(
    tiny_policy: Callable[..., Policy],
    make_engine: Callable[..., Engine],
    make_rollouts: Callable[..., Rollouts],
    make_prompts: Callable[..., tuple[Prompt, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Two steps of a policy; its weights, reports and the rows of its old passes."""

    def take(
        mode: OldLogprobsMode,
        *,
        shift: float = 0.0,
        age: int = 0,
        frozen: bool = False,
        tolerance: float = 1e-4,
        **parts: Any,
    ) -> tuple[Tensor, list[StepReport], int, int]:
        policy = tiny_policy()
        rollouts = make_rollouts(PROMPTS, COMPLETIONS, [[0.7, 1.3]] * 3)
        reference: Reference | None = policy.freeze() if frozen else None
        engine = make_engine(
            policy,
            sampler=Reporting(rollouts, shift=shift, age=age),
            rewards=[BoundReward(name="r", function=alternate, data=("completions",), weight=1.0)],
            **({"reference": reference, "beta": 0.1} if frozen else {}),
            **parts,
        )
        engine.algorithm = dataclasses.replace(engine.algorithm, old_logprobs=OldLogprobs(mode, tolerance))
        seen: list[StepReport] = []
        drawing = engine.algorithm.drawing.sampler
        with monkeypatch.context() as patch:
            of_reference = Counted(patch, reference) if reference is not None else None
            of_policy = Counted(patch, policy)
            for step in (1, 2):
                seen.append(engine.step(make_prompts(PROMPTS), step=step, seed=step))
        assert drawing is engine.algorithm.drawing.sampler
        # The sampler asks the policy for all rows once per step: those passes are not the step's.
        old_rows = of_policy.rows - 2 * 6
        weights = torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])
        return weights, seen, old_rows, of_reference.rows if of_reference else 0

    return take


def assert_alike(one: Any, other: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    for left, right in zip(one[1], other[1], strict=True):
        assert left.metrics.keys() == right.metrics.keys()
        for name, value in left.metrics.items():
            if not name.startswith("time/") and "seconds" not in name:
                assert value == pytest.approx(right.metrics[name], rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("micro", [1, 4, 64])
def test_one_update_is_its_own_old_pass(micro: int, steps: Callable[..., Any]) -> None:
    auto = steps("auto", micro_batch_size=micro)
    assert_alike(auto, steps("recompute", micro_batch_size=micro))
    assert auto[2] == 0
    assert all(report.metrics["clip_ratio/region_mean"] == 0 for report in auto[1])
    assert auto[1][0].metrics["invariant/ratio_dev_step0"] == 0.0


def test_it_measures_the_sampler_all_the_same(steps: Callable[..., Any]) -> None:
    auto = steps("auto", shift=0.25, micro_batch_size=4)
    assert auto[1][1].metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.25, rel=1e-5)
    assert auto[1][1].metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.25, rel=1e-5)
    assert_alike(auto, steps("recompute", shift=0.25, micro_batch_size=4))


@pytest.mark.parametrize("kl_in_reward", [False, True])
def test_an_unmoved_reference_is_not_asked(kl_in_reward: bool, steps: Callable[..., Any]) -> None:
    """Two steps with KL: the first needs no reference pass, the second does."""
    kl = k1 if kl_in_reward else k3
    auto = steps("auto", frozen=True, kl=kl, kl_in_reward=kl_in_reward)
    assert auto[3] == 6
    assert auto[1][0].metrics["kl"] == 0.0 != auto[1][1].metrics["kl"]
    assert auto[2] == (12 if kl_in_reward else 0), "a KL in the reward reads the old log-probs before the update"
    assert_alike(auto, steps("recompute", frozen=True, kl=kl, kl_in_reward=kl_in_reward))


def test_the_sampler_is_taken_where_it_agrees(steps: Callable[..., Any]) -> None:
    """Two optimizer steps per batch: one checked row per step instead of six."""
    taken = steps("auto", minibatch_size=3)
    assert taken[2] == 2
    # The sampler's log-probs are held in float32: that is the size of the difference.
    assert_alike(taken, steps("recompute", minibatch_size=3), tolerance=1e-7)
    assert taken[1][0].metrics["sampling/sampling_logp_difference/max"] < 1e-6


def test_the_sampler_is_taken_when_asked_for_also_for_one_update(steps: Callable[..., Any]) -> None:
    taken = steps("sampler", shift=0.01, tolerance=0.02)
    assert taken[2] == 2
    assert taken[1][0].metrics["invariant/ratio_dev_step0"] == pytest.approx(1 - 0.99004983, abs=1e-6)  # 1 - exp(-0.01)


def test_a_sampler_that_disagrees_is_not_taken_and_that_is_said_once(
    steps: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="grpoforge.old_logprobs")
    refused = steps("auto", shift=0.25, minibatch_size=3)
    assert refused[2] == 2 + 12
    warned = [
        record.message for record in caplog.records if "old log-probs are computed by the policy" in record.message
    ]
    assert len(warned) == 1 and "up to 0.25" in warned[0] and "batch.sampler_tolerance" in warned[0]
    assert_alike(refused, steps("recompute", shift=0.25, minibatch_size=3))


def test_a_sampler_of_another_version_is_not_taken(steps: Callable[..., Any]) -> None:
    assert steps("auto", age=1, minibatch_size=3)[2] == 12
    assert steps("sampler", age=1, minibatch_size=3)[2] == 12


@pytest.mark.parametrize(
    "parts", [{"top_entropy_quantile": 0.5}, {"corrections": [tis]}], ids=["entropy", "corrections"]
)
@pytest.mark.parametrize("minibatch", [3, 6])
def test_what_reads_the_old_policy_gets_it(parts: dict[str, Any], minibatch: int, steps: Callable[..., Any]) -> None:
    auto = steps("auto", minibatch_size=minibatch, **parts)
    assert auto[2] == 12
    assert_alike(auto, steps("recompute", minibatch_size=minibatch, **parts))


@pytest.mark.parametrize("micro", [2, 64])
def test_a_loss_over_the_whole_minibatch(micro: int, steps: Callable[..., Any]) -> None:
    auto = steps("auto", loss=ClipCov(), micro_batch_size=micro)
    assert_alike(auto, steps("recompute", loss=ClipCov(), micro_batch_size=micro))


def test_several_passes_over_a_batch_keep_what_was_before_the_first(steps: Callable[..., Any]) -> None:
    auto = steps("auto", epochs=2)
    assert auto[2] == 2 and auto[1][0].metrics["clip_ratio/region_mean"] >= 0
    assert_alike(auto, steps("recompute", epochs=2), tolerance=1e-7)


def test_checked_rows_are_others_at_every_version() -> None:
    assert checked_rows(192, 0).tolist() == list(range(12))
    assert checked_rows(192, 2).tolist() == list(range(24, 36))
    assert checked_rows(32, 17).tolist() == [2, 3]
    assert checked_rows(5, 7).tolist() == [2]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"batch": {"top_entropy_quantile": 0.2}}, "entropy"),
        ({"corrections": [{"name": "tis"}]}, "corrections compare"),
        ({"kl": {"name": "k1", "placement": "reward"}}, "charges for them"),
    ],
)
def test_the_samplers_log_probs_alone_are_refused_where_more_is_read(changes: dict[str, Any], why: str) -> None:
    config = build([("a.yaml", changes), ("b.yaml", {"batch": {"old_logprobs": "sampler"}})])
    with pytest.raises(ConfigError, match="old_logprobs` is `sampler`") as failure:
        check_together(config, sampler=object(), advantage=group, loss=Clip(), kl=k1, corrections=())
    assert why in failure.value.message and "(from b.yaml)" in failure.value.message
    assert failure.value.hint == "use `--set batch.old_logprobs=auto`"


def test_a_frozen_copy_knows_when_the_policy_has_moved(
    tiny_policy: Callable[..., Policy], make_engine: Callable[..., Engine], make_rollouts: Callable[..., Rollouts]
) -> None:
    policy = tiny_policy()
    reference = policy.freeze()
    engine = make_engine(policy, reference=reference, beta=0.1)
    batch = collate(make_rollouts(PROMPTS, COMPLETIONS), pad_token_id=0)
    old, ref = engine.freeze(batch, Meter())
    assert ref is old.logprobs
    policy.version = 1
    assert engine.freeze(batch, Meter())[1] is not old.logprobs
    assert make_engine(policy, reference=tiny_policy().freeze(), beta=0.1).reference_is_policy is False


def test_rows_without_a_token_check_nothing(
    tiny_policy: Callable[..., Policy], make_rollouts: Callable[..., Rollouts], caplog: pytest.LogCaptureFixture
) -> None:
    """All rows to check were cut at the limit and masked: that is no agreement, and no reason for a warning."""
    policy = tiny_policy()
    rollouts = make_rollouts(PROMPTS, COMPLETIONS, [[0.7, 1.3]] * 3)
    batch = collate(rollouts, pad_token_id=0)
    masked = dataclasses.replace(batch, completion_mask=torch.zeros_like(batch.completion_mask))
    assert OldLogprobs("sampler").from_sampler(policy, masked, rollouts, 8) is None
    assert not caplog.messages
