"""Does a component keep its contract? The checks that every component of ours passes, for anybody's.

In a test of your own, with whatever runner you like:

    from grpoforge.testing import check_reward

    def test_politeness_keeps_the_contract():
        report = check_reward(politeness)
        assert report.kept, report

On the command line: ``grpoforge plugins check my_plugin.py``. A report has a finding per rule: passed, failed or not
applicable, with the values that show it. The rules of a kind stand in the file of its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpoforge.registry import Component, Kind, make_component
from grpoforge.testing import advantages, corrections, datasets, kl, losses, rewards, samplers, trackers
from grpoforge.testing.kit import examine
from grpoforge.testing.report import Finding, Report

if TYPE_CHECKING:
    from grpoforge.policy import Policy

__all__ = [
    "Finding",
    "Report",
    "check_advantage",
    "check_component",
    "check_correction",
    "check_dataset",
    "check_kl",
    "check_loss",
    "check_reward",
    "check_sampler",
    "check_tracker",
]

Factory = Callable[..., Any]


def check_component(component: Component, options: Mapping[str, Any] | None = None) -> Report:
    """The report on a registered ``component`` with ``options``, those of its signature where none are given.

    Raises:
        ConfigError: an option is unknown, missing or of the wrong type.
    """
    given = dict(options or {})
    component.validate(given)
    return _CHECKS[component.kind](component, given)


def check_reward(reward: Factory, *, columns: Mapping[str, Sequence[Any]] | None = None, **options: Any) -> Report:
    """The report on a reward, a function or class.

    Args:
        reward: ours or a TRL reward.
        columns: dataset columns that it reads, three values each, one per prompt; others are made up.
        options: of the reward.
    """
    subject = rewards.RewardSubject(component=_made("reward", reward), options=options, columns=columns or {})
    return examine(rewards.RULES, subject)


def check_advantage(advantage: Factory, **options: Any) -> Report:
    """The report on an advantage, a function or class."""
    return check_component(_made("advantage", advantage), options)


def check_loss(loss: Factory, **options: Any) -> Report:
    """The report on a loss, a function or class."""
    return check_component(_made("loss", loss), options)


def check_kl(estimator: Factory, **options: Any) -> Report:
    """The report on a KL estimator, a function or class."""
    return check_component(_made("kl", estimator), options)


def check_correction(correction: Factory, **options: Any) -> Report:
    """The report on an off-policy correction, a function or class."""
    return check_component(_made("correction", correction), options)


def check_sampler(sampler: Factory, *, policy: Policy | None = None, **options: Any) -> Report:
    """The report on a sampler class; it samples from ``policy``, by default the embedded ``tiny-math`` model."""
    chosen = samplers.tiny_policy() if policy is None else policy
    subject = samplers.SamplerSubject(component=_made("sampler", sampler), options=options, policy=chosen)
    return examine(samplers.RULES, subject)


def check_tracker(tracker: Factory, **options: Any) -> Report:
    """The report on a tracker class."""
    return check_component(_made("tracker", tracker), options)


def check_dataset(dataset: Factory, **options: Any) -> Report:
    """The report on a dataset, a function or class."""
    return check_component(_made("dataset", dataset), options)


def _made(kind: Kind, factory: Factory) -> Component:
    """``factory`` as a component of its own module. Raises PluginError for a signature that cannot be used."""
    return make_component(kind, factory.__name__.strip("<>"), factory.__module__.rpartition(".")[2], factory)


def _check_sampler(component: Component, options: Mapping[str, Any]) -> Report:
    subject = samplers.SamplerSubject(component=component, options=options, policy=samplers.tiny_policy())
    return examine(samplers.RULES, subject)


_CHECKS: Mapping[str, Callable[[Component, Mapping[str, Any]], Report]] = {
    "reward": lambda one, options: examine(rewards.RULES, rewards.RewardSubject(component=one, options=options)),
    "sampler": _check_sampler,
    "advantage": lambda one, given: examine(
        advantages.RULES, advantages.AdvantageSubject(component=one, options=given)
    ),
    "kl": lambda one, given: examine(kl.RULES, kl.KLSubject(component=one, options=given)),
    "loss": lambda one, given: examine(losses.RULES, losses.LossSubject(component=one, options=given)),
    "correction": lambda one, given: examine(
        corrections.RULES, corrections.CorrectionSubject(component=one, options=given)
    ),
    "tracker": lambda one, given: examine(trackers.RULES, trackers.TrackerSubject(component=one, options=given)),
    "dataset": lambda one, given: examine(datasets.RULES, datasets.DatasetSubject(component=one, options=given)),
}
